"""Product and selection in one, block by block: the dense pre-activations never exist whole.

One selection per rule: the k largest of each row (or of each group in it), the largest of the whole
matrix, the largest of each column, and all above a threshold. Each returns which entries were kept and their
pre-activations, in the order (token, feature); ties go to the larger value, then to the lower flat
index `token * n_features + feature`, exactly as a stable sort of the whole matrix would have it.
Selection has no gradient; `entries.encode_entries` attaches it.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

# elements of one block of pre-activations: 64 MB in float32, small beside any model
BLOCK_ELEMENTS = 1 << 24


class Selection(NamedTuple):
    """Kept entries in compressed-row form, with their raw pre-activations (before ReLU)."""

    scores: Float[Tensor, " nnz"]
    features: Int[Tensor, " nnz"]
    row_starts: Int[Tensor, " rows"]


def _row_blocks(x: Tensor, w_enc: Tensor, b_enc: Tensor) -> Iterator[tuple[int, Tensor]]:
    rows = max(1, BLOCK_ELEMENTS // max(1, len(w_enc)))
    for start in range(0, max(1, len(x)), rows):  # one empty block for an empty batch
        yield start, torch.nn.functional.linear(x[start : start + rows], w_enc, b_enc)


def top_of_last_dim(scores: Float[Tensor, "rows columns"], k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row, values and indices; among equals the lower index.

    `torch.topk` leaves open which of several equal values it takes, so rows where the cut falls
    between equals are done again by a stable sort.
    """
    if k >= scores.shape[1]:
        indices = torch.arange(scores.shape[1], device=scores.device).expand_as(scores)
        return scores, indices
    values, indices = scores.topk(k + 1, dim=1)
    undecided = values[:, k - 1] == values[:, k] if k else torch.zeros(len(scores), dtype=torch.bool)
    values, indices = values[:, :k], indices[:, :k]
    if bool(undecided.any()):
        rows = undecided.nonzero(as_tuple=True)[0]
        order = scores[rows].sort(dim=1, descending=True, stable=True)
        values[rows], indices[rows] = order.values[:, :k], order.indices[:, :k]
    return values, indices


def _by_token_then_feature(
    tokens: Tensor, features: Tensor, scores: Tensor, *, n_tokens: int, n_features: int
) -> Selection:
    order = (tokens * n_features + features).argsort()
    row_starts = torch.zeros(n_tokens + 1, dtype=torch.int64, device=tokens.device)
    torch.cumsum(torch.bincount(tokens, minlength=n_tokens), 0, out=row_starts[1:])
    return Selection(scores[order], features[order], row_starts)


@torch.no_grad()
def top_of_rows(x: Tensor, w_enc: Tensor, b_enc: Tensor, k: int, *, by_size: bool = False) -> Selection:
    """The k largest pre-activations of each token; `by_size` the largest whatever their sign."""

    def chosen(block: Tensor) -> Tensor:
        return top_of_last_dim(block.abs() if by_size else block, k)[1].sort(dim=1).values

    return _same_number_per_row(x, w_enc, b_enc, k, chosen)


@torch.no_grad()
def top_of_groups(x: Tensor, w_enc: Tensor, b_enc: Tensor, n_groups: int) -> Selection:
    """The largest pre-activation of each token in each of `n_groups` equal runs of neighbouring features."""
    size = len(w_enc) // n_groups
    first = torch.arange(0, len(w_enc), size, device=x.device)

    def chosen(block: Tensor) -> Tensor:
        # of equals the first, which argmax does not promise
        groups = block.unflatten(1, (n_groups, size))
        is_largest = groups == groups.amax(2, keepdim=True)
        return first + is_largest.to(torch.uint8).cumsum(2, dtype=torch.int32).eq(0).sum(2)

    return _same_number_per_row(x, w_enc, b_enc, n_groups, chosen)


def _same_number_per_row(
    x: Tensor, w_enc: Tensor, b_enc: Tensor, k: int, chosen: Callable[[Tensor], Tensor]
) -> Selection:
    """`chosen` gives the `k` features of each row of a block, rising."""
    all_scores, all_features = [], []
    for _, block in _row_blocks(x, w_enc, b_enc):
        features = chosen(block)
        all_scores.append(block.gather(1, features).flatten())
        all_features.append(features.flatten())
    row_starts = torch.arange(0, k * len(x) + 1, k, device=x.device)
    return Selection(torch.cat(all_scores), torch.cat(all_features), row_starts)


