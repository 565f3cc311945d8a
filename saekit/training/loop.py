"""Training SAEs from a source of activations: the loop and nothing else."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import islice

import torch

from saekit.activations.batch import ActivationBatch, ActivationSource
from saekit.errors import DataError, SaekitError
from saekit.sae import SAE, SAEConfig, with_metadata
from saekit.targets import Site
from saekit.training.calibrate import calibrate
from saekit.training.config import TrainConfig
from saekit.training.step import Report, TrainState, train_step

# activations that set the pre-bias and the input scale, and that calibrate thresholds at the end
SAMPLE_TOKENS = 32_768
CALIBRATION_TOKENS = 131_072

OnStep = Callable[[int, Sequence[Report]], None]


def train(
    configs: Sequence[TrainConfig],
    source: ActivationSource,
    *,
    model_name: str = "",
    context_size: int | None = None,
    on_step: OnStep = lambda step, reports: None,
) -> list[SAE]:
    """Train one SAE per config, all on the same stream of activations.

    SAEs of a batch rule come back calibrated, with a `Threshold`, so that they can serve one prompt.

    Args:
        configs: they may differ in Site and in everything that concerns one SAE, not in tokens,
            batch_tokens and seed, which decide the stream.
        on_step: called after every step with the number of steps done and a report per config.

    Raises:
        SaekitError: if the configs do not share a stream, or name a Site that the source lacks.
        DataError: if a loss is no longer finite; the message says at which step.
    """
    first = _check(configs, source)
    stream = source.stream(first.batch_tokens, seed=first.seed)
    head = list(islice(stream, max(1, SAMPLE_TOKENS // first.batch_tokens)))
    states = [
        TrainState.start(config, _vectors(head, config.site), cfg=_cfg(config, source, model_name, context_size))
        for config in configs
    ]
    pending = iter(head)
    for step in range(1, first.steps + 1):
        batches = next(pending, None) or next(stream)
        reports = [train_step(state, batches[state.config.site].vectors.to(state.sae.b_dec.device)) for state in states]
        on_step(step, reports)
        if step % 50 == 0 or step == first.steps:
            _check_finite(states, reports, step)
    n_pool = max(1, CALIBRATION_TOKENS // first.batch_tokens)
    needs_pool = any(config.rule.looks_across_tokens for config in configs)
    pool = list(islice(stream, n_pool)) if needs_pool else []
    return [_finish(state, pool) for state in states]


def _finish(state: TrainState, pool: Sequence[Mapping[Site, ActivationBatch]]) -> SAE:
    sae = state.finished()
    if sae.rule.looks_across_tokens:
        sae.rule = calibrate(sae, _vectors(pool, state.config.site))
    return sae


def _vectors(batches: Sequence[Mapping[Site, ActivationBatch]], site: Site) -> torch.Tensor:
    return torch.cat([batch[site].vectors for batch in batches])


def _cfg(config: TrainConfig, source: ActivationSource, model_name: str, context_size: int | None) -> SAEConfig:
    cfg = SAEConfig(
        d_in=source.widths[config.site],
        d_sae=config.n_features,
        hook_name=str(config.site),
        model_name=model_name,
        context_size=context_size,
        equal_norms=config.equal_norms,
    )
    recipe = asdict(config) | {"site": str(config.site), "rule": repr(config.rule), "learning_rate": config.peak_lr}
    return with_metadata(cfg, training=recipe)


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
        if config.site not in source.widths:
            raise SaekitError(
                f"the source supplies {', '.join(map(str, source.widths))}, not {config.site}; harvest that Site too"
            )
    return first


def _check_finite(states: Sequence[TrainState], reports: Sequence[Report], step: int) -> None:
    for state, report in zip(states, reports, strict=True):
        if not bool(report.loss.isfinite()):
            raise DataError(
                f"the loss at {state.config.site} is {float(report.loss.detach())} after step {step}; "
                f"lower the learning rate (it is {state.config.peak_lr:.2g})"
            )
