"""Triton: decoding, squared error and the gradients of the values in one kernel.

One program owns a token: it sums the decoder rows of its entries, takes what they leave over, and goes over the same
rows once more, which are in the cache by then, for their products with it. Nothing of `(nnz, d_model)` is written.
The gradient of the decoder needs the entries by feature, and is the sum that `entries` makes.

Tested under Triton's interpreter; no time on a GPU is claimed.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from saekit.kernels.backend import current
from saekit.kernels.entries import weight_gradient
from saekit.kernels.reference import row_of_entry

# entries read at a time; a whole row of the decoder is in registers with each
_ENTRIES = 4


@triton.jit
def _reconstruct_kernel(
    values_ptr,  # (nnz,)
    features_ptr,  # (nnz,)
    starts_ptr,  # (n_tokens + 1,)
    w_dec_ptr,  # (n_features, width), contiguous
    b_dec_ptr,  # (width,)
    target_ptr,  # (n_tokens, width), contiguous
    error_ptr,  # (n_tokens, width)
    square_ptr,  # (n_tokens,)
    slope_ptr,  # (nnz,)
    width,
    ENTRIES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    inside = columns < width
    first, end = tl.load(starts_ptr + token), tl.load(starts_ptr + token + 1)
    error = tl.load(b_dec_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    error -= tl.load(target_ptr + token * width + columns, mask=inside, other=0.0).to(tl.float32)
    for entry in range(first, end, ENTRIES):
        entries = entry + tl.arange(0, ENTRIES)
        owned = entries < end
        feature = tl.load(features_ptr + entries, mask=owned, other=0).to(tl.int64)
        value = tl.load(values_ptr + entries, mask=owned, other=0.0).to(tl.float32)
        places = feature[:, None] * width + columns[None, :]
        rows = tl.load(w_dec_ptr + places, mask=owned[:, None] & inside[None, :], other=0.0).to(tl.float32)
        error += tl.sum(rows * value[:, None], axis=0)
    tl.store(error_ptr + token * width + columns, error.to(error_ptr.dtype.element_ty), mask=inside)
    tl.store(square_ptr + token, tl.sum(error * error, axis=0))
    for entry in range(first, end, ENTRIES):
        entries = entry + tl.arange(0, ENTRIES)
        owned = entries < end
        feature = tl.load(features_ptr + entries, mask=owned, other=0).to(tl.int64)
        places = feature[:, None] * width + columns[None, :]
        rows = tl.load(w_dec_ptr + places, mask=owned[:, None] & inside[None, :], other=0.0).to(tl.float32)
        slope = tl.sum(rows * error[None, :], axis=1)
        tl.store(slope_ptr + entries, slope.to(slope_ptr.dtype.element_ty), mask=owned)


def reconstruct(
    values: Float[Tensor, " nnz"],
    features: Int[Tensor, " nnz"],
    row_starts: Int[Tensor, " rows"],
    w_dec: Float[Tensor, "n_features d_model"],
    b_dec: Float[Tensor, " d_model"],
    target: Float[Tensor, "n_tokens d_model"],
) -> tuple[Float[Tensor, ""], Float[Tensor, "n_tokens d_model"]]:
    """Squared error of `codes.to_dense() @ w_dec + b_dec`, summed over dimensions, mean over tokens; and the errors.

    The first is differentiable in `values`, `w_dec` and `b_dec`. The errors, reconstruction less target, are not, and
    the target is a constant.
    """
    return _Reconstruct.apply(values, features, row_starts, w_dec, b_dec, target)


class _Reconstruct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, features: Tensor, row_starts: Tensor, w_dec: Tensor, b_dec: Tensor, target: Tensor
    ):
        n_tokens, width = target.shape
        target = target.contiguous()
        error, slopes = torch.empty_like(target), torch.empty_like(values)
        squares = torch.empty(n_tokens, device=target.device)
        if n_tokens:
            tile: dict[str, Any] = {"ENTRIES": _ENTRIES, "WIDTH": triton.next_power_of_2(width)}
            with current(target):
                _reconstruct_kernel[(n_tokens,)](
                    values, features, row_starts, w_dec.contiguous(), b_dec, target, error, squares, slopes, width,
                    **tile
                )  # fmt: skip
        ctx.save_for_backward(values, features, row_starts, w_dec, error, slopes)
        ctx.mark_non_differentiable(error)
        return squares.sum() / max(1, n_tokens), error

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor):  # type: ignore[override]
        values, features, row_starts, w_dec, error, slopes = ctx.saved_tensors
        scale = (2 * grad / max(1, len(error))).to(values.dtype)
        grad_values = grad_w = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_values = slopes * scale
        if ctx.needs_input_grad[3]:
            tokens = row_of_entry(row_starts, len(features))
            grad_w = weight_gradient(values * scale, tokens, features, error, w_dec)
        if ctx.needs_input_grad[4]:
            grad_b = error.sum(0) * scale
        return grad_values, None, None, grad_w, grad_b, None
