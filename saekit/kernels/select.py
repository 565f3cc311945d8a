"""Product and selection in one, block by block: the dense pre-activations never exist whole.

One selection per rule: the k largest of each row (or of each group in it), the largest of the whole
matrix, the largest of each column, and all above a threshold. Each returns which entries were kept and their
pre-activations, in the order (token, feature); ties go to the larger value, then to the lower flat
index `token * n_features + feature`, exactly as a stable sort of the whole matrix would have it.
Selection has no gradient; `entries.encode_entries` attaches it.
"""

from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.kernels import backend, screen
from saekit.kernels.largest import kth_largest, largest_of_rows, positions_above, stable_order

# elements of one block of pre-activations: 28 MB in float32, which stays in the cache of a large CPU, and is
# under the 32 MB from which on glibc asks the system for fresh pages each time
BLOCK_ELEMENTS = 7 << 20


class Selection(NamedTuple):
    """Kept entries in compressed-row form, with their raw pre-activations (before ReLU)."""

    scores: Float[Tensor, " nnz"]
    features: Int[Tensor, " nnz"]
    row_starts: Int[Tensor, " rows"]


def _row_blocks(x: Tensor, w_enc: Tensor, b_enc: Tensor) -> Iterator[tuple[int, Tensor]]:
    """The first token of each block and its pre-activations, which the next block writes over."""
    rows = max(1, min(len(x), BLOCK_ELEMENTS // max(1, len(w_enc))))
    buffer = x.new_empty(rows, len(w_enc))
    for start in range(0, max(1, len(x)), rows):  # one empty block for an empty batch
        part = x[start : start + rows]
        yield start, torch.addmm(b_enc, part, w_enc.T, out=buffer[: len(part)])


def _starts(rows: Int[Tensor, " nnz"], n_rows: int) -> Int[Tensor, " starts"]:
    starts = torch.zeros(n_rows + 1, dtype=torch.int64, device=rows.device)
    torch.cumsum(torch.bincount(rows, minlength=n_rows), 0, out=starts[1:])
    return starts


@torch.no_grad()
def top_of_rows(x: Tensor, w_enc: Tensor, b_enc: Tensor, k: int, *, by_size: bool = False) -> Selection:
    """The k largest pre-activations of each token; `by_size` the largest whatever their sign."""
    k = min(k, len(w_enc))
    if (by := _epilogue(x)) and not by_size:
        found = _largest_by(by, x, w_enc, b_enc, torch.full((len(x),), k, device=x.device))
        return _same_number_per_row([found[2]], [found[1]], k, len(x))
    all_scores, all_features = [], []
    for _, block in _row_blocks(x, w_enc, b_enc):
        counts = torch.full((len(block),), k, device=x.device)
        tokens, features = largest_of_rows(block.abs() if by_size else block, counts)
        all_scores.append(block[tokens, features])
        all_features.append(features)
    return _same_number_per_row(all_scores, all_features, k, len(x))


def _epilogue(x: Tensor) -> ModuleType | None:
    """What finds entries of a product without writing it in float32: a module with two functions; None for blocks."""
    if len(x) == 0:  # nothing to sample a cut from, or to launch on
        return None
    if backend.uses_triton(x.device):
        from saekit.kernels import triton_encode

        return triton_encode
    return screen if screen.is_screening(x) else None


def _largest_by(by: ModuleType, rows: Tensor, columns: Tensor, bias: Tensor, counts: Tensor) -> tuple[Tensor, ...]:
    """Row, column and score of the `counts` largest of each row of `rows @ columns.T + bias`, block by block."""
    prepared = by.Columns.of(columns, bias)
    size = max(1, BLOCK_ELEMENTS // max(1, len(columns)))
    parts = []
    for start in range(0, max(1, len(rows)), size):
        owner, *rest = by.largest_of_products(rows[start : start + size], prepared, counts[start : start + size])
        parts.append((owner + start, *rest))
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


@torch.no_grad()
def top_of_groups(x: Tensor, w_enc: Tensor, b_enc: Tensor, n_groups: int) -> Selection:
    """The largest pre-activation of each token in each of `n_groups` equal runs of neighbouring features."""
    size = len(w_enc) // n_groups
    first = torch.arange(0, len(w_enc), size, device=x.device)
    all_scores, all_features = [], []
    for _, block in _row_blocks(x, w_enc, b_enc):
        # of equals the first, which argmax does not promise
        groups = block.unflatten(1, (n_groups, size))
        is_largest = groups == groups.amax(2, keepdim=True)
        features = first + is_largest.to(torch.uint8).cumsum(2, dtype=torch.int32).eq(0).sum(2)
        all_scores.append(block.gather(1, features).flatten())
        all_features.append(features.flatten())
    return _same_number_per_row(all_scores, all_features, n_groups, len(x))


def _same_number_per_row(scores: list[Tensor], features: list[Tensor], k: int, n_tokens: int) -> Selection:
    row_starts = torch.arange(n_tokens + 1, device=scores[0].device) * k
    return Selection(torch.cat(scores), torch.cat(features), row_starts)


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
    tokens = positions.div(n_features, rounding_mode="floor")
    return Selection(scores, positions - tokens * n_features, _starts(tokens, len(x)))


def _candidates(x: Tensor, w_enc: Tensor, b_enc: Tensor, budget: int, *, share: float) -> tuple[Tensor, Tensor]:
    """Flat indices, rising, and scores of the entries above a cut that about `share` of them exceed.

    Where there are more than twice the budget, the rest is dropped and the cut raised before the next
    block: a later entry equal to the weakest kept one would lose to it, having the higher index.
    """
    if (by := _epilogue(x)) and share < 1:
        found = _candidates_by(by, x, w_enc, b_enc, share)
        if found:
            return found
    cut = x.new_tensor(-torch.inf)
    positions, scores = [], []
    for start, block in _row_blocks(x, w_enc, b_enc):
        if start == 0:
            cut = _guess_cut(block, share)
        is_cut = bool(cut > -torch.inf)
        found = positions_above(block, cut) if is_cut else torch.arange(block.numel(), device=x.device)
        positions.append(found + start * len(w_enc))
        scores.append(block.flatten()[found])
        if sum(map(len, scores)) > 2 * budget:
            candidates = torch.cat(scores)
            kept = _first_largest(candidates, budget)
            positions, scores = [torch.cat(positions)[kept]], [candidates[kept]]
            cut = scores[0].min()
    return torch.cat(positions), torch.cat(scores)


def _candidates_by(
    by: ModuleType, x: Tensor, w_enc: Tensor, b_enc: Tensor, share: float
) -> tuple[Tensor, Tensor] | None:
    size = max(1, BLOCK_ELEMENTS // max(1, len(w_enc)))
    sample = torch.nn.functional.linear(x[:: max(1, len(x) // 64)][:size], w_enc, b_enc)
    cut = _guess_cut(sample, share)
    prepared = by.Columns.of(w_enc, b_enc)
    positions, scores = [], []
    for start in range(0, len(x), size):
        part = x[start : start + size]
        found = by.products_above(part, prepared, cut, expected=int(share * len(part) * len(w_enc)) + 1)
        if found is None:
            return None
        positions.append((found[0] + start) * len(w_enc) + found[1])
        scores.append(found[2])
    return torch.cat(positions), torch.cat(scores)


def _first_largest(scores: Float[Tensor, " candidates"], budget: int) -> Int[Tensor, " budget"]:
    """Places of the `budget` largest, rising; among equals the first."""
    return largest_of_rows(scores[None], torch.tensor([budget], device=scores.device))[1]


def _guess_cut(block: Tensor, share: float) -> Float[Tensor, ""]:
    """A value that about `share` of the block exceeds, read off a sample of its rows."""
    sample = block[:: max(1, len(block) // 64)].flatten()
    rank = int(share * len(sample)) if share < 1 else len(sample)
    return kth_largest(sample[None], rank + 1)[0] if rank < len(sample) else block.new_tensor(-torch.inf)


@torch.no_grad()
def top_of_columns(x: Tensor, w_enc: Tensor, b_enc: Tensor, budgets: Int[Tensor, " n_features"]) -> Selection:
    """The `budgets[f]` largest pre-activations of each feature `f`.

    Blocks run over features in the order of their budgets, so that the budgets of a block are alike.
    """
    tokens, features = [budgets.new_zeros(0)], [budgets.new_zeros(0)]
    scores = [x.new_zeros(0)]
    by_budget = budgets.argsort(descending=True, stable=True)
    if by := _epilogue(x):
        return _columns_by(by, x, w_enc, b_enc, budgets, by_budget)
    for members in by_budget.split(max(1, BLOCK_ELEMENTS // max(1, len(x)))):
        block = torch.addmm(b_enc[members, None], w_enc[members], x.T)  # (members, n_tokens)
        for part in _alike(budgets[members]):
            which, rows = largest_of_rows(block[part], budgets[members[part]])
            scores.append(block[part][which, rows])
            features.append(members[part][which])
            tokens.append(rows)
    return _by_token_then_feature(
        torch.cat(tokens), torch.cat(features), torch.cat(scores), n_tokens=len(x), n_features=len(w_enc)
    )


def _columns_by(
    by: ModuleType, x: Tensor, w_enc: Tensor, b_enc: Tensor, budgets: Tensor, by_budget: Tensor
) -> Selection:
    none = x.new_zeros(len(x))
    parts = []
    for part in _alike(budgets[by_budget]):
        members = by_budget[part]
        which, rows, scores = _largest_by(by, w_enc[members], x, none, budgets[members])
        features = members[which]
        parts.append((rows, features, scores + b_enc[features]))
    return _by_token_then_feature(
        *(torch.cat(part) for part in zip(*parts, strict=True)), n_tokens=len(x), n_features=len(w_enc)
    )


def _alike(falling: Int[Tensor, " members"]) -> Iterator[slice]:
    """Where budgets differ by less than a factor of two; those of nothing are left out."""
    octaves = falling[falling > 0].log2().floor()
    end = 0
    for length in octaves.unique_consecutive(return_counts=True)[1].tolist():
        end += length
        yield slice(end - length, end)


def _by_token_then_feature(
    tokens: Tensor, features: Tensor, scores: Tensor, *, n_tokens: int, n_features: int
) -> Selection:
    order = stable_order(features, n_features)
    order = order[stable_order(tokens[order], n_tokens)]
    return Selection(scores[order], features[order], _starts(tokens, n_tokens))


@torch.no_grad()
def above(x: Tensor, w_enc: Tensor, b_enc: Tensor, theta: Float[Tensor, " n_features"]) -> Selection:
    """All pre-activations strictly above their feature's threshold."""
    tokens, features, scores = [], [], []
    for start, block in _row_blocks(x, w_enc, b_enc):
        found = positions_above(block, theta)
        rows = found.div(len(w_enc), rounding_mode="floor")
        tokens.append(rows + start)
        features.append(found - rows * len(w_enc))
        scores.append(block.flatten()[found])
    return Selection(torch.cat(scores), torch.cat(features), _starts(torch.cat(tokens), len(x)))
