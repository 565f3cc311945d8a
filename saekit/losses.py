"""What training minimises. Pure functions; none of them keeps state or reads a config.

`fvu` is the main loss up to scale. `aux_k_loss` (Gao et al., arXiv 2406.04093) and `aux_zipf_loss` ask a
set of unused features to explain what the kept ones left over; they differ only in who is in the set.
That `aux_zipf_loss` generalises `aux_k_loss` and serves dead and under-used features alike is stated of
arXiv 2411.02124; the formula is our reconstruction.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from saekit.codes import SparseCodes
from saekit.density import RunningDensity, dead, expected_density, underused, zipf_fit
from saekit.errors import SaekitError
from saekit.revival import Members, Unexplained, explain_by_feature, explain_by_token
from saekit.sae import SAE
from saekit.selection import FeatureChoice


def fvu(x: Float[Tensor, "n_tokens d_model"], x_hat: Float[Tensor, "n_tokens d_model"]) -> Float[Tensor, ""]:
    """Fraction of variance unexplained: squared error over squared distance from the batch mean.

    0 is perfect, 1 is what predicting the mean of the batch would reach. Explained variance is `1 - fvu`.
    """
    return (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()


def normalised_mse(x: Float[Tensor, "n_tokens d_model"], x_hat: Float[Tensor, "n_tokens d_model"]) -> Float[Tensor, ""]:
    """Mean over tokens of squared error over squared norm: every token counts the same, large or small."""
    return ((x - x_hat).square().sum(1) / x.square().sum(1)).mean()


def summed_mse(x: Float[Tensor, "n_tokens d_model"], x_hat: Float[Tensor, "n_tokens d_model"]) -> Float[Tensor, ""]:
    """Mean over tokens of squared error summed over dimensions."""
    return _SummedMSE.apply(x, x_hat)


class _SummedMSE(torch.autograd.Function):
    """By hand, since autograd would keep and visit several tensors of this size where one will do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, x_hat: Tensor):
        error = x_hat - x
        ctx.save_for_backward(error)
        return torch.linalg.vector_norm(error).square() / len(error)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):  # type: ignore[override]
        (error,) = ctx.saved_tensors
        slope = error * (2 * grad / len(error))
        return -slope if ctx.needs_input_grad[0] else None, slope


@dataclass(frozen=True, kw_only=True, slots=True)
class AuxK:
    """Which features `aux_k_loss` asks, and how much it counts (Gao et al., arXiv 2406.04093).

    Attributes:
        weight: of the loss beside the main one.
        k_aux: features asked per token; None is half of d_model.
        dead_after: tokens without firing that make a feature dead; None lets the training run decide.
        bf16, sample: see `AuxZipf`.
    """

    weight: float = 1 / 32
    k_aux: int | None = None
    dead_after: int | None = None
    bf16: bool = False
    sample: float = 1.0

    def __post_init__(self) -> None:
        _check_common(self)


@dataclass(frozen=True, kw_only=True, slots=True)
class AuxZipf:
    """Which features `aux_zipf_loss` asks, and how. Every field is a choice of ours: the paper's are not known.

    Attributes:
        weight: of the loss beside the main one.
        k_aux: features asked per token; None is half of d_model.
        dead_after: tokens without firing that make a feature dead; None lets the training run decide.
        below: share of its expected density under which a feature is under-used. 0 leaves only the dead.
        curve: what density is expected of a rank: "fitted" is the Zipf line through the densities of this
            dictionary; a `FeatureChoice` without floor expects its own budgets, divided by the batch.
        least_count: a feature is judged only if the curve expects that many firings of it within the running
            average's horizon; fewer would be noise. The dead are judged by `dead_after` alone.
        most_members: largest share of the dictionary that takes part, so that the start of a run, when nearly all
            are under-used, does not ask everybody: the dead first, in the order of their indices, then those
            furthest under the curve.
        shrink: count the loss less where fewer features than `k_aux` take part, so that a few do not dominate.
        claim: "token": each token takes its `k_aux` strongest members. "feature": each member takes as many
            of its strongest tokens as its density is behind the curve, at least one.
        bf16: make this loss and its gradient from numbers rounded to bfloat16, on CPUs where that is fast, and where
            dense products pay: while at most eight times `k_aux` members take part. The main loss and what is kept
            of the codes stay exact.
        sample: share of a batch's tokens that this loss is measured on, the first ones: a fair sample where batches
            are shuffled, as those of training are. The loss costs that share, and its gradient is noisier.
        warmup: training tokens before this loss begins; None is `dead_after`: until a feature has had the time to
            fire, nobody is dead or under-used.

    Not fields, since nothing else was found to be worth a choice: entries that the main codes keep do not count among
    a token's `k_aux`; the explanation is decoded without bias; 1 is the loss of explaining nothing but the mean.
    """

    weight: float = 1 / 32
    k_aux: int | None = None
    dead_after: int | None = None
    below: float = 0.5
    curve: Literal["fitted"] | FeatureChoice = "fitted"
    least_count: float = 10.0
    most_members: float = 0.5
    shrink: bool = True
    claim: Literal["token", "feature"] = "token"
    bf16: bool = False
    sample: float = 1.0
    warmup: int | None = None

    def __post_init__(self) -> None:
        if not (0 <= self.below <= 1 and 0 < self.most_members <= 1):
            raise SaekitError(
                f"AuxZipf got below={self.below}, most_members={self.most_members}; both are shares: give below from 0 "
                "to 1, most_members above 0 and up to 1"
            )
        if self.curve != "fitted" and self.curve.floor:
            raise SaekitError(
                f"AuxZipf got curve={self.curve}, whose floor counts tokens of a batch, and the curve is of densities; "
                "leave floor away"
            )
        if self.bf16 and self.claim == "feature":
            raise SaekitError('AuxZipf(claim="feature") has no dense product to round; leave bf16 or the claim away')
        _check_common(self)
        if self.warmup is not None and self.warmup < 0:
            raise SaekitError(f"AuxZipf got warmup={self.warmup}; give a number of tokens, 0 to begin at once")


