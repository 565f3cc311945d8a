"""Training SAEs from a source of activations: the loop and nothing else."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, cast

import torch

from saekit.activations.batch import ActivationBatch, ActivationSource
from saekit.activations.clock import spent_on
from saekit.activations.stream import START, Place, PlacedStream, ResumableSource
from saekit.errors import DataError, SaekitError
from saekit.sae import SAE
from saekit.sae_config import SAEConfig, with_metadata
from saekit.selection import FeatureChoice
from saekit.targets import Site
from saekit.training.calibrate import calibrate
from saekit.training.config import TrainConfig, recipe
from saekit.training.keep import Keeper
from saekit.training.saved_run import RunFile, load_run
from saekit.training.state_file import check_unfinished
from saekit.training.step import Report, TrainState, cfg_of, train_step
from saekit.training.warm_start import checksum_of_weights

# activations that set the pre-bias and the input scale, and that calibrate thresholds at the end
SAMPLE_TOKENS = 32_768
CALIBRATION_TOKENS = 131_072

OnStep = Callable[[int, Sequence[Report]], None]
Batches = Mapping[Site, ActivationBatch]
# with the place behind them, where the stream knows it
Drawn = tuple[Batches, Place | None]


def train(
    configs: Sequence[TrainConfig],
    source: ActivationSource,
    *,
    model_name: str = "",
    context_size: int | None = None,
    start: Sequence[SAE] | None = None,
    device: torch.device | str = "cpu",
    on_step: OnStep = lambda step, reports: None,
    run_file: RunFile | None = None,
) -> list[SAE]:
    """Train one SAE per config, all on the same stream of activations.

    SAEs of a batch rule come back calibrated, with a `Threshold`, so that they can serve one prompt.

    Args:
        configs: they may differ in Site and in everything that concerns one SAE, not in tokens,
            batch_tokens and seed, which decide the stream.
        start: an SAE per config whose weights training goes on with; new ones if not given.
        device: where the SAEs are trained, wherever the source's vectors lie and a resumed run was before.
        on_step: called after every step with the number of steps done and a report per config.
        run_file: where to save the run, so that it can go on if it ends early, and whether to go on. A run
            that goes on ends with the weights of one that was never interrupted, to the bit, where a seed
            alone decides them: on a CPU, with the same versions and number of threads. The file stays; delete
            it when the SAEs are saved.

    Raises:
        SaekitError: if the configs do not share a stream, or name a Site that the source lacks; with a `run_file`,
            if the source is not a `ResumableSource`.
        FileError: if there is no run to resume, it had other settings, or one is there and not to be resumed.
        RunStopped: after SIGTERM or Ctrl-C, when the run is saved in `run_file`.
        DataError: if a loss is no longer finite; the message says at which step.
    """
    first = _check(configs, source)
    if start is not None and len(start) != len(configs):
        raise SaekitError(f"{len(start)} SAEs to start from for {len(configs)} to train; give one for each")
    cfgs = [_cfg(config, source, model_name, context_size) for config in configs]
    place, facts = START, {} if run_file is None else _facts(source, start)
    if run_file is not None and run_file.resume:
        states, place = load_run(run_file.path, configs, cfgs, facts, device=device)
        ahead = Ahead(cast(ResumableSource, source).stream(first.batch_tokens, seed=first.seed, start=place))
    else:
        if run_file is not None:
            check_unfinished(run_file.path, resume=False)
        ahead = Ahead(source.stream(first.batch_tokens, seed=first.seed))
        sample = ahead.look(max(1, SAMPLE_TOKENS // first.batch_tokens))
        states = _begin(configs, cfgs, start or [None] * len(configs), sample, device)
    with Keeper(run_file, states, facts, place) as keeper:
        _take_steps(states, ahead, on_step, keeper)
    with spent_on("calibration"):
        return [_finish(state, ahead) for state in states]


class Ahead(Iterator[Batches]):
    """A stream whose next batches can be looked at before they are taken.

    Attributes:
        place: behind the last batch that was taken, where the stream knows it.
    """

    def __init__(self, stream: Iterator[Batches]):
        self.place = stream.place if isinstance(stream, PlacedStream) else None
        self._stream = stream
        self._waiting: deque[Drawn] = deque()

    def look(self, n: int) -> list[Batches]:
        """The next `n` batches, which stay."""
        while len(self._waiting) < n:
            batches = next(self._stream)
            self._waiting.append((batches, self._stream.place if isinstance(self._stream, PlacedStream) else None))
        return [batches for batches, _ in islice(self._waiting, n)]

    def take(self) -> Drawn:
        """The next batch, which goes, and the place behind it."""
        self.look(1)
        batches, self.place = self._waiting.popleft()
        return batches, self.place

    def __next__(self) -> Batches:
        return self.take()[0]


def _begin(
    configs: Sequence[TrainConfig],
    cfgs: Sequence[SAEConfig],
    starts: Sequence[SAE | None],
    sample: Sequence[Batches],
    device: torch.device | str,
) -> list[TrainState]:
    """New states, set up by the first batches, which are trained on like all others."""
    return [
        TrainState.start(
            config,
            vectors_of(sample, config.site).to(device),
            vectors_of(sample, config.site_out).to(device) if config.site_out else None,
            cfg=cfg,
            start=start,
        )
        for config, cfg, start in zip(configs, cfgs, starts, strict=True)
    ]


def _take_steps(states: Sequence[TrainState], ahead: Ahead, on_step: OnStep, keeper: Keeper) -> None:
    last = states[0].config.steps
    for step in range(states[0].step + 1, last + 1):
        pools = [ahead.look(state.config.pool_starting_at(state.step)) for state in states]
        batches, place = ahead.take()
        with keeper.whole_step(place):
            with spent_on("step"):
                reports = [_step(state, batches, pool) for state, pool in zip(states, pools, strict=True)]
            with spent_on("logging"):
                on_step(step, reports)
        is_due = keeper.is_due(step)
        if is_due or step % 50 == 0 or step == last:
            _check_finite(states, reports, step)
        if is_due:
            with spent_on("saving"):
                keeper.save()


def _step(state: TrainState, batches: Batches, pool: Sequence[Batches]) -> Report:
    config, device = state.config, state.sae.b_dec.device
    if config.site_out:
        batches[config.site].check_same_tokens(batches[config.site_out])
    return train_step(
        state,
        _brought(batches[config.site].vectors, device),
        _brought(batches[config.site_out].vectors, device) if config.site_out else None,
        pool=_brought(vectors_of(pool, config.site), device) if pool else None,
    )


def _brought(vectors: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The vectors on the device, as float32; a GPU copies by itself from memory that stays in place."""
    vectors = vectors.float()
    if device.type == "cuda" and vectors.device.type == "cpu":
        return vectors.pin_memory().to(device, non_blocking=True)
    return vectors.to(device)


