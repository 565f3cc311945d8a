"""How the bundled RIN is made: digits from noise, with latents carried from step to step."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from saekit.adaptive.a_vit_recipe import load_once
from saekit.adaptive.diffusion import Denoiser, denoising_loss
from saekit.adaptive.full_attention import FullAttention, FullAttentionConfig
from saekit.adaptive.rin import RIN, RINConfig
from saekit.adaptive.stages import Stage, draw

DENOISING = "denoising"


@dataclass(frozen=True, kw_only=True, slots=True)
class RINRecipe:
    """A miniature (there: LAMB, 150,000 steps and more, an average of the weights).

    Here AdamW, and a learning rate that falls to nearly nothing in place of the average.

    Attributes:
        rate: share of the examples that are given latents.
        full_layers: of the control, in which all patches attend to all; None trains RIN.
    """

    seed: int = 0
    blocks: int = 1
    compute: int = 1
    batch: int = 64
    steps: int = 5000
    learning_rate: float = 4e-3
    rate: float = 0.9
    full_layers: int | None = None

    @property
    def stages(self) -> tuple[Stage, ...]:
        return (Stage(name=DENOISING, steps=self.steps, learning_rate=self.learning_rate, weight_decay=0.01),)

    def build(self) -> Denoiser:
        if self.full_layers is not None:
            return FullAttention(FullAttentionConfig(layers=self.full_layers), seed=self.seed)
        return RIN(RINConfig(blocks=self.blocks, compute=self.compute), seed=self.seed)

    def loss(self, model: nn.Module, stage: Stage, step: int) -> tuple[Tensor, Mapping[str, float]]:
        digits, generator = load_once(self.seed), draw(self.seed, stage, step)
        chosen = torch.randint(len(digits.train), (self.batch,), generator=generator)
        label = nn.functional.one_hot(digits.train_labels[chosen], 10).float()
        images = digits.train[chosen][:, None] * 2 - 1
        rate = self.rate if self.full_layers is None else 0.0  # which has nothing to carry
        return denoising_loss(cast(Denoiser, model), images, label, rate=rate, generator=generator), {}
