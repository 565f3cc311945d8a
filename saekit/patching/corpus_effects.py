"""What every feature of an SAE does for the model's predictions, over a corpus, in one pass.

The effect of a feature is the change of the loss, in nats, when the feature is zeroed everywhere in a row, per
token on which it is active there: positive where the feature helps. It is estimated by attribution to second
order (`saekit.patching.curvature`): a forward and a few backward passes per batch for all features at once.
`check_exactly` measures some of them.

Both go through the rows batch by batch and add up. The sums are frozen values that say all there is to say about
the rows done, and whatever is drawn at random depends on the seed and the batch alone: a pass that goes on from
sums gives the same numbers, bit for bit, as one that was never interrupted.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.activations.mask import MaskPolicy
from saekit.activations.tokens import TokenRows
from saekit.codes import SparseCodes
from saekit.errors import DataError, SaekitError
from saekit.patching.attribution import difference
from saekit.patching.curvature import DRAWS, by_row, loss_gradients, second_order
from saekit.patching.effects import EVERYWHERE, Candidates, exact_effects, read_prompts
from saekit.patching.metric import NextTokenLoss
from saekit.patching.splice import writing_site
from saekit.patching.statistics import rank_correlation, with_random_decoder
from saekit.patching.tokens import TokenMask
from saekit.sae import SAE
from saekit.targets import Site, Target


@dataclass(frozen=True, slots=True)
class CorpusEffects:
    """Mean effect of every feature, per token on which it is active.

    Attributes:
        effect: `(n_features,)` nats; 0 for a feature that was never active.
        low, high: `(n_features,)` 95 % intervals over rows.
        random: `(n_features,)` the effect of the control: the same strengths on the same tokens, written in a
            random direction with the same norm.
        active: `(n_features,)` tokens on which each feature is active.
        rows: rows of the corpus that were read.
    """

    effect: Float[Tensor, " n_features"]
    low: Float[Tensor, " n_features"]
    high: Float[Tensor, " n_features"]
    random: Float[Tensor, " n_features"]
    active: Int[Tensor, " n_features"]
    rows: int


@dataclass(frozen=True, slots=True)
class EffectSums:
    """What the rows read so far add up to.

    Attributes:
        rows: how many were read.
        total: of effects, of the control's, of active tokens.
        drawn: of effects and of active tokens, in each resample of the rows.
    """

    rows: int
    total: Float[Tensor, "3 n_features"]
    drawn: Float[Tensor, "2 resamples n_features"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EffectSettings:
    """What decides the numbers, beside model, SAE and text.

    Attributes:
        draws: continuations drawn per row for the curvature of the loss; 0 for first order alone.
        resamples: how often the rows are drawn anew for the intervals. Each row counts as often as a Poisson
            variable of mean 1 says, which is the bootstrap for rows that are read once and not kept.
        batch_rows: rows per forward pass.
        seed: of the draws and of the control.
    """

    draws: int = DRAWS
    resamples: int = 200
    batch_rows: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("draws", 0), ("resamples", 1), ("batch_rows", 1)):
            if getattr(self, name) < least:
                raise SaekitError(f"{name}={getattr(self, name)}; give {least} or more")

    def parts(self, rows: int, *, done: int) -> list[Int[Tensor, " batch"]]:
        """The batches of so many rows that are still to be done, after the first `done` rows."""
        return [part for part in torch.arange(rows).split(self.batch_rows) if int(part[0]) >= done]

    def seed_of(self, part: Int[Tensor, " batch"]) -> int:
        """For what is drawn in one batch."""
        return self.seed * 1_000_003 + int(part[0])


def corpus_effects(
    target: Target,
    sae: SAE,
    site: Site,
    rows: TokenRows,
    *,
    mask: MaskPolicy = MaskPolicy(),
    settings: EffectSettings = EffectSettings(),
    after: EffectSums | None = None,
    on_batch: Callable[[EffectSums], None] = lambda sums: None,
) -> CorpusEffects:
    """Attribute the loss of `rows` to every feature, with intervals and a control.

    Args:
        after: what an earlier pass over the same rows came to, to go on from there.
        on_batch: is given the sums after every batch.

    Raises:
        DataError: if no feature is active on any token that counts.
    """
    tokens = TokenMask(policy=mask, bos=rows.bos, pad=rows.pad)
    control = with_random_decoder(sae, seed=settings.seed)
    sums = after or EffectSums(
        0,
        torch.zeros(3, sae.n_features, dtype=torch.float64),
        torch.zeros(2, settings.resamples, sae.n_features, dtype=torch.float64),
    )
    for part in settings.parts(len(rows), done=sums.rows):
        change, (effect, of_control) = _estimate(
            target, (sae, control), site, rows.select(part), tokens, settings, settings.seed_of(part)
        )
        found = torch.stack([effect, of_control, by_row(change, torch.ones_like(change.values), len(part))])
        generator = torch.Generator().manual_seed(settings.seed_of(part))
        often = torch.ones(settings.resamples, len(part), dtype=torch.float64)
        weight = torch.poisson(often, generator=generator)  # (resamples, rows of the batch)
        sums = EffectSums(sums.rows + len(part), sums.total + found.sum(1), sums.drawn + weight @ found[[0, 2]])
        on_batch(sums)
    total, drawn = sums.total, sums.drawn
    if not bool(total[2].any()):
        raise DataError("no feature is active on any token that counts; give more text or another mask")
    fired = total[2].clamp(min=1)
    means = drawn[0] / drawn[1].clamp(min=1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    return CorpusEffects(total[0] / fired, low, high, total[1] / fired, total[2].long(), sums.rows)


@dataclass(frozen=True, slots=True)
class ExactCheck:
    """Attributed against exact effects, in nats per token on which the feature is active.

    Attributes:
        feature: `(m,)`.
        attributed: `(m,)`.
        exact: `(m,)`.
        rank_correlation: Spearman's, between the two.
        slope: exact nats per attributed one: the line through 0 with the least sum of absolute errors.
    """

    feature: Int[Tensor, " m"]
    attributed: Float[Tensor, " m"]
    exact: Float[Tensor, " m"]
    rank_correlation: float
    slope: float


@dataclass(frozen=True, slots=True)
class CheckSums:
    """What the rows checked so far add up to: of attributed and exact effects, and of active tokens."""

    rows: int
    total: Float[Tensor, "3 m"]


def check_exactly(
    target: Target,
    sae: SAE,
    site: Site,
    rows: TokenRows,
    features: Int[Tensor, " m"],
    *,
    mask: MaskPolicy = MaskPolicy(),
    settings: EffectSettings = EffectSettings(),
    after: CheckSums | None = None,
    on_batch: Callable[[CheckSums], None] = lambda sums: None,
) -> ExactCheck:
    """Zero each feature everywhere in each row where it is active, and run the model: one row per pair.

    Arguments as for `corpus_effects`. Features that are active on none of the rows are left out.

    Raises:
        DataError: if fewer than two of the features are active on the rows.
    """
    tokens = TokenMask(policy=mask, bos=rows.bos, pad=rows.pad)
    sums = after or CheckSums(0, torch.zeros(3, len(features), dtype=torch.float64))
    for part in settings.parts(len(rows), done=sums.rows):
        batch = rows.select(part)
        change, (attributed,) = _estimate(target, (sae,), site, batch, tokens, settings, settings.seed_of(part))
        active = by_row(change, torch.ones_like(change.values), len(part))[:, features.cpu()]
        row, place = active.nonzero(as_tuple=True)
        pairs = Candidates(row, torch.full_like(row, EVERYWHERE), features.cpu()[place])
        loss = NextTokenLoss(batch.ids, batch.pad)
        exact = exact_effects(
            target, sae, site, batch.ids, loss, pairs, mask=tokens, batch_rows=settings.batch_rows
        )  # (pairs,)
        of_feature = torch.zeros(len(features), dtype=torch.float64).index_add_(0, place, exact)
        found = torch.stack([attributed[:, features.cpu()].sum(0), of_feature, active.sum(0)])
        sums = CheckSums(sums.rows + len(part), sums.total + found)
        on_batch(sums)
    active = sums.total[2] > 0  # what was never zeroed agrees with anything
    if int(active.sum()) < 2:
        raise DataError(f"{int(active.sum())} of the features to be checked is active on these rows; give more of them")
    attributed, exact = sums.total[:2, active] / sums.total[2, active]
    return ExactCheck(
        features.cpu()[active],
        attributed,
        exact,
        rank_correlation(attributed, exact),
        _slope_through_zero(attributed, exact),
    )


def _estimate(
    target: Target,
    saes: tuple[SAE, ...],
    site: Site,
    rows: TokenRows,
    tokens: TokenMask,
    settings: EffectSettings,
    seed: int,
) -> tuple[SparseCodes, list[Float[Tensor, "rows n_features"]]]:
    """The ablation of every feature of the first SAE, and its effect on the loss of each row for each of the SAEs,
    which share their codes."""
    own = read_prompts(target, saes[0], site, rows.ids, mask=tokens, batch_rows=settings.batch_rows)
    gradients = loss_gradients(
        target, writing_site(saes[0], site), rows.ids, own.vectors, pad=rows.pad, draws=settings.draws, seed=seed
    )  # (rows, context, d_model) each
    change = difference(own.codes, None)
    return change, [second_order(change, gradients, sae, own.vectors) for sae in saes]


def _slope_through_zero(x: Float[Tensor, " m"], y: Float[Tensor, " m"]) -> float:
    """The median of y / x, each counted as much as |x|; nan if all of x is 0."""
    used = x != 0
    slope, weight = (y[used] / x[used]), x[used].abs()
    if not len(slope):
        return float("nan")
    order = slope.argsort()
    middle = int((weight[order].cumsum(0) >= weight.sum() / 2).nonzero()[0])
    return float(slope[order][middle])
