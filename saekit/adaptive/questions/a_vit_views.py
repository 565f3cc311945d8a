"""A-ViT: what the questions about it look at, layer by layer."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit.activations.batch import ActivationBatch
from saekit.adaptive.deciding import DecidingTarget
from saekit.adaptive.digits import MEAN, SPREAD
from saekit.adaptive.effects import strongest_by_effect
from saekit.adaptive.harvest import harvest, live_only, train_decision_sae
from saekit.adaptive.trace import DecisionTrace
from saekit.codes import SparseCodes
from saekit.sae import SAE

SCREENED = 256


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """Some images, and what the model decided about them."""

    images: Float[Tensor, "n channels height width"]
    labels: Int[Tensor, " n"]
    trace: DecisionTrace
    patch: int

    @property
    def ink(self) -> Float[Tensor, "n patches"]:
        """Mean level of each patch, from 0 to 1."""
        levels = (self.images * SPREAD + MEAN).mean(1, keepdim=True)
        return torch.nn.functional.avg_pool2d(levels, self.patch).flatten(1)


class View:
    """One layer's gate: an SAE on what it reads, and the live tokens of both halves."""

    def __init__(self, target: DecidingTarget, step: int, halves: tuple[Seen, Seen], *, tokens: int, seed: int):
        self.target, self.step, self.halves = target, step, halves
        self.sae: SAE = train_decision_sae(target, halves[0].images, step, n_features=192, tokens=tokens, seed=seed)
        self.batches: tuple[ActivationBatch, ...] = tuple(
            live_only(harvest(target, half.images, step)) for half in halves
        )

    @cached_property
    def codes(self) -> tuple[SparseCodes, ...]:
        with torch.no_grad():
            return tuple(self.sae.encode(batch.vectors) for batch in self.batches)

    @cached_property
    def chosen(self) -> int:
        """The feature whose ablation at the gate changes most decisions, on some training images."""
        images = self.halves[0].images[:SCREENED]
        return strongest_by_effect(self.target, images, self.sae, self.step, count=1)[0]

    def patches(self, half: int) -> Int[Tensor, " patches"]:
        """Which of the tokens are patches."""
        return (self.batches[half].position > 0).nonzero()[:, 0]

    def halts(self, half: int) -> Bool[Tensor, " patches"]:
        """Of each patch, whether it halts here."""
        batch = self.batches[half].select(self.patches(half))
        return self.halves[half].trace.decision[batch.document, self.step, batch.position] == 1

    def ink(self, half: int) -> Float[Tensor, " patches"]:
        batch = self.batches[half].select(self.patches(half))
        return self.halves[half].ink[batch.document, batch.position - 1]
