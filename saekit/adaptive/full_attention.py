"""RIN's baseline: a denoiser in which every patch attends to every patch, so that its cost grows with their square.

The same objective, time and class tokens, and readout as `rin`; no latents, so that nothing is carried from step to
step. Sizes are ours.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saekit.adaptive.block import Block, initialise, macs_of_block
from saekit.adaptive.patches import patches_of, picture_from
from saekit.adaptive.rin import wave


@dataclass(frozen=True, kw_only=True, slots=True)
class FullAttentionConfig:
    """Sizes; `ratio` is of the feed-forward."""

    image: int = 8
    patch: int = 2
    channels: int = 1
    classes: int = 10
    width: int = 64
    layers: int = 2
    heads: int = 4
    ratio: int = 4

    @property
    def patches(self) -> int:
        return (self.image // self.patch) ** 2

    @property
    def macs(self) -> int:
        """Multiplications of one step, but for the time and class tokens; these grow with nothing."""
        ends = 2 * self.patches * self.patch**2 * self.channels * self.width
        return self.layers * macs_of_block(self.patches + 2, self.width, self.ratio) + ends


class FullAttention(nn.Module):
    """See the module's docstring. Takes and hands on latents as RIN does, and looks at none."""

    def __init__(self, config: FullAttentionConfig, *, seed: int = 0):
        super().__init__()
        self.config = config
        width, pixels = config.width, config.patch**2 * config.channels
        self.embed = nn.Linear(pixels, width)
        self.position = nn.Parameter(torch.zeros(1, config.patches, width))
        self.time = nn.Sequential(nn.Linear(width // 4, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Linear(config.classes, width)
        self.layers = nn.ModuleList(Block(width, config.heads, config.ratio * width) for _ in range(config.layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.readout = nn.Linear(width, pixels)
        initialise(self, seed=seed)

    def no_latents(self, batch: int) -> Float[Tensor, "batch 0 0"]:
        return self.position.new_zeros(batch, 0, 0)

    def forward(
        self,
        images: Float[Tensor, "batch channels height width"],
        gamma: Float[Tensor, " batch"],
        label: Float[Tensor, "batch classes"],
        z_prev: Float[Tensor, "batch slots latent"],
    ) -> tuple[Float[Tensor, "batch channels height width"], Float[Tensor, "batch slots latent"]]:
        """Predicted noise, and what was given as latents.

        Raises:
            ShapeError: images of another size.
        """
        config = self.config
        patches = patches_of(images, channels=config.channels, image=config.image, patch=config.patch)
        time = self.time(wave(gamma, config.width // 4))[:, None]
        x = torch.cat([self.embed(patches) + self.position, time, self.label(label)[:, None]], 1)
        for layer in self.layers:
            x = layer(x)
        noise = self.readout(self.norm(x[:, : config.patches]))
        return picture_from(noise, image=config.image, patch=config.patch), z_prev
