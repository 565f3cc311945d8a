"""Training SAEs from a source of activations: the loop and nothing else."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from itertools import islice
from types import NoneType
from typing import Any

import torch

from saekit.activations.batch import ActivationBatch, ActivationSource
from saekit.errors import DataError, SaekitError
from saekit.sae import SAE
from saekit.sae_config import SAEConfig, with_metadata
from saekit.selection import FeatureChoice
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
    ahead = deque(islice(stream, max(1, SAMPLE_TOKENS // first.batch_tokens)))
    states = [
        TrainState.start(
            config,
            _vectors(ahead, config.site),
            _vectors(ahead, config.site_out) if config.site_out else None,
            cfg=_cfg(config, source, model_name, context_size),
        )
        for config in configs
    ]
    for step in range(1, first.steps + 1):
        for _ in range(max([1, *(config.pool_starting_at(step - 1) for config in configs)]) - len(ahead)):
            ahead.append(next(stream))
        reports = [_step(state, ahead) for state in states]
        ahead.popleft()
        on_step(step, reports)
        if step % 50 == 0 or step == first.steps:
            _check_finite(states, reports, step)
    return [_finish(state, stream) for state in states]


def _step(state: TrainState, ahead: Sequence[Mapping[Site, ActivationBatch]]) -> Report:
    """One step on the first of the batches `ahead`; the others are looked at where budgets are pooled."""
    config, device = state.config, state.sae.b_dec.device
    n_pool = config.pool_starting_at(state.step)
    return train_step(
        state,
        ahead[0][config.site].vectors.to(device),
        ahead[0][config.site_out].vectors.to(device) if config.site_out else None,
        pool=_vectors(list(islice(ahead, n_pool)), config.site).to(device) if n_pool else None,
    )


def _finish(state: TrainState, stream: Iterator[Mapping[Site, ActivationBatch]]) -> SAE:
    sae, config = state.finished(), state.config
    if sae.rule.looks_across_tokens:
        least = sae.rule.smallest_batch(sae.n_features) if isinstance(sae.rule, FeatureChoice) else 1
        n_pool = -(-max(CALIBRATION_TOKENS, least) // config.batch_tokens)
        sae.rule = calibrate(sae, _vectors(list(islice(stream, n_pool)), config.site).to(sae.b_dec.device))
    return sae


def _vectors(batches: Iterable[Mapping[Site, ActivationBatch]], site: Site) -> torch.Tensor:
    return torch.cat([batch[site].vectors for batch in batches])


def _cfg(config: TrainConfig, source: ActivationSource, model_name: str, context_size: int | None) -> SAEConfig:
    cfg = SAEConfig(
        d_in=source.widths[config.site],
        d_sae=config.n_features,
        hook_name=str(config.site),
        model_name=model_name,
        context_size=context_size,
    )
    return with_metadata(cfg, training=recipe(config))


def recipe(config: TrainConfig) -> dict[str, Any]:
    """A config as a file can hold it: numbers and names as they are, everything else as it prints."""
    values = {field.name: getattr(config, field.name) for field in fields(config)} | {"learning_rate": config.peak_lr}
    plain = (bool, int, float, str, NoneType)
    return {name: value if isinstance(value, plain) else str(value) for name, value in values.items()}


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


def _check_finite(states: Sequence[TrainState], reports: Sequence[Report], step: int) -> None:
    for state, report in zip(states, reports, strict=True):
        if not bool(report.loss.isfinite()):
            raise DataError(
                f"the loss at {state.config.site} is {float(report.loss.detach())} after step {step}; "
                f"lower the learning rate (it is {state.config.peak_lr:.2g})"
            )