@torch.no_grad()
def top_of_all(x: Tensor, w_enc: Tensor, b_enc: Tensor, budget: int) -> Selection:
    """The `budget` largest pre-activations of the whole batch.

    Candidates above a guessed cut are collected block by block. If they are at least `budget`, the
    exact selection is among them; if not, the guess was too high and a lower one is tried, at last none.
    """
    n_features = len(w_enc)
    wanted_share = budget / max(1, len(x) * n_features)
    for slack in (1.3, 3.0, torch.inf):
        positions, scores = _candidates(x, w_enc, b_enc, budget, share=wanted_share * slack)
        if len(scores) >= budget:
            break
    kept = _first_largest(scores, budget)
    positions, scores = positions[kept], scores[kept]
    row_starts = torch.zeros(len(x) + 1, dtype=torch.int64, device=x.device)
    torch.cumsum(torch.bincount(positions // n_features, minlength=len(x)), 0, out=row_starts[1:])
    return Selection(scores, positions % n_features, row_starts)


def _candidates(x: Tensor, w_enc: Tensor, b_enc: Tensor, budget: int, *, share: float) -> tuple[Tensor, Tensor]:
    """Flat indices, rising, and scores of the entries above a cut that about `share` of them exceed.

    Where there are more than twice the budget, the rest is dropped and the cut raised before the next
    block: a later entry equal to the weakest kept one would lose to it, having the higher index.
    """
    cut = -torch.inf
    positions, scores = [], []
    for start, block in _row_blocks(x, w_enc, b_enc):
        if start == 0:
            cut = _guess_cut(block, share)
        block = block.flatten()
        found = (block > cut).nonzero()[:, 0] if cut > -torch.inf else torch.arange(len(block), device=x.device)
        positions.append(found + start * len(w_enc))
        scores.append(block[found])
        if sum(map(len, scores)) > 2 * budget:
            candidates = torch.cat(scores)
            kept = _first_largest(candidates, budget)
            positions, scores = [torch.cat(positions)[kept]], [candidates[kept]]
            cut = float(scores[0].min())
    return torch.cat(positions), torch.cat(scores)


def _first_largest(scores: Float[Tensor, " candidates"], budget: int) -> Int[Tensor, " budget"]:
    """Places of the `budget` largest, rising; among equals the first."""
    return top_of_last_dim(scores[None], budget)[1][0].sort().values


def _guess_cut(block: Tensor, share: float) -> float:
    """A value that about `share` of the block exceeds, read off a sample of its rows."""
    if share >= 1:
        return -torch.inf
    sample = block[:: max(1, len(block) // 64)].flatten()
    rank = int(share * len(sample))
    return float(sample.topk(rank + 1).values[-1]) if rank < len(sample) else -torch.inf


@torch.no_grad()
def top_of_columns(x: Tensor, w_enc: Tensor, b_enc: Tensor, budgets: Int[Tensor, " n_features"]) -> Selection:
    """The `budgets[f]` largest pre-activations of each feature `f`.

    Blocks run over features in the order of their budgets, so that a block's largest budget is close
    to all of its budgets.
    """
    by_budget = budgets.argsort(descending=True, stable=True)
    columns_per_block = max(1, BLOCK_ELEMENTS // max(1, len(x)))
    tokens, features, scores = [], [], []
    for members in by_budget.split(columns_per_block):
        block = torch.nn.functional.linear(w_enc[members], x) + b_enc[members, None]  # (members, n_tokens)
        most = int(budgets[members[0]])
        if most == 0:
            break
        values, rows = top_of_last_dim(block, most)
        if most < block.shape[1]:  # topk promises no order among equals; budgets below need one
            values, rows = _ordered(values, rows)
        else:
            order = values.sort(dim=1, descending=True, stable=True)
            values, rows = order.values, rows.gather(1, order.indices)
        kept = torch.arange(values.shape[1], device=x.device) < budgets[members, None]
        tokens.append(rows[kept])
        features.append(members[:, None].expand_as(rows)[kept])
        scores.append(values[kept])
    return _by_token_then_feature(
        torch.cat(tokens), torch.cat(features), torch.cat(scores), n_tokens=len(x), n_features=len(w_enc)
    )


def _ordered(values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """The same pairs, larger value first, then lower index."""
    indices, order = indices.sort(dim=1)
    ranked = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return ranked.values, indices.gather(1, ranked.indices)


@torch.no_grad()
def above(x: Tensor, w_enc: Tensor, b_enc: Tensor, theta: Float[Tensor, " n_features"]) -> Selection:
    """All pre-activations strictly above their feature's threshold."""
    tokens, features, scores = [], [], []
    for start, block in _row_blocks(x, w_enc, b_enc):
        rows, columns = (block > theta).nonzero(as_tuple=True)
        tokens.append(rows + start)
        features.append(columns)
        scores.append(block[rows, columns])
    row_starts = torch.zeros(len(x) + 1, dtype=torch.int64, device=x.device)
    all_tokens = torch.cat(tokens)
    torch.cumsum(torch.bincount(all_tokens, minlength=len(x)), 0, out=row_starts[1:])
    return Selection(torch.cat(scores), torch.cat(features), row_starts)
