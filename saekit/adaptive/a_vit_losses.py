"""What A-ViT is trained on beside its task: the ponder loss, and a prior on where in depth tokens stop.

All are of one forward pass. `H_l` is the mean halting score of layer l over images and tokens, the last layer's
raw score included; T is the prior.
"""

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.errors import SaekitError

Prior = Literal["paper", "code", "poisson"]


def ponder_loss(ponder: Float[Tensor, "batch tokens"]) -> Float[Tensor, ""]:
    """Mean of depth plus remainder over tokens, the class token included, and images."""
    return ponder.mean()


def target_depths(layers: int, target: float) -> Float[Tensor, " layers"]:
    """A Gaussian around layer `target` (counted from 1), of standard deviation 1, that adds up to 1."""
    if not 1 <= target <= layers:
        raise SaekitError(f"a target depth of {target} is outside a model of {layers} layers; give 1 to {layers}")
    weights = torch.exp(-0.5 * (torch.arange(1, layers + 1) - target).square())
    return weights / weights.sum()


def target_depths_of_code(layers: int, target: int) -> Float[Tensor, " layers"]:
    """The released code's: no distribution. Its peak is at index `target` (from 0), what is before adds up to 0.98."""
    density = torch.exp(-0.5 * (torch.arange(layers) - target).square()) / math.sqrt(2 * math.pi)
    return density * 0.98 / density[:target].sum()


def prior_loss(
    scores: Float[Tensor, "batch layers tokens"], *, prior: Prior, target: float, eps: float = 1e-8
) -> Float[Tensor, ""]:
    """How far the layers' mean halting scores are from the prior.

    paper    KL(H || T). H is taken as it is; whether the paper normalises it is not known.
    code     (1/L) KL(T || H) with H normalised and clamped to [0.01, 0.99], and a T that is no distribution,
             counted only where above 0, as the released code has it. Normalising makes it blind to whether
             anything halts at all.
    poisson  ours: sum of T log(T / H) - T + H, least exactly at H = T, so that it fixes shape and size.
    """
    mean = scores.mean((0, 2))
    layers = len(mean)
    if prior == "code":
        wanted = target_depths_of_code(layers, round(target)).to(mean)
        share = (mean / mean.sum()).clamp(0.01, 0.99)
        return (torch.xlogy(wanted, wanted) - wanted * share.log()).sum().div(layers).clamp(min=0)
    wanted = target_depths(layers, target).to(mean)
    mean = mean.clamp(min=eps)
    if prior == "paper":
        return (mean * (mean / wanted).log()).sum()
    return (wanted * (wanted / mean).log() - wanted + mean).sum()
