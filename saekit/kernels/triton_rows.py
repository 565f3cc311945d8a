"""Triton: sums of weighted rows and scalar products at given places, the two operations that entries need.

Decoding is a sum over the rows of the codes, a weight gradient the same sum over their columns, and the
gradients of values and of inputs are the other operation or the first again. One program owns one sum, so there are
no float atomics and the same inputs give the same bits. Sums are float32 whatever the inputs are.

Tested under Triton's interpreter; no time on a GPU is claimed.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from saekit.kernels.backend import current

# entries read at a time, and numbers of each
_ENTRIES, _WIDTH = 16, 128
_TILE: dict[str, Any] = {"ENTRIES": _ENTRIES, "WIDTH": _WIDTH}


@triton.jit
def _weighted_rows_kernel(
    rows_ptr,  # (nnz,)
    weights_ptr,  # (nnz,)
    starts_ptr,  # (bags + 1,)
    table_ptr,  # (n_rows, width), contiguous
    out_ptr,  # (bags, width)
    width,
    ENTRIES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    bag = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = columns < width
    first, end = tl.load(starts_ptr + bag), tl.load(starts_ptr + bag + 1)
    total = tl.zeros([WIDTH], dtype=tl.float32)
    for entry in range(first, end, ENTRIES):
        entries = entry + tl.arange(0, ENTRIES)
        owned = entries < end
        # int64: rows * width can pass 2**31
        row = tl.load(rows_ptr + entries, mask=owned, other=0).to(tl.int64)
        weight = tl.load(weights_ptr + entries, mask=owned, other=0.0).to(tl.float32)
        places = row[:, None] * width + columns[None, :]
        values = tl.load(table_ptr + places, mask=owned[:, None] & inside[None, :], other=0.0)
        total += tl.sum(values.to(tl.float32) * weight[:, None], axis=0)
    tl.store(out_ptr + bag * width + columns, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _dots_kernel(
    left_ptr,  # (bags, width), contiguous
    right_ptr,  # (n_rows, width), contiguous
    rows_ptr,  # (nnz,)
    starts_ptr,  # (bags + 1,)
    out_ptr,  # (nnz,)
    width,
    ENTRIES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    bag = tl.program_id(0).to(tl.int64)
    first, end = tl.load(starts_ptr + bag), tl.load(starts_ptr + bag + 1)
    for entry in range(first, end, ENTRIES):
        entries = entry + tl.arange(0, ENTRIES)
        owned = entries < end
        row = tl.load(rows_ptr + entries, mask=owned, other=0).to(tl.int64)
        total = tl.zeros([ENTRIES], dtype=tl.float32)
        for start in range(0, width, WIDTH):
            columns = start + tl.arange(0, WIDTH)
            inside = columns < width
            left = tl.load(left_ptr + bag * width + columns, mask=inside, other=0.0).to(tl.float32)
            places = row[:, None] * width + columns[None, :]
            right = tl.load(right_ptr + places, mask=owned[:, None] & inside[None, :], other=0.0).to(tl.float32)
            total += tl.sum(right * left[None, :], axis=1)
        tl.store(out_ptr + entries, total.to(out_ptr.dtype.element_ty), mask=owned)


def weighted_rows(rows: Tensor, weights: Tensor, starts: Tensor, table: Tensor) -> Tensor:
    """`out[b]` = sum of `weights[i] * table[rows[i]]` over the slice of bag `b`."""
    table = table.contiguous()
    bags, width = len(starts) - 1, table.shape[1]
    out = table.new_empty(bags, width)
    if out.numel():
        grid = (bags, triton.cdiv(width, _WIDTH))
        with current(table):
            _weighted_rows_kernel[grid](rows, weights, starts, table, out, width, **_TILE)
    return out


def dots(left: Tensor, right: Tensor, right_rows: Tensor, row_starts: Tensor) -> Tensor:
    """`left[t] . right[right_rows[i]]` for every entry `i` of row `t`."""
    left, right = left.contiguous(), right.contiguous()
    out = left.new_empty(len(right_rows))
    if len(right_rows):
        grid = (len(left),)
        with current(left):
            _dots_kernel[grid](left, right, right_rows, row_starts, out, left.shape[1], **_TILE)
    return out
