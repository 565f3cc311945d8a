"""Product and selection in one, block by block: the dense pre-activations never exist whole.

One selection per rule: the k largest of each row (or of each group in it), the largest of the whole
matrix, the largest of each column, and all above a threshold. Each returns which entries were kept and their
pre-activations, in the order (token, feature); ties go to the larger value, then to the lower flat
index `token * n_features + feature`, exactly as a stable sort of the whole matrix would have it.
Selection has no gradient; `entries.encode_entries` attaches it.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from types import ModuleType
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.kernels import backend, screen
from saekit.kernels.largest import kth_largest, largest_of_rows, positions_above, stable_order
from saekit.kernels.threads import ranges, side_by_side

# elements of one block of pre-activations: 28 MB in float32, which stays in the cache of a large CPU, and is
# under the 32 MB from which on glibc asks the system for fresh pages each time
BLOCK_ELEMENTS = 7 << 20


class Selection(NamedTuple):
    """Kept entries in compressed-row form, with their raw pre-activations (before ReLU)."""

    scores: Float[Tensor, " nnz"]
    features: Int[Tensor, " nnz"]
    row_starts: Int[Tensor, " rows"]


def _blocks_of(part: slice, n_columns: int) -> list[slice]:
    """A range of rows in equal blocks: a small one at the end would be slow to multiply. One empty block of no rows."""
    most = max(1, BLOCK_ELEMENTS // max(1, n_columns))
    n_rows = part.stop - part.start
    size = max(1, -(-n_rows // max(1, -(-n_rows // most))))
    return [slice(start, min(start + size, part.stop)) for start in range(part.start, max(1, part.stop), size)]


def _row_blocks(x: Tensor, w_enc: Tensor, b_enc: Tensor, part: slice) -> Iterator[tuple[int, Tensor]]:
    """The first token of each block of a range, and its pre-activations, which the next block writes over."""
    blocks = _blocks_of(part, len(w_enc))
    buffer = x.new_empty(blocks[0].stop - blocks[0].start, len(w_enc))
    for block in blocks:
        rows = x[block]
        yield block.start, torch.addmm(b_enc, rows, w_enc.T, out=buffer[: len(rows)])


def _at(block: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """`block[rows, columns]` of a contiguous block, for less."""
    return block.flatten().index_select(0, rows * block.shape[1] + columns)


def _starts(rows: Int[Tensor, " nnz"], n_rows: int) -> Int[Tensor, " starts"]:
    starts = torch.zeros(n_rows + 1, dtype=torch.int64, device=rows.device)
    torch.cumsum(torch.bincount(rows, minlength=n_rows), 0, out=starts[1:])
    return starts


@torch.no_grad()
def top_of_rows(x: Tensor, w_enc: Tensor, b_enc: Tensor, k: int, *, by_size: bool = False) -> Selection:
    """The k largest pre-activations of each token; `by_size` the largest whatever their sign."""
    k = min(k, len(w_enc))
    if (by := _epilogue(x)) and not by_size:
        counts = torch.full((len(x),), k, device=x.device)
        _, features, scores = _largest_by(by, x, by.Columns.of(w_enc, b_enc), counts)
        return _same_number_per_row(scores, features, k, len(x))

    def largest(part: slice) -> list[tuple[Tensor, Tensor]]:
        kept = []
        for _, block in _row_blocks(x, w_enc, b_enc, part):
            counts = torch.full((len(block),), k, device=x.device)
            tokens, features = largest_of_rows(block.abs() if by_size else block, counts)
            kept.append((_at(block, tokens, features), features))
        return kept

    scores, features = _joined(side_by_side(largest, ranges(x)))
    return _same_number_per_row(scores, features, k, len(x))


def _joined(parts: Sequence[Sequence[tuple[Tensor, ...]]]) -> Iterator[Tensor]:
    """What blocks of several parts have found, one after the other."""
    return map(torch.cat, zip(*chain.from_iterable(parts), strict=True))


def _epilogue(x: Tensor) -> ModuleType | None:
    """What finds entries of a product without writing it in float32: a module with two functions; None for blocks."""
    if len(x) == 0:  # nothing to sample a cut from, or to launch on
        return None
    if backend.uses_triton(x.device):
        from saekit.kernels import triton_encode

        return triton_encode
    return screen if screen.is_screening(x) else None


def _largest_by(by: ModuleType, rows: Tensor, columns: Any, counts: Tensor) -> tuple[Tensor, ...]:
    """Row, column and score of the `counts` largest of each row of `rows @ columns.T + bias`, block by block.

    Args:
        columns: `by.Columns`, which takes a while to make, so once for all calls.
    """

    def largest(part: slice) -> list[tuple[Tensor, ...]]:
        found = []
        for block in _blocks_of(part, len(columns.exact)):
            owner, *rest = by.largest_of_products(rows[block], columns, counts[block])
            found.append((owner + block.start, *rest))
        return found

    return tuple(_joined(side_by_side(largest, ranges(rows))))


@torch.no_grad()
def top_of_groups(x: Tensor, w_enc: Tensor, b_enc: Tensor, n_groups: int) -> Selection:
    """The largest pre-activation of each token in each of `n_groups` equal runs of neighbouring features."""
    size = len(w_enc) // n_groups
    first = torch.arange(0, len(w_enc), size, device=x.device)

    def largest(part: slice) -> list[tuple[Tensor, Tensor]]:
        kept = []
        for _, block in _row_blocks(x, w_enc, b_enc, part):
            # of equals the first, which argmax does not promise
            groups = block.unflatten(1, (n_groups, size))
            is_largest = (groups == groups.amax(2, keepdim=True)) | groups.isnan()
            features = first + is_largest.to(torch.uint8).cumsum(2, dtype=torch.int32).eq(0).sum(2)
            kept.append((block.gather(1, features).flatten(), features.flatten()))
        return kept

    scores, features = _joined(side_by_side(largest, ranges(x)))
    return _same_number_per_row(scores, features, n_groups, len(x))


def _same_number_per_row(scores: Tensor, features: Tensor, k: int, n_tokens: int) -> Selection:
    return Selection(scores, features, torch.arange(n_tokens + 1, device=scores.device) * k)


@torch.no_grad()
def top_of_all(x: Tensor, w_enc: Tensor, b_enc: Tensor, budget: int) -> Selection:
    """The `budget` largest pre-activations of the whole batch.

    Candidates above a guessed cut are collected block by block. If they are at least `budget`, the
    exact selection is among them; if not, the guess was too high and a lower one is tried, at last none.
    NaN is above no cut and so passed over, where the definition ranks it first; a loss of such a batch is NaN anyway.
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

    def reaching(part: slice) -> list[tuple[Tensor, Tensor]]:
        cut = None
        found: list[tuple[Tensor, Tensor]] = []
        for start, block in _row_blocks(x, w_enc, b_enc, part):
            cut = _guess_cut(block, share) if cut is None else cut
            is_cut = bool(cut > -torch.inf)
            places = positions_above(block, cut) if is_cut else torch.arange(block.numel(), device=x.device)
            found.append((places + start * len(w_enc), block.flatten().index_select(0, places)))
            if sum(len(scores) for _, scores in found) > 2 * budget:
                positions, scores = _joined([found])
                kept = _first_largest(scores, budget)
                found = [(positions[kept], scores[kept])]
                cut = scores[kept].min()
        return found

    positions, scores = _joined(side_by_side(reaching, ranges(x)))
    return positions, scores


