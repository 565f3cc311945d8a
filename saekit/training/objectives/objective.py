"""The protocol of objectives, and what several of them share."""

from collections.abc import Mapping
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from saekit.codes import SparseCodes
from saekit.sae import SAE

Vectors = Float[Tensor, "n_tokens d_model"]
Targets = Float[Tensor, "n_tokens d_out"]
Extra = Mapping[str, Tensor]
"""Trained tensors of an objective that the finished SAE does not have."""


class Measured(NamedTuple):
    """What an objective makes of a batch; the tensors carry gradients.

    Attributes:
        codes: of the batch.
        y_hat: the reconstruction of the target.
        loss: to be minimised, auxiliary losses aside: mean over tokens, summed over dimensions.
    """

    codes: SparseCodes
    y_hat: Targets
    loss: Float[Tensor, ""]


@runtime_checkable
class Objective(Protocol):
    """How codes are made during training, what is minimised, and what SAE comes of it. Pure."""

    finds_sparsity: ClassVar[bool]
    """Whether it decides itself which matches are kept; else the rule does."""
    fits_start: ClassVar[bool]
    """Whether a fresh encoder is first scaled to where the reconstruction fits best."""

    def extra(self, sae: SAE, sample: Vectors) -> dict[str, Tensor]:
        """Starting values of what is trained beside the SAE's own weights, given a sample of its inputs."""
        ...

    def measure(self, sae: SAE, extra: Extra, x: Vectors, y: Targets) -> Measured:
        """The codes of `x` and how well they serve to reconstruct `y`."""
        ...

    def finished(self, sae: SAE, extra: Extra) -> SAE:
        """An SAE that does by its weights and rule alone what `measure` did with `extra`."""
        ...


# an optimiser moves every number by about the learning rate; penalties' weights and thresholds have further to go
_HASTE = 5.0


def positive(trained: Tensor) -> Tensor:
    """The weight or the thresholds behind what is trained of them: `exp(5 * trained)`."""
    return (_HASTE * trained).exp()


def trained_of(value: Tensor) -> Tensor:
    """What is trained of positive numbers, so that they can move fast: a fifth of their logarithm."""
    return value.log() / _HASTE


def held_to(k: int, codes: SparseCodes, log_weight: Tensor, penalty: Tensor) -> Float[Tensor, ""]:
    """`exp(5 * log_weight) * penalty`, with a weight that rises while more than `k` features are active per token.

    The gradient that `log_weight` gets is `log(k / l0)` and not that of the penalty, so that an optimiser
    which descends raises the weight of a penalty that does too little, and lowers it where it does too much.
    Objectives that penalise activity are so held to the same sparsity as rules with a budget. (Our choice;
    the papers tune the weight by hand.)
    """
    l0 = (codes.values.detach() != 0).sum() / max(1, codes.n_tokens)
    too_many = (l0.clamp(min=0.1) / k).log().to(penalty)
    return positive(log_weight.detach()) * penalty - too_many * (log_weight - log_weight.detach())


def start_weight(like: Tensor, value: float = 1.0) -> Tensor:
    """A penalty's first weight, as something to be trained."""
    return trained_of(torch.tensor(value)).to(like)
