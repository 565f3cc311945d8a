"""JumpReLU SAEs (Rajamanoharan et al., arXiv 2407.14435): thresholds are trained, and sparsity is penalised directly.

    h       = u @ W_enc + b_enc
    a       = h where h > theta, else 0
    loss    = |y - y_hat|^2 + weight * penalty

The jump has no useful gradient in theta, so one is estimated from the entries within half a `bandwidth` of
their threshold: `da/dtheta = -theta / bandwidth` and `d[h > theta]/dtheta = -1 / bandwidth` there.

What is trained is `log(theta) / 5`, so that thresholds move five times as fast as the optimiser moves a number (our
choice). Otherwise they do not keep up with an encoder that grows within some hundred steps, and sparsity ends elsewhere
than asked for.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from saekit.codes import SparseCodes
from saekit.kernels.entries import encode_entries
from saekit.kernels.select import above, top_of_all
from saekit.losses import summed_mse
from saekit.sae import SAE
from saekit.selection import Threshold, check_k
from saekit.training.objectives.objective import (
    Extra,
    Measured,
    Targets,
    Vectors,
    held_to,
    positive,
    start_weight,
    trained_of,
)

# a cut that no activation reaches, in the units of training, whose logarithm still has a gradient
_NEVER = 1e6


@dataclass(frozen=True, slots=True)
class JumpReLU:
    """Thresholds learn how many features are worth having.

    Attributes:
        k: mean number of active features per token to aim at.
        penalty: "step" counts active features; "tanh" sums `tanh(a / theta)`, a count that grows gradually
            and so has a gradient in the activations too (after Anthropic's update of January 2025).
        bandwidth: width of the window in which the gradient of a threshold is estimated, in the units of
            training, where inputs have unit variance per dimension.
    """

    k: int
    penalty: Literal["step", "tanh"] = "step"
    bandwidth: float = 0.5

    finds_sparsity: ClassVar[bool] = True
    fits_start: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_k(type(self).__name__, self.k)

    def extra(self, sae: SAE, sample: Vectors) -> dict[str, Tensor]:
        prepared, _ = sae.prepare(sample)
        if isinstance(sae.rule, Threshold) and torch.as_tensor(sae.rule.theta).max() > 0:
            theta = sae.rule.per_feature(sae.n_features, prepared)
        else:
            theta = top_of_all(prepared, sae.encoder, sae.b_enc, round(self.k * len(sample))).scores.min()
        # the logarithm keeps thresholds positive; a feature that was granted nothing has no finite cut
        log_theta = trained_of(theta.clamp(1e-3, _NEVER)).expand(sae.n_features).clone()
        return {
            "log_theta": log_theta,
            "log_weight": start_weight(sample, self._balanced_weight(sae, log_theta, sample)),
        }

    def measure(self, sae: SAE, extra: Extra, x: Vectors, y: Targets) -> Measured:
        codes, y_hat, active = self._parts(sae, extra["log_theta"], x)
        penalty = held_to(self.k, codes, extra["log_weight"], active)
        return Measured(codes, y_hat, summed_mse(y, y_hat) + penalty)

    def _parts(self, sae: SAE, log_theta: Tensor, x: Vectors) -> tuple[SparseCodes, Targets, Tensor]:
        """Codes, reconstruction and penalty of a batch."""
        prepared, scale = sae.prepare(x)
        theta = positive(log_theta)
        reach = (theta.detach() - self.bandwidth / 2).clamp(min=0)
        near = above(prepared, sae.encoder, sae.b_enc, reach)
        h = encode_entries(prepared, sae.encoder, sae.b_enc, near, relu=False)
        cut = theta[near.features]
        values: Tensor = Jump.apply(h, cut, self.bandwidth)  # pyright: ignore[reportAssignmentType]
        if self.penalty == "step":
            active: Tensor = Step.apply(h, cut, self.bandwidth)  # pyright: ignore[reportAssignmentType]
        else:
            active = (values / cut).tanh()
        codes = SparseCodes(values, near.features, near.row_starts, sae.n_features)
        if scale is not None:
            codes = codes.with_values(values * scale[:, 0][codes.token_of_entry()])
        return codes, sae.decode(codes, x), active.sum() / len(x)

    def _balanced_weight(self, sae: SAE, log_theta: Tensor, sample: Vectors) -> float:
        """The penalty's weight at which thresholds that are right already would, taken together, stay.

        Of an autoencoder; a transcoder's targets are not at hand here, and its weight finds itself.
        """
        if sae.cfg.is_transcoder:
            return 1.0
        with torch.enable_grad():
            moved = log_theta.detach().requires_grad_()
            _, y_hat, active = self._parts(sae, moved, sample)
            (down,) = torch.autograd.grad(summed_mse(sample, y_hat), moved, retain_graph=True)
            (up,) = torch.autograd.grad(active, moved)
        weight = -float(down.sum() / up.sum())
        return weight if weight > 0 else 1.0

    def finished(self, sae: SAE, extra: Extra) -> SAE:
        return sae.with_rule(Threshold(positive(extra["log_theta"].detach())))


class Jump(torch.autograd.Function):
    """`h` where it exceeds its threshold, else 0; both `(nnz,)`."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(h, theta)
        ctx.bandwidth = bandwidth
        return torch.where(h > theta, h, 0.0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        h, theta = ctx.saved_tensors
        return grad * (h > theta), -theta * _window(h, theta, ctx.bandwidth) * grad, None


class Step(torch.autograd.Function):
    """1 where `h` exceeds its threshold, else 0; both `(nnz,)`. The gradient reaches the threshold alone."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(h, theta)
        ctx.bandwidth = bandwidth
        return (h > theta).to(h)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        h, theta = ctx.saved_tensors
        return None, -_window(h, theta, ctx.bandwidth) * grad, None


def _window(h: Tensor, theta: Tensor, bandwidth: float) -> Tensor:
    """The estimate of the density of `h` at `theta`: a rectangle of area 1."""
    return ((h - theta).abs() < bandwidth / 2) / bandwidth
