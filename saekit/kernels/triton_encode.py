"""Triton: the encoder's product with an epilogue that keeps what reaches a cut, so that the product is never written.

Two passes over tiles of the product. The first writes only the largest of each tile's rows; the k-th
largest of those is a cut that at least k entries of a row reach. The second appends what reaches it to a compact
buffer, whose order is left to the scheduler and undone by sorting, and exact selection follows on these few. Mutual
Choice guesses its one cut from a sample and needs the second pass alone.

Inputs may be bfloat16; sums and cuts are float32. Tested under Triton's interpreter; no time on a GPU is claimed.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from saekit.kernels.backend import current
from saekit.kernels.largest import kept_candidates, kth_largest, largest_of_rows

Found = tuple[Int[Tensor, " found"], Int[Tensor, " found"], Float[Tensor, " found"]]
_ROWS, _COLUMNS, _DEPTH = 64, 64, 32
_TILE: dict[str, Any] = {"ROWS": _ROWS, "COLUMNS": _COLUMNS, "DEPTH": _DEPTH}
# entries that the buffer first has room for, per wanted one
_ROOM = 2


class Columns(NamedTuple):
    """One side of the product: `(n_columns, d)`, and what is added to each column's scores."""

    exact: Float[Tensor, "n_columns d"]
    bias: Float[Tensor, " n_columns"]

    @classmethod
    def of(cls, exact: Float[Tensor, "n_columns d"], bias: Float[Tensor, " n_columns"]) -> "Columns":
        return cls(exact.contiguous(), bias.contiguous())