def _finish(state: TrainState, ahead: Ahead) -> SAE:
    sae, config = state.finished(), state.config
    if sae.rule.looks_across_tokens:
        least = sae.rule.smallest_batch(sae.n_features) if isinstance(sae.rule, FeatureChoice) else 1
        pool = ahead.look(-(-max(CALIBRATION_TOKENS, least) // config.batch_tokens))
        if isinstance(sae.rule, FeatureChoice) and sae.rule.floor:
            # a floor counts tokens, and here are more of them than training shared its budgets over
            sae.rule = replace(sae.rule, floor=sae.rule.floor * len(pool) // config.shared_over)
        sae.rule = calibrate(sae, vectors_of(pool, config.site).to(sae.b_dec.device))
    return sae


def vectors_of(batches: Iterable[Batches], site: Site) -> torch.Tensor:
    """All vectors of a Site, end to end, as float32."""
    return torch.cat([batch[site].vectors for batch in batches]).float()


def _cfg(config: TrainConfig, source: ActivationSource, model_name: str, context_size: int | None) -> SAEConfig:
    cfg = cfg_of(config, source.widths[config.site], source.widths[config.site_out] if config.site_out else None)
    return with_metadata(
        replace(cfg, model_name=model_name, context_size=context_size),
        training=recipe(config) | {"learning_rate": config.peak_lr},
    )


def _check(configs: Sequence[TrainConfig], source: ActivationSource) -> TrainConfig:
    if not configs:
        raise SaekitError("no SAE to train: pass at least one TrainConfig")
    first = configs[0]
    for config in configs:
        if (config.tokens, config.batch_tokens, config.seed) != (first.tokens, first.batch_tokens, first.seed):
            raise SaekitError(
                "SAEs trained together read the same stream, but their configs differ in tokens, batch_tokens or seed; "
                "make these equal, or train them one after the other"
            )
        for site in (config.site, config.site_out):
            if site is not None and site not in source.widths:
                raise SaekitError(
                    f"the source supplies {', '.join(map(str, source.widths))}, not {site}; harvest that Site too"
                )
    return first


def _facts(source: ActivationSource, start: Sequence[SAE] | None) -> Mapping[str, Any]:
    facts = resumable(source).facts()
    return dict(facts) | {f"start ({n})": checksum_of_weights(sae) for n, sae in enumerate(start or (), start=1)}


def resumable(source: ActivationSource) -> ResumableSource:
    """The same source, if a run that reads it can be resumed.

    Raises:
        SaekitError: if it cannot.
    """
    if not isinstance(source, ResumableSource):
        raise SaekitError(
            f"{type(source).__name__} cannot say what and where it reads, so its run cannot be resumed; "
            "train without a run file, or give it `facts` and a `start` (saekit.activations.stream)"
        )
    return source


def _check_finite(states: Sequence[TrainState], reports: Sequence[Report], step: int) -> None:
    for state, report in zip(states, reports, strict=True):
        if not bool(report.loss.isfinite()):
            raise DataError(
                f"the loss at {state.config.site} is {float(report.loss.detach())} after step {step}; "
                f"lower the learning rate (it is {state.config.peak_lr:.2g})"
            )
