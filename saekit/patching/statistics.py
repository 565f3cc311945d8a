"""How sure one can be of effects, and what they are to be compared with."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Real
from torch import Tensor

from saekit.errors import DataError, SaekitError
from saekit.sae import SAE


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with a confidence interval."""

    mean: float
    low: float
    high: float


def bootstrap(
    values: Float[Tensor, " prompts"], *, seed: int = 0, resamples: int = 2000, level: float = 0.95
) -> Interval:
    """Percentile interval of the mean over prompts, which are drawn anew with replacement (Efron, 1979).

    Raises:
        DataError: fewer than two values, which say nothing about their spread.
    """
    if len(values) < 2:
        raise DataError(f"there are {len(values)} values; an interval needs at least 2 prompts")
    values = values.detach().double().cpu()
    drawn = torch.randint(len(values), (resamples, len(values)), generator=torch.Generator().manual_seed(seed))
    means = values[drawn].mean(1)
    low, high = means.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return Interval(float(values.mean()), low, high)


def rank_correlation(one: Real[Tensor, " n"], two: Real[Tensor, " n"]) -> float:
    """Spearman's: the correlation of ranks, equal values sharing the mean of theirs; nan if one is constant."""
    ranks = torch.stack([mean_ranks(one), mean_ranks(two)])
    return float(torch.corrcoef(ranks)[0, 1])


def mean_ranks(values: Real[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Ranks from 1, equal values sharing the mean of theirs."""
    _, group, size = values.detach().double().cpu().unique(return_inverse=True, return_counts=True)
    last = size.cumsum(0).double()
    return (last - (size - 1) / 2)[group]


def with_random_decoder(sae: SAE, *, seed: int) -> SAE:
    """The control: every feature fires on the same tokens as strongly, and writes as much, but anywhere.

    Equal density and equal norm hold by construction. An SAE only for edits and attributions with the
    error term; its own reconstruction means nothing.
    """
    control = sae.with_rule(sae.rule)
    drawn = torch.randn(sae.decoder.shape, generator=torch.Generator().manual_seed(seed)).to(sae.decoder)
    rows = torch.nn.functional.normalize(drawn, dim=1) * sae.decoder.detach().norm(dim=1, keepdim=True)
    control.decoder = torch.nn.Parameter(rows, requires_grad=False)
    return control


def matched_features(
    density: Float[Tensor, " n_features"], features: Int[Tensor, " m"], *, seed: int, neighbours: int = 20
) -> Int[Tensor, " m"]:
    """For each feature another, drawn from those that fire about as often; none twice and none of `features`.

    Raises:
        SaekitError: too few features that ever fire.
    """
    order = density.argsort(descending=True, stable=True)
    free = (density > 0).clone()
    free[features] = False
    if int(free.sum()) < len(features):
        raise SaekitError(
            f"{int(free.sum())} other features fire, too few to match {len(features)}; compare a smaller set"
        )
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    generator = torch.Generator().manual_seed(seed)
    drawn: list[int] = []
    for feature in features.tolist():
        candidates = free.nonzero()[:, 0]
        nearest = (rank[candidates] - rank[feature]).abs().argsort(stable=True)[:neighbours]
        pick = int(candidates[nearest[int(torch.randint(len(nearest), (), generator=generator))]])
        free[pick] = False
        drawn.append(pick)
    return torch.tensor(drawn, dtype=torch.int64, device=features.device)