@triton.jit
def _tile(
    left_ptr,
    right_ptr,
    bias_ptr,
    n_rows,
    n_columns,
    depth,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """One tile of `left @ right.T + bias` in float32, -inf outside, with its rows and columns."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for start in range(0, depth, DEPTH):
        k = start + tl.arange(0, DEPTH)
        left = tl.load(
            left_ptr + rows[:, None] * depth + k[None, :],
            mask=(rows < n_rows)[:, None] & (k < depth)[None, :],
            other=0.0,
        )
        right = tl.load(
            right_ptr + columns[None, :] * depth + k[:, None],
            mask=(columns < n_columns)[None, :] & (k < depth)[:, None],
            other=0.0,
        )
        # not tf32: the cut is compared with what float32 gives
        total = tl.dot(left, right, total, input_precision="ieee")
    total += tl.load(bias_ptr + columns, mask=columns < n_columns, other=0.0).to(tl.float32)[None, :]
    inside = (rows < n_rows)[:, None] & (columns < n_columns)[None, :]
    return tl.where(inside, total, float("-inf")), rows, columns, inside


@triton.jit
def _maxima_kernel(
    left_ptr,  # (n_rows, depth), contiguous
    right_ptr,  # (n_columns, depth), contiguous
    bias_ptr,  # (n_columns,)
    out_ptr,  # (n_rows, tiles)
    n_rows,
    n_columns,
    depth,
    tiles,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    scores, rows, _, inside = _tile(left_ptr, right_ptr, bias_ptr, n_rows, n_columns, depth, ROWS, COLUMNS, DEPTH)
    # a maximum may pass over what is no number; infinity instead makes the host look
    scores = tl.where(inside & (scores != scores), float("inf"), scores)
    tl.store(out_ptr + rows * tiles + tl.program_id(1), tl.max(scores, axis=1), mask=rows < n_rows)


@triton.jit
def _append_kernel(
    left_ptr,  # (n_rows, depth), contiguous
    right_ptr,  # (n_columns, depth), contiguous
    bias_ptr,  # (n_columns,)
    cuts_ptr,  # (n_rows,)
    places_ptr,  # (room,) flat indices
    scores_ptr,  # (room,)
    count_ptr,  # (1,) how many entries reach their cut, also where there is no room for them
    n_rows,
    n_columns,
    depth,
    room,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    scores, rows, columns, inside = _tile(left_ptr, right_ptr, bias_ptr, n_rows, n_columns, depth, ROWS, COLUMNS, DEPTH)
    cuts = tl.load(cuts_ptr + rows, mask=rows < n_rows, other=float("inf"))
    hit = inside & (scores >= cuts[:, None])
    ones = hit.to(tl.int32)
    per_row = tl.sum(ones, axis=1)
    before = (tl.cumsum(per_row, axis=0) - per_row)[:, None] + tl.cumsum(ones, axis=1) - ones
    base = tl.atomic_add(count_ptr, tl.sum(per_row, axis=0))
    at = base + before
    fits = hit & (at < room)
    tl.store(places_ptr + at, rows[:, None] * n_columns + columns[None, :], mask=fits)
    tl.store(scores_ptr + at, scores, mask=fits)


def largest_of_products(rows: Float[Tensor, "rows d"], columns: Columns, counts: Int[Tensor, " rows"]) -> Found:
    """The `counts[r]` largest of each row of `rows @ columns.T + bias`, by row, then column."""
    rows = rows.contiguous()
    most = int(counts.clamp(max=len(columns.exact)).max()) if len(rows) else 0
    if most == 0 or triton.cdiv(len(columns.exact), _COLUMNS) < most:  # too few tiles to read a cut off
        return _exactly(rows, columns, counts)
    maxima = _maxima(rows, columns)
    if bool((maxima == torch.inf).any()):
        return _exactly(rows, columns, counts)
    place, scores = _append(rows, columns, kth_largest(maxima, most), room=_ROOM * int(counts.sum()))
    owner = place.div(len(columns.exact), rounding_mode="floor")
    kept = kept_candidates(scores, owner, counts)
    return owner[kept], (place - owner * len(columns.exact))[kept], scores[kept]


def products_above(
    rows: Float[Tensor, "rows d"], columns: Columns, cut: Float[Tensor, ""], *, expected: int
) -> Found | None:
    """All entries of `rows @ columns.T + bias` above `cut`, by row, then column; None for a cut that is no number.

    Args:
        expected: about how many there are; another number costs a second pass, nothing else.
    """
    if not bool(cut.isfinite()):
        return None
    cuts = cut.float().expand(len(rows)).contiguous()
    place, scores = _append(rows.contiguous(), columns, cuts, room=_ROOM * expected)
    owner = place.div(len(columns.exact), rounding_mode="floor")
    above = scores > cut
    return owner[above], (place - owner * len(columns.exact))[above], scores[above]


def _maxima(rows: Tensor, columns: Columns) -> Float[Tensor, "rows tiles"]:
    tiles = triton.cdiv(len(columns.exact), _COLUMNS)
    out = torch.empty(len(rows), tiles, device=rows.device)
    grid = (triton.cdiv(len(rows), _ROWS), tiles)
    sizes = len(rows), len(columns.exact), rows.shape[1]
    with current(rows):
        _maxima_kernel[grid](rows, columns.exact, columns.bias, out, *sizes, tiles, **_TILE)
    return out


def _append(rows: Tensor, columns: Columns, cuts: Tensor, *, room: int) -> tuple[Tensor, Tensor]:
    """Flat places, rising, and scores of what reaches its row's cut; again where there was too little room."""
    sizes = len(rows), len(columns.exact), rows.shape[1]
    grid = (triton.cdiv(len(rows), _ROWS), triton.cdiv(len(columns.exact), _COLUMNS))
    places = torch.empty(room, dtype=torch.int64, device=rows.device)
    scores = torch.empty(room, device=rows.device)
    count = torch.zeros(1, dtype=torch.int32, device=rows.device)
    if len(rows) and len(columns.exact):
        with current(rows):
            _append_kernel[grid](
                rows, columns.exact, columns.bias, cuts, places, scores, count, *sizes, room,
                **_TILE
            )  # fmt: skip
    found = int(count)
    if found > room:
        return _append(rows, columns, cuts, room=found)
    order = places[:found].argsort()
    return places[:found][order], scores[:found][order]


def _exactly(rows: Tensor, columns: Columns, counts: Tensor) -> Found:
    scores = torch.addmm(columns.bias, rows, columns.exact.T).float()
    owner, column = largest_of_rows(scores, counts)
    return owner, column, scores[owner, column]