def _check_common(options: AuxK | AuxZipf) -> None:
    name = type(options).__name__
    if not 0 <= options.weight < math.inf:
        raise SaekitError(f"{name} got weight={options.weight}; give 0 or more")
    for field in ("k_aux", "dead_after"):
        number = getattr(options, field)
        if number is not None and number < 1:
            raise SaekitError(f"{name} got {field}={number}; give at least 1, or None for the default")
    if not 0 < options.sample <= 1:
        raise SaekitError(f"sample={options.sample} is no share of a batch's tokens; give more than 0 and at most 1")


def aux_k_loss(
    sae: SAE,
    x: Float[Tensor, "n_tokens d_model"],
    codes: SparseCodes,
    *,
    density: RunningDensity,
    options: AuxK,
    residual: Float[Tensor, "n_tokens d_out"] | None = None,
) -> Float[Tensor, ""]:
    """How badly the `k_aux` strongest dead features of each token explain the error of the live ones.

    Args:
        residual: what `codes` left over, if it is known already or the target is not `x`.

    Returns:
        squared error over the squared distance of the error from its mean (1 = no better than the
        mean), times the share of `k_aux` that is dead; zero if no feature is dead, or no error left.
    """
    return aux_zipf_loss(sae, x, codes, density=density, options=only_the_dead(options), residual=residual)


def only_the_dead(options: AuxK) -> AuxZipf:
    """The options under which `aux_zipf_loss` is `aux_k_loss`."""
    return AuxZipf(
        weight=options.weight,
        k_aux=options.k_aux,
        dead_after=options.dead_after,
        below=0.0,
        most_members=1.0,
        bf16=options.bf16,
        sample=options.sample,
    )


def aux_zipf_loss(
    sae: SAE,
    x: Float[Tensor, "n_tokens d_model"],
    codes: SparseCodes,
    *,
    density: RunningDensity,
    options: AuxZipf,
    residual: Float[Tensor, "n_tokens d_out"] | None = None,
    members: Members | None = None,
) -> Float[Tensor, ""]:
    """`aux_k_loss` with under-used features beside the dead ones; see `AuxZipf` for who they are.

    With `below=0` and `most_members=1` this is `aux_k_loss`, which is the sense in which it generalises it.

    Args:
        residual: what `codes` left over, if it is known already or the target is not `x`.
        members: who takes part, if that is known already.
    """
    if members is None:
        members = Members.of(sae, revived_features(density, options))
    if len(members.features) == 0:
        return x.new_zeros(())
    k_aux = options.k_aux or max(1, sae.d_model // 2)
    if (n_sampled := math.ceil(options.sample * len(x))) < len(x):
        x, codes = x[:n_sampled], codes.select(torch.arange(n_sampled, device=x.device))
        residual = None if residual is None else residual[:n_sampled]
    with torch.no_grad():
        prepared, scale = sae.prepare(x)
        residual = x - sae.decode(codes, x) if residual is None else residual
    what = Unexplained(prepared, scale, residual.detach(), codes)
    if options.claim == "token":
        unexplained = explain_by_token(members, what, k_aux, bf16=options.bf16)
    else:
        expected = curve_density(density.density, options.curve)
        behind = (options.below * expected - density.density)[members.features]
        claims = (behind * len(x)).ceil().clamp(1, len(x)).to(torch.int64)
        unexplained = explain_by_feature(members, what, claims)
    return unexplained * min(1.0, len(members.features) / k_aux) if options.shrink else unexplained


def revived_features(density: RunningDensity, options: AuxZipf) -> Int[Tensor, " members"]:
    """Who takes part in `aux_zipf_loss`, by index."""
    return revivable(density, curve_density(density.density, options.curve), options).nonzero()[:, 0]


def curve_density(
    density: Float[Tensor, " n_features"], curve: Literal["fitted"] | FeatureChoice
) -> Float[Tensor, " n_features"]:
    """The density that the curve expects of each feature, by its rank among `density`."""
    if not isinstance(curve, FeatureChoice):
        return expected_density(density, zipf_fit(density))
    by_rank = curve.densities(len(density)).to(density)
    return torch.empty_like(density).scatter_(0, density.argsort(descending=True, stable=True), by_rank)


def revivable(
    density: RunningDensity, expected: Float[Tensor, " n_features"], options: AuxZipf
) -> Bool[Tensor, " n_features"]:
    """The features that `aux_zipf_loss` works on.

    Raises:
        SaekitError: if the options leave open when a feature is dead.
    """
    if options.dead_after is None:
        raise SaekitError("dead_after is None, which a training run resolves; give a number of tokens here")
    current = density.density
    measurable = expected * density.horizon * density.weight >= options.least_count
    is_dead = dead(density.tokens_since_fired, after=options.dead_after)
    members = is_dead | (measurable & underused(current, expected, below=options.below))
    most = int(options.most_members * len(current))
    if int(members.sum()) <= most:
        return members
    urgency = torch.where(is_dead, -1.0, current / expected.clamp(min=1e-30)).masked_fill(~members, torch.inf)
    return torch.zeros_like(members).index_fill_(0, urgency.argsort(stable=True)[:most], True)
