"""How the bundled A-ViT is made: a plain vision transformer on digits, then halting, and a control without it."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal, cast

import torch
from torch import Tensor, nn

from saekit.adaptive.a_vit import AViT, AViTConfig
from saekit.adaptive.a_vit_channel import least_needed_channel, swap_channels
from saekit.adaptive.a_vit_losses import Prior, ponder_loss, prior_loss, target_depths
from saekit.adaptive.digits import LabelledImages, load_digits, on_canvas
from saekit.adaptive.stages import Stage, draw

PLAIN, CONTROL, HALTING = "plain", "control", "halting"
CHOOSING = 400  # images by which the channel is chosen


@dataclass(frozen=True, kw_only=True, slots=True)
class AViTRecipe:
    """A miniature of the paper's recipe (there: ImageNet, from a public checkpoint, 100 epochs).

    Stage `plain` trains at full depth; from its end, `halting` goes on with the paper's losses and `control`
    as long without them, so that both have seen the same. No mixup, as the paper says.

    Attributes:
        target: mean depth asked for, of `layers`.
        ponder_weight, prior_weight: the paper's, as re-implementations give them.
        prior: ours by default: the other two do not bind the size of the scores (`prior_loss`).
        channel: what becomes channel 0, which the gate reads: the plain model's first as it is (the paper's), or
            the one that says best how little a patch is needed (ours, `least_needed_channel`).
    """

    seed: int = 0
    width: int = 48
    layers: int = 6
    canvas: int = 16
    patch: int = 2
    channels: int = 1
    batch: int = 49
    plain_epochs: int = 80
    halting_epochs: int = 20
    learning_rate: float = 3e-3
    halting_learning_rate: float = 1e-3
    target: float = 2.0
    ponder_weight: float = 5e-4
    prior_weight: float = 0.1
    prior: Prior = "poisson"
    channel: Literal["first", "least needed"] = "least needed"

    @property
    def images(self) -> LabelledImages:
        """What is learnt from."""
        return load_once(self.seed)

    @property
    def stages(self) -> tuple[Stage, ...]:
        per_epoch = len(self.images.train) // self.batch
        plain = Stage(name=PLAIN, steps=self.plain_epochs * per_epoch, learning_rate=self.learning_rate)
        later = {"steps": self.halting_epochs * per_epoch, "learning_rate": self.halting_learning_rate, "start": PLAIN}
        prepare = self.borrow if self.channel == "least needed" else None
        return plain, Stage(name=CONTROL, **later), Stage(name=HALTING, prepare=prepare, **later)

    def build(self) -> AViT:
        return AViT(
            AViTConfig(
                image=self.canvas, patch=self.patch, channels=self.channels, width=self.width, layers=self.layers
            ),
            seed=self.seed,
        )

    def borrow(self, model: nn.Module) -> None:
        """Give the gate the channel that it is to read."""
        plain, few, labels = cast(AViT, model), self.images.train[:CHOOSING], self.images.train_labels[:CHOOSING]
        seen = on_canvas(few, self.canvas, torch.zeros(len(few), 2, dtype=torch.long))
        swap_channels(plain, 0, least_needed_channel(plain, seen, labels, target_depths(self.layers, self.target)))

    def batch_at(self, stage: Stage, step: int) -> tuple[Tensor, Tensor]:
        """Images with a fresh shift, and labels. Control and halting see the same ones."""
        images, as_halting = self.images, Stage(name=HALTING, steps=1, learning_rate=0.0)
        generator = draw(self.seed, as_halting if stage.name == CONTROL else stage, step)
        chosen = torch.randint(len(images.train), (self.batch,), generator=generator)
        moved = torch.randint(-1, 2, (self.batch, 2), generator=generator)
        return on_canvas(images.train[chosen], self.canvas, moved), images.train_labels[chosen]

    def loss(self, model: nn.Module, stage: Stage, step: int) -> tuple[Tensor, Mapping[str, float]]:
        images, labels = self.batch_at(stage, step)
        halts = stage.name == HALTING
        run = model(images, halts=halts)
        task = nn.functional.cross_entropy(run.logits, labels)
        report = {"accuracy": float((run.logits.argmax(1) == labels).float().mean())}
        if not halts:
            return task, report
        prior = prior_loss(run.scores, prior=self.prior, target=self.target)
        total = task + self.ponder_weight * ponder_loss(run.ponder) + self.prior_weight * prior
        return total, {**report, "depth": float(run.depth.mean())}


@cache
def load_once(seed: int) -> LabelledImages:
    """The digits as this seed divides them."""
    return load_digits(seed)
