"""What the page says of a feature's causal effect: never without how well such effects agree with exact ones."""

from dataclasses import dataclass

import torch

from saekit.patching.effects_file import KeptEffects


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureEffect:
    """Rise of the loss when one feature is zeroed, in nats per token on which it is active.

    Attributes:
        attributed: the estimate, with a 95 % interval from `low` to `high`.
        random: the same of a random direction, as often active and as long.
        exact: of the rows on which it was zeroed for real; None for a feature that was not among the `checked`.
        on_checked: the estimate on those rows; None likewise.
        rank_correlation: between estimate and exact effect of the checked features.
        slope: exact nats per attributed one of theirs.
        checked: how many they are.
    """

    attributed: float
    low: float
    high: float
    random: float
    exact: float | None
    on_checked: float | None
    rank_correlation: float
    slope: float
    checked: int


def effect_of(kept: KeptEffects, feature: int) -> FeatureEffect | None:
    """None for a feature that was not active where the effects were measured."""
    effects, check = kept.effects, kept.check
    if not int(effects.active[feature]):
        return None
    place = torch.nonzero(check.feature == feature)[:, 0].tolist()
    return FeatureEffect(
        attributed=float(effects.effect[feature]),
        low=float(effects.low[feature]),
        high=float(effects.high[feature]),
        random=float(effects.random[feature]),
        exact=float(check.exact[place[0]]) if place else None,
        on_checked=float(check.attributed[place[0]]) if place else None,
        rank_correlation=check.rank_correlation,
        slope=check.slope,
        checked=len(check.feature),
    )
