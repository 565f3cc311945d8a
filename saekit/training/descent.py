"""The end of a step: project, clip, Adam, unit norms, each block of rows in one visit to memory.

Equal to taking from the decoder's gradient what would only change the norms of its rows, `clip_grad_norm_`,
`torch.optim.Adam(fused=True)` and rows of unit norm in turn, but for the order in which the norm of the gradient
is summed. Those pass over weights, gradients and moments a dozen times, and all of it waits for memory.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from saekit.kernels import backend
from saekit.kernels.threads import ranges, side_by_side

# elements of a block: weight, gradient and two moments together fit the cache of one core
_BLOCK_ELEMENTS = 1 << 17


@torch.no_grad()
def descend(optimizer: torch.optim.Optimizer, *, lr: float, clip: float, unit_rows: Tensor) -> None:
    """Take one step of Adam down the gradients, and forget them.

    Args:
        lr: learning rate of this step.
        clip: largest norm of all gradients together.
        unit_rows: the parameter whose rows have unit norm and keep it: what of its gradient would only
            change their norms is removed, and rounding is undone afterwards.
    """
    (group,) = optimizer.param_groups
    group["lr"] = lr
    trained = [parameter for parameter in group["params"] if parameter.grad is not None]
    squares = [_square_of_gradient(parameter, project=parameter is unit_rows) for parameter in trained]
    norm = torch.stack(squares).sum().sqrt()
    factor = (clip / (norm + 1e-6)).clamp(max=1.0)
    for parameter in trained:
        _adam(optimizer, group, parameter, factor, normalise=parameter is unit_rows)
    optimizer.zero_grad()


def _square_of_gradient(parameter: Tensor, *, project: bool) -> Tensor:
    gradient = parameter.grad
    assert gradient is not None
    if _by_triton(parameter):
        from saekit.kernels import triton_descent

        return triton_descent.project(parameter, gradient, along=project)

    def squares(part: slice) -> Tensor:
        total = gradient.new_zeros(())
        for weight, grad in _blocks(part, parameter, gradient):
            if project:
                grad.addcmul_(weight, (grad * weight).sum(1, keepdim=True), value=-1)
            total += torch.linalg.vector_norm(grad).square()
        return total

    return torch.stack(side_by_side(squares, ranges(torch.atleast_1d(parameter)))).sum()


def _adam(optimizer: torch.optim.Optimizer, group: dict, parameter: Tensor, factor: Tensor, *, normalise: bool) -> None:
    state = optimizer.state[parameter]
    if not state:  # as torch.optim.Adam begins
        state["step"] = torch.zeros((), device=parameter.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    state["step"] += 1
    gradient = parameter.grad
    assert gradient is not None
    if _by_triton(parameter):
        from saekit.kernels import triton_descent

        triton_descent.adam(
            parameter, gradient, state["exp_avg"], state["exp_avg_sq"], factor=factor, lr=group["lr"],
            betas=group["betas"], eps=group["eps"], step=state["step"], normalise=normalise,
        )  # fmt: skip
        return

    def move(part: slice) -> None:
        for weight, grad, mean, square in _blocks(part, parameter, gradient, state["exp_avg"], state["exp_avg_sq"]):
            grad.mul_(factor)
            # what torch.optim.Adam(fused=True) calls, which takes whole parameters only
            torch.ops.aten._fused_adam_(
                [weight],
                [grad],
                [mean],
                [square],
                [],
                [state["step"]],
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=False,
            )
            if normalise:
                weight.div_(torch.linalg.vector_norm(weight, dim=1, keepdim=True).clamp_(min=1e-12))

    side_by_side(move, ranges(torch.atleast_1d(parameter)))


def _by_triton(parameter: Tensor) -> bool:
    """Whether the kernels, which read whole rows of float32, take this parameter and its gradient."""
    tensors = parameter, parameter.grad
    rows = parameter.ndim == 2 and all(t is not None and t.is_contiguous() for t in tensors)
    return rows and parameter.dtype == torch.float32 and backend.uses_triton(parameter.device)


def _blocks(part: slice, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each, a few at a time; all at once where there is no cache to mind."""
    inside = tuple(torch.atleast_1d(tensor)[part] for tensor in tensors)
    if inside[0].device.type != "cpu":
        yield inside
        return
    rows = max(1, _BLOCK_ELEMENTS // max(1, inside[0][:1].numel()))
    yield from zip(*(tensor.split(rows) for tensor in inside), strict=True)
