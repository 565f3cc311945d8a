"""What every feature of an SAE does for the model's predictions, over a corpus, in one pass.

The effect of a feature is the change of the loss, in nats over all later predictions of the row, when the
feature is zeroed at one token where it is active: positive where the feature helps. It is estimated by
attribution patching, one forward and one backward pass per batch for all features at once. `check_exactly`
measures some of them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.activations.mask import MaskPolicy
from saekit.activations.tokens import TokenRows
from saekit.codes import SparseCodes
from saekit.errors import DataError
from saekit.patching.attribution import along_decoder, attribute, difference, gradient_at
from saekit.patching.effects import EVERYWHERE, Candidates, exact_effects, read_prompts
from saekit.patching.metric import NextTokenLoss
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


def corpus_effects(
    target: Target,
    sae: SAE,
    site: Site,
    rows: TokenRows,
    *,
    mask: MaskPolicy = MaskPolicy(),
    batch_rows: int = 16,
    resamples: int = 200,
    seed: int = 0,
    on_progress: Callable[[int], None] = lambda rows_done: None,
) -> CorpusEffects:
    """Attribute the loss of `rows` to every feature, with intervals and a control.

    Args:
        resamples: how often the rows are drawn anew for the intervals. Each row counts as often as a Poisson
            variable of mean 1 says, which is the bootstrap for rows that are read once and not kept.
        on_progress: called with the number of rows done since the last call.

    Raises:
        DataError: if no feature is active on any token that counts.
    """
    tokens = TokenMask(policy=mask, bos=rows.bos, pad=rows.pad)
    control = with_random_decoder(sae, seed=seed)
    loss = NextTokenLoss(rows.ids, rows.pad)
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(3, sae.n_features, dtype=torch.float64)  # of effects, of the control, of active tokens
    drawn = torch.zeros(2, resamples, sae.n_features, dtype=torch.float64)  # of effects and of active tokens
    for part in torch.arange(len(rows)).split(batch_rows):
        own = read_prompts(target, sae, site, rows.ids[part], mask=tokens, batch_rows=batch_rows)
        gradient = gradient_at(target, site, rows.ids[part], loss, part, own.vectors).flatten(0, 1).to(sae.b_dec)
        change = difference(own.codes, None)
        sums = torch.stack(
            [_by_row(change, along_decoder(change, gradient, which).cpu(), len(part)) for which in (sae, control)]
            + [_by_row(change, torch.ones(len(change.values)), len(part))]
        )  # (3, rows of the batch, n_features)
        total += sums.sum(1)
        weight = torch.poisson(torch.ones(resamples, len(part), dtype=torch.float64), generator=generator)
        drawn += weight @ sums[[0, 2]]
        on_progress(len(part))
    if not bool(total[2].any()):
        raise DataError("no feature is active on any token that counts; give more text or another mask")
    fired = total[2].clamp(min=1)
    means = drawn[0] / drawn[1].clamp(min=1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    return CorpusEffects(total[0] / fired, low, high, total[1] / fired, total[2].long(), len(rows))


@dataclass(frozen=True, slots=True)
class ExactCheck:
    """Attributed against exact effects: of zeroing a feature everywhere in a row, mean over rows, in nats.

    Attributes:
        feature: `(m,)`.
        attributed: `(m,)`.
        exact: `(m,)`.
        rank_correlation: Spearman's, between the two.
    """

    feature: Int[Tensor, " m"]
    attributed: Float[Tensor, " m"]
    exact: Float[Tensor, " m"]
    rank_correlation: float


def check_exactly(
    target: Target,
    sae: SAE,
    site: Site,
    rows: TokenRows,
    features: Int[Tensor, " m"],
    *,
    mask: MaskPolicy = MaskPolicy(),
    batch_rows: int = 16,
    on_progress: Callable[[int], None] = lambda candidates_done: None,
) -> ExactCheck:
    """Zero each feature everywhere in each row where it is active, and run the model: one row per pair."""
    tokens, loss = TokenMask(policy=mask, bos=rows.bos, pad=rows.pad), NextTokenLoss(rows.ids, rows.pad)
    found = attribute(target, sae, site, rows.ids, loss, mask=tokens, batch_rows=batch_rows)
    at, attributed = found.everywhere()
    wanted = torch.isin(at.feature, features.to(at.feature.device)).nonzero()[:, 0]
    pairs = Candidates(at.prompt[wanted], torch.full_like(wanted, EVERYWHERE), at.feature[wanted])
    exact = exact_effects(
        target, sae, site, rows.ids, loss, pairs, mask=tokens, batch_rows=batch_rows, on_progress=on_progress
    )
    place = torch.full((sae.n_features,), -1, dtype=torch.int64)
    place[features.cpu()] = torch.arange(len(features))
    group = place[pairs.feature.cpu()]
    means = torch.zeros(2, len(features), dtype=torch.float64)
    means.index_add_(1, group, torch.stack([attributed[wanted].cpu(), exact]))
    means /= len(rows)
    return ExactCheck(features, means[0], means[1], rank_correlation(means[0], means[1]))


def _by_row(codes: SparseCodes, values: Tensor, n_rows: int) -> Float[Tensor, "rows n_features"]:
    """Sums of values of entries over the tokens of each row."""
    context = codes.n_tokens // n_rows
    row = (codes.token_of_entry() // context).cpu()
    sums = torch.zeros(n_rows * codes.n_features, dtype=torch.float64)
    return sums.index_add_(0, row * codes.n_features + codes.features.cpu(), values.double()).view(n_rows, -1)
