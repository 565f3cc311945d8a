"""What training minimises. Pure functions; none of them keeps state or reads a config.

`fvu` is the main loss up to scale. `aux_k_loss` (Gao et al., arXiv 2406.04093) and `aux_zipf_loss` ask a
set of unused features to explain what the kept ones left over; they differ only in who is in the set.
That `aux_zipf_loss` generalises `aux_k_loss` and serves dead and under-used features alike is stated of
arXiv 2411.02124; the formula is our reconstruction.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit.codes import SparseCodes
from saekit.density import RunningDensity, dead, expected_density, underused, zipf_fit
from saekit.kernels.entries import decode_rows, encode_entries
from saekit.kernels.select import Selection, top_of_rows
from saekit.sae import SAE


def fvu(x: Float[Tensor, "n_tokens d_model"], x_hat: Float[Tensor, "n_tokens d_model"]) -> Float[Tensor, ""]:
    """Fraction of variance unexplained: squared error over squared distance from the batch mean.

    0 is perfect, 1 is what predicting the mean of the batch would reach. Explained variance is `1 - fvu`.
    """
    return (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()


def normalised_mse(x: Float[Tensor, "n_tokens d_model"], x_hat: Float[Tensor, "n_tokens d_model"]) -> Float[Tensor, ""]:
    """Mean over tokens of squared error over squared norm: every token counts the same, large or small."""
    return ((x - x_hat).square().sum(1) / x.square().sum(1)).mean()


def summed_mse(x: Float[Tensor, "n_tokens d_model"], x_hat: Float[Tensor, "n_tokens d_model"]) -> Float[Tensor, ""]:
    """Mean over tokens of squared error summed over dimensions."""
    return (x - x_hat).square().sum(1).mean()


def aux_k_loss(
    sae: SAE,
    x: Float[Tensor, "n_tokens d_model"],
    codes: SparseCodes,
    *,
    density: RunningDensity,
    k_aux: int,
    dead_after: int,
) -> Float[Tensor, ""]:
    """How badly the `k_aux` strongest dead features of each token explain the error of the live ones.

    Args:
        dead_after: tokens without firing after which a feature is dead.

    Returns:
        squared error over the squared distance of the error from its mean (1 = no better than the
        mean), times the share of `k_aux` that is dead; zero if no feature is dead, or no error left.
    """
    return explain_residual(sae, x, codes, members=dead(density.tokens_since_fired, after=dead_after), k_aux=k_aux)


def aux_zipf_loss(
    sae: SAE,
    x: Float[Tensor, "n_tokens d_model"],
    codes: SparseCodes,
    *,
    density: RunningDensity,
    k_aux: int,
    dead_after: int,
    below: float = 0.5,
    least_count: float = 10.0,
) -> Float[Tensor, ""]:
    """`aux_k_loss` with under-used features beside the dead ones.

    A feature is under-used when its running density is less than `below` times what the Zipf line
    fitted to all densities expects of its rank, and the line expects at least `least_count` firings
    within the running average's horizon (fewer would be noise). With `below` = 0 this is `aux_k_loss`.
    At most half of the dictionary takes part, the features furthest under the line first.
    """
    members = revivable(density, dead_after=dead_after, below=below, least_count=least_count)
    return explain_residual(sae, x, codes, members=members, k_aux=k_aux)


def revivable(
    density: RunningDensity, *, dead_after: int, below: float, least_count: float
) -> Bool[Tensor, " n_features"]:
    """The features that `aux_zipf_loss` works on."""
    current = density.density
    expected = expected_density(current, zipf_fit(current))
    measurable = expected * density.horizon >= least_count
    is_dead = dead(density.tokens_since_fired, after=dead_after)
    members = is_dead | (measurable & underused(current, expected, below=below))
    most = len(current) // 2
    if int(members.sum()) <= most:
        return members
    urgency = torch.where(is_dead, -1.0, current / expected.clamp(min=1e-30)).masked_fill(~members, torch.inf)
    return torch.zeros_like(members).index_fill_(0, urgency.argsort(stable=True)[:most], True)


def explain_residual(
    sae: SAE,
    x: Float[Tensor, "n_tokens d_model"],
    codes: SparseCodes,
    *,
    members: Bool[Tensor, " n_features"],
    k_aux: int,
) -> Float[Tensor, ""]:
    """How badly the strongest `members` explain what `codes` left over; see `aux_k_loss`.

    The residual is a constant; gradients reach the encoder and decoder rows of the members that are
    chosen, and nothing else. A member that the codes already use on a token is not used there again;
    its place among the `k_aux` stays empty.
    Never holds more than `(n_tokens, members)` in blocks.
    """
    chosen_from = members.nonzero(as_tuple=True)[0]
    if len(chosen_from) == 0:
        return x.new_zeros(())
    k = min(k_aux, len(chosen_from))
    with torch.no_grad():
        residual = x - sae.decode(codes)
    centred, scale = sae.centre(x.detach())
    picked = top_of_rows(centred, sae.encoder[chosen_from], sae.b_enc[chosen_from], k)
    picked = _without_kept(picked._replace(features=chosen_from[picked.features]), codes)
    values = encode_entries(centred.detach(), sae.encoder, sae.b_enc, picked)
    if scale is not None:
        values = values * scale.detach().flatten().repeat_interleave(picked.row_starts.diff())
    explained = decode_rows(values, picked.features, picked.row_starts, sae.decoder)
    error = (residual - explained).square().sum()
    spread = (residual - residual.mean(0)).square().sum()
    share = min(1.0, len(chosen_from) / k_aux)
    # nan_to_num would hide a division by zero from the loss, but not from the gradient
    explainable = spread > 0
    return share * torch.where(explainable, error / spread.masked_fill(~explainable, 1.0), 0.0)


def _without_kept(picked: Selection, codes: SparseCodes) -> Selection:
    """The same selection with scores set negative where the codes already hold the entry."""
    if len(codes.features) == 0:
        return picked
    kept = _flat_index(codes.row_starts, codes.features, codes.n_features)
    mine = _flat_index(picked.row_starts, picked.features, codes.n_features)
    # codes stand in the order (token, feature), so their flat indices are sorted
    place = torch.searchsorted(kept, mine).clamp(max=len(kept) - 1)
    taken = (kept[place] == mine) & (codes.values[place] > 0)
    return picked._replace(scores=picked.scores.masked_fill(taken, -1.0))


def _flat_index(
    row_starts: Int[Tensor, " rows"], features: Int[Tensor, " nnz"], n_features: int
) -> Int[Tensor, " nnz"]:
    rows = torch.arange(len(row_starts) - 1, device=features.device)
    return rows.repeat_interleave(row_starts.diff(), output_size=len(features)) * n_features + features