def _candidates_by(
    by: ModuleType, x: Tensor, w_enc: Tensor, b_enc: Tensor, share: float
) -> tuple[Tensor, Tensor] | None:
    most = max(1, BLOCK_ELEMENTS // max(1, len(w_enc)))
    sample = torch.nn.functional.linear(x[:: max(1, len(x) // 64)][:most], w_enc, b_enc)
    cut = _guess_cut(sample, share)
    prepared = by.Columns.of(w_enc, b_enc)

    def reaching(part: slice) -> list[tuple[Tensor, Tensor]] | None:
        found = []
        for block in _blocks_of(part, len(w_enc)):
            rows = x[block]
            above = by.products_above(rows, prepared, cut, expected=int(share * len(rows) * len(w_enc)) + 1)
            if above is None:
                return None
            found.append(((above[0] + block.start) * len(w_enc) + above[1], above[2]))
        return found

    parts = [found for found in side_by_side(reaching, ranges(x)) if found is not None]
    if len(parts) < len(ranges(x)):
        return None
    positions, scores = _joined(parts)
    return positions, scores


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
    by_budget = budgets.argsort(descending=True, stable=True)
    if by := _epilogue(x):
        return _columns_by(by, x, w_enc, b_enc, budgets, by_budget)

    equal = bool((budgets == budgets[:1]).all())  # then the order is that of the features, and no row need be gathered

    def largest(part: slice) -> list[tuple[Tensor, Tensor, Tensor]]:
        kept = [(budgets.new_zeros(0), budgets.new_zeros(0), x.new_zeros(0))]
        blocks = _blocks_of(part, len(x))
        buffer = x.new_empty(blocks[0].stop - blocks[0].start, len(x))
        for chosen in blocks:
            members = by_budget[chosen]
            rows = chosen if equal else members
            block = torch.addmm(b_enc[rows, None], w_enc[rows], x.T, out=buffer[: len(members)])
            for alike in _alike(budgets[members]):
                which, tokens = largest_of_rows(block[alike], budgets[members[alike]])
                kept.append((tokens, members[alike][which], _at(block[alike], which, tokens)))
        return kept

    return _by_token_then_feature(
        *_joined(side_by_side(largest, ranges(w_enc))), n_tokens=len(x), n_features=len(w_enc)
    )


def _columns_by(
    by: ModuleType, x: Tensor, w_enc: Tensor, b_enc: Tensor, budgets: Tensor, by_budget: Tensor
) -> Selection:
    tokens = by.Columns.of(x, x.new_zeros(len(x)))
    parts = []
    for part in _alike(budgets[by_budget]):
        members = by_budget[part]
        which, rows, scores = _largest_by(by, w_enc[members], tokens, budgets[members])
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

    def reaching(part: slice) -> list[tuple[Tensor, Tensor, Tensor]]:
        kept = []
        for start, block in _row_blocks(x, w_enc, b_enc, part):
            found = positions_above(block, theta)
            rows = found.div(len(w_enc), rounding_mode="floor")
            kept.append((rows + start, found - rows * len(w_enc), block.flatten().index_select(0, found)))
        return kept

    tokens, features, scores = _joined(side_by_side(reaching, ranges(x)))
    return Selection(scores, features, _starts(tokens, len(x)))
