"""Triton: the end of a step on rows of weights, in two kernels.

The first takes from a row's gradient what would only change its norm, and sums its squares; the norm of all gradients,
and with it the clipping factor, is known when it is done. The second clips, takes Adam's step and brings the row back
to unit norm. One program owns a row, so nothing is added atomically and the same inputs give the same bits.

Tested under Triton's interpreter; no time on a GPU is claimed.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from saekit.kernels.backend import current


@triton.jit
def _project_kernel(
    weight_ptr,  # (n_rows, width), contiguous
    grad_ptr,  # (n_rows, width), contiguous; written over
    square_ptr,  # (n_rows,)
    width,
    PROJECT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    inside = columns < width
    grad = tl.load(grad_ptr + row * width + columns, mask=inside, other=0.0)
    if PROJECT:
        weight = tl.load(weight_ptr + row * width + columns, mask=inside, other=0.0)
        grad -= tl.sum(grad * weight, axis=0) * weight
        tl.store(grad_ptr + row * width + columns, grad, mask=inside)
    tl.store(square_ptr + row, tl.sum(grad * grad, axis=0))


@triton.jit
def _adam_kernel(
    weight_ptr,  # (n_rows, width), contiguous; written over, as are both moments
    grad_ptr,  # (n_rows, width), contiguous
    mean_ptr,
    square_ptr,
    factor_ptr,  # () the gradient is multiplied by it
    rate_ptr,  # () learning rate, less the bias of the mean
    spread_ptr,  # () what is left of the bias of the squares
    width,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    NORMALISE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, WIDTH)
    inside = columns < width
    at = row * width + columns
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0) * tl.load(factor_ptr)
    mean = tl.load(mean_ptr + at, mask=inside, other=0.0)
    square = tl.load(square_ptr + at, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0)
    mean += (grad - mean) * (1 - BETA1)
    square = square * BETA2 + grad * grad * (1 - BETA2)
    weight -= tl.load(rate_ptr) * mean / (tl.sqrt(square) / tl.load(spread_ptr) + EPS)
    if NORMALISE:
        weight /= tl.maximum(tl.sqrt(tl.sum(weight * weight, axis=0)), 1e-12)
    tl.store(weight_ptr + at, weight, mask=inside)
    tl.store(mean_ptr + at, mean, mask=inside)
    tl.store(square_ptr + at, square, mask=inside)


def project(weight: Float[Tensor, "n_rows width"], grad: Tensor, *, along: bool) -> Float[Tensor, ""]:
    """Sum of the squares of the gradient, of which (if `along`) what lies along its row of weights is taken first."""
    squares = torch.empty(len(weight), device=weight.device)
    fixed: dict[str, Any] = {"PROJECT": along}
    with current(weight):
        _project_kernel[(len(weight),)](weight, grad, squares, weight.shape[1], **fixed, **_tile(weight))
    return squares.sum()


def adam(
    weight: Float[Tensor, "n_rows width"],
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    *,
    factor: Float[Tensor, ""],
    lr: float,
    betas: tuple[float, float],
    eps: float,
    step: Float[Tensor, ""],
    normalise: bool,
) -> None:
    """Adam's step number `step` down `factor * grad`, in place; then rows of unit norm if they are to be normalised."""
    # no host ever reads the step: these stay on the device
    rate = (lr / (1 - betas[0] ** step.double())).float()
    spread = (1 - betas[1] ** step.double()).sqrt().float()
    fixed: dict[str, Any] = {"BETA1": betas[0], "BETA2": betas[1], "EPS": eps, "NORMALISE": normalise}
    tensors = weight, grad, mean, square, factor, rate, spread
    with current(weight):
        _adam_kernel[(len(weight),)](*tensors, weight.shape[1], **fixed, **_tile(weight))


def _tile(weight: Tensor) -> dict[str, Any]:
    return {"WIDTH": triton.next_power_of_2(weight.shape[1])}
