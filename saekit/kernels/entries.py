"""Encoding and decoding on the kept entries alone, with gradients that touch nothing else.

A training step needs one dense product, the encoder's. The rest is gathers and sums over the
`k * n_tokens` entries: `embedding_bag` sums weighted rows without writing the `(nnz, d_model)`
products, forwards over rows of the codes and backwards over their columns. Equal to `reference`.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag

from saekit.errors import ShapeError
from saekit.kernels import backend, memory
from saekit.kernels.dots import dots
from saekit.kernels.largest import stable_order
from saekit.kernels.reference import row_of_entry
from saekit.kernels.select import Selection
from saekit.kernels.threads import ranges, side_by_side

# features of a gradient that are summed at a time, to be copied from the cache
_BLOCK_ROWS = 512


def encode_entries(
    x: Tensor, w_enc: Tensor, b_enc: Tensor, selection: Selection, *, relu: bool = True
) -> Float[Tensor, " nnz"]:
    """The kept pre-activations, or their ReLU, differentiable in `x`, `w_enc` and `b_enc`."""
    return _EncodeEntries.apply(x, w_enc, b_enc, *selection, relu)


def shifted_bias(
    b_enc: Float[Tensor, " n_features"], centre: Float[Tensor, " d_model"], w_enc: Tensor
) -> Float[Tensor, " n_features"]:
    """`b_enc` as it is, with the gradient that `centre` has where `x - centre` is what the encoder reads.

    `w_enc @ (x - centre) + b_enc` sees `centre` as it sees `-w_enc @ centre` in the bias. That takes one product
    of the bias' gradient with the weights, where the gradient of every `x` would take a row per entry.
    """
    return _Shifted.apply(b_enc, centre, w_enc)


def decode_rows(
    values: Float[Tensor, " nnz"],
    features: Int[Tensor, " nnz"],
    row_starts: Int[Tensor, " rows"],
    w_dec: Float[Tensor, "n_features d_model"],
) -> Float[Tensor, "n_tokens d_model"]:
    """`codes.to_dense() @ w_dec`, differentiable in `values` and `w_dec`.

    Raises:
        ShapeError: if `w_dec` is strided; the sum reads it as one block of rows.
    """
    if not w_dec.is_contiguous():
        raise ShapeError(
            f"w_dec {tuple(w_dec.shape)} has strides {w_dec.stride()}, but decoding needs whole rows in memory; "
            "store it as (n_features, d_model), or pass w_dec.contiguous()"
        )
    return _DecodeRows.apply(values, features, row_starts, w_dec)


def _weighted_rows(rows: Tensor, weights: Tensor, starts: Tensor, table: Tensor) -> Tensor:
    """`out[b]` = sum of `weights[i] * table[rows[i]]` over the slice of bag `b`."""
    if backend.uses_triton(table.device):
        from saekit.kernels import triton_rows

        return triton_rows.weighted_rows(rows, weights, starts, table)
    if len(rows) == 0:  # embedding_bag reads the first entry even when there is none
        return table.new_zeros(len(starts) - 1, table.shape[1])
    return embedding_bag(rows, table, starts[:-1], mode="sum", per_sample_weights=weights)


def _columns(features: Tensor, n_features: int) -> tuple[Tensor, Tensor]:
    """Order of the entries by feature, and where each feature's entries begin."""
    starts = torch.zeros(n_features + 1, dtype=torch.int64, device=features.device)
    torch.cumsum(torch.bincount(features, minlength=n_features), 0, out=starts[1:])
    return stable_order(features, n_features), starts


def weight_gradient(grad: Tensor, tokens: Tensor, features: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """`out[f]` = sum of `grad[i] * x[tokens[i]]` over the entries of feature `f`, a row of `weight`."""
    order, starts = _columns(features, len(weight))
    tokens, grad = tokens[order], grad[order]
    if not memory.is_large(weight) or x.dtype != weight.dtype:
        return _weighted_rows(tokens, grad, starts, x)
    out = memory.gradient_of(weight)

    def fill(part: slice) -> None:
        for first in range(part.start, part.stop, _BLOCK_ROWS):
            rows = slice(first, min(first + _BLOCK_ROWS, part.stop))
            inside = starts[rows.start : rows.stop + 1]
            own = slice(int(inside[0]), int(inside[-1]))
            out[rows] = _weighted_rows(tokens[own], grad[own], inside - own.start, x)

    side_by_side(fill, ranges(weight))
    return out


class _Shifted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, b_enc: Tensor, centre: Tensor, w_enc: Tensor):
        ctx.save_for_backward(w_enc)
        return b_enc.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        (w_enc,) = ctx.saved_tensors
        return grad, -(grad @ w_enc) if ctx.needs_input_grad[1] else None, None


class _EncodeEntries(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w_enc: Tensor,
        b_enc: Tensor,
        scores: Tensor,
        features: Tensor,
        row_starts: Tensor,
        relu: bool,
    ):
        values = scores.relu() if relu else scores.clone()
        ctx.relu = relu
        ctx.save_for_backward(x, w_enc, values, features, row_starts)
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        x, w_enc, values, features, row_starts = ctx.saved_tensors
        grad = grad * (values > 0) if ctx.relu else grad
        need_x, need_w, need_b = ctx.needs_input_grad[:3]
        grad_x = grad_w = grad_b = None
        if need_x:
            grad_x = _weighted_rows(features, grad, row_starts, w_enc)
        if need_w:
            tokens = row_of_entry(row_starts, len(features))
            grad_w = weight_gradient(grad, tokens, features, x.contiguous(), w_enc)
        if need_b:
            grad_b = grad.new_zeros(len(w_enc)).index_add_(0, features, grad)
        return grad_x, grad_w, grad_b, None, None, None, None


class _DecodeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, features: Tensor, row_starts: Tensor, w_dec: Tensor):
        ctx.save_for_backward(values, features, row_starts, w_dec)
        return _weighted_rows(features, values, row_starts, w_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        values, features, row_starts, w_dec = ctx.saved_tensors
        grad = grad.contiguous()
        grad_values = grad_w = None
        if ctx.needs_input_grad[0]:
            grad_values = dots(grad, w_dec, features, row_starts)
        if ctx.needs_input_grad[3]:
            tokens = row_of_entry(row_starts, len(features))
            grad_w = weight_gradient(values, tokens, features, grad, w_dec)
        return grad_values, None, None, grad_w
