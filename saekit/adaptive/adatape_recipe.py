"""How the bundled AdaTape is made: parity of the number of ones, generated as it goes."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saekit.adaptive.adatape import AdaTape, AdaTapeConfig
from saekit.adaptive.stages import Stage, draw

PARITY = "parity"


@dataclass(frozen=True, kw_only=True, slots=True)
class AdaTapeRecipe:
    """Sizes and schedule of our miniature; the paper does not give its own.

    Attributes:
        steps: with half as many the learning rate falls before most seeds have solved the task.
        impurity_weight: of the reading loss; the released code's.
    """

    seed: int = 0
    length: int = 16
    longest: int = 8
    tau: float = 2.0
    batch: int = 128
    steps: int = 2000
    learning_rate: float = 1e-3
    impurity_weight: float = 0.01

    @property
    def stages(self) -> tuple[Stage, ...]:
        return (
            Stage(
                name=PARITY, steps=self.steps, learning_rate=self.learning_rate, weight_decay=0.01, betas=(0.9, 0.99)
            ),
        )

    def build(self) -> AdaTape:
        return AdaTape(AdaTapeConfig(length=self.length, longest=self.longest, tau=self.tau), seed=self.seed)

    def loss(self, model: nn.Module, stage: Stage, step: int) -> tuple[Tensor, Mapping[str, float]]:
        symbols = sequences(self.batch, self.length, draw(self.seed, stage, step))
        labels = parity(symbols)
        run = model(symbols)
        total = nn.functional.cross_entropy(run.logits, labels) + self.impurity_weight * run.tape.impurity.mean()
        accuracy = float((run.logits.argmax(1) == labels).float().mean())
        return total, {"accuracy": accuracy, "tape": float(run.tape.length.float().mean())}


def sequences(n: int, length: int, generator: torch.Generator) -> Float[Tensor, "n length"]:
    """Symbols 1, 0 and -1, each as likely."""
    return torch.randint(-1, 2, (n, length), generator=generator).float()


def parity(symbols: Float[Tensor, "n length"]) -> Int[Tensor, " n"]:
    """The number of ones, modulo 2."""
    return (symbols == 1).sum(1) % 2
