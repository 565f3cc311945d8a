"""RIN: a denoiser that reads its picture into a few latent slots, computes there, and writes back.

Jabri, Fleet, Chen, ICML 2023 (arXiv 2212.11972). Interface tokens X are tied to the picture and only ever meet the
latents Z, by cross-attention; self-attention is among latents alone, so that the cost is linear in the picture and its
constant part does not depend on it. In sampling, each step's latents start from the last step's: latent
self-conditioning.

Known from the authors' code: all of it, down to the order of norm and position; `z_prev` of zeros is an input that
the model knows. Our choices: the sizes, and initial weights.

Sites, for block r, slot and patch dimensions as `(batch, slots, latent)` and `(batch, patches, width)`; inside a
sampler each has one call per sampling step (`model.z_prev:out@3`):

    z_prev:out                   the last step's latents; Zero resets them, ReplaceFrom patches them
    carried:out                  what they add to the initial latents
    blocks.r.read.pattern:out    (batch, heads, slots, patches) what the slots read
    blocks.r.z_read:out          latents behind the read
    blocks.r.write.pattern:out   (batch, heads, patches, slots) what the patches are written from
    z_final:out                  latents behind the last block's compute
"""

from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saekit.adaptive.block import Attention, Block, FeedForward, initialise
from saekit.adaptive.patches import patches_of, picture_from
from saekit.errors import SaekitError


@dataclass(frozen=True, kw_only=True, slots=True)
class RINConfig:
    """Sizes.

    Attributes:
        width: of interface tokens.
        slots: latents, of which one holds the time and one the class.
        latent: their width.
        blocks: how often the picture is read and written.
        compute: layers of self-attention in each.
        ratio, interface_ratio: of the feed-forwards of latents and of interface tokens.
    """

    image: int = 8
    patch: int = 2
    channels: int = 1
    classes: int = 10
    width: int = 32
    slots: int = 8
    latent: int = 64
    blocks: int = 1
    compute: int = 1
    heads: int = 4
    ratio: int = 4
    interface_ratio: int = 2

    def __post_init__(self) -> None:
        if self.image % self.patch:
            raise SaekitError(f"{self.image} pixels are no whole number of patches of {self.patch}; give a multiple")
        if self.slots < 3 or self.latent % 8:
            raise SaekitError(
                f"slots={self.slots}, latent={self.latent}: give at least 3 slots and a latent width divisible by 8"
            )

    @property
    def side(self) -> int:
        return self.image // self.patch

    @property
    def patches(self) -> int:
        return self.side**2

    @property
    def constant_macs(self) -> int:
        """Multiplications of a forward pass that do not depend on the picture's size."""
        m, wide, inner = self.slots, self.latent, min(self.width, self.latent)
        feed = 2 * self.ratio * m * wide**2
        layer = (4 + 2 * self.ratio) * m * wide**2 + 2 * m**2 * wide
        return feed + self.blocks * (4 * m * wide * inner + feed) + self.blocks * self.compute * layer

    @property
    def macs_per_patch(self) -> int:
        """Multiplications that each patch adds."""
        d, inner = self.width, min(self.width, self.latent)
        block = 4 * d * inner + 4 * self.slots * inner + 2 * self.interface_ratio * d**2
        return self.blocks * block + 2 * self.patch**2 * self.channels * d

    @property
    def macs(self) -> int:
        return self.constant_macs + self.patches * self.macs_per_patch


class RINBlock(nn.Module):
    """Read, compute, write."""

    def __init__(self, config: RINConfig):
        super().__init__()
        d, wide, inner = config.width, config.latent, min(config.width, config.latent)
        self.read_norm = nn.LayerNorm(wide, eps=1e-6)
        self.read = Attention(wide, config.heads, source_width=d, inner=inner)
        self.read_feed_norm = nn.LayerNorm(wide, eps=1e-6)
        self.read_feed = FeedForward(wide, config.ratio * wide)
        self.z_read = nn.Identity()
        self.compute = nn.ModuleList(Block(wide, config.heads, config.ratio * wide) for _ in range(config.compute))
        self.write_norm = nn.LayerNorm(d, eps=1e-6)
        self.write = Attention(d, config.heads, source_width=wide, inner=inner)
        self.write_feed_norm = nn.LayerNorm(d, eps=1e-6)
        self.write_feed = FeedForward(d, config.interface_ratio * d)

    def forward(self, x: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        z = z + self.read(self.read_norm(z), x)
        z = self.z_read(z + self.read_feed(self.read_feed_norm(z)))
        for layer in self.compute:
            z = layer(z)
        x = x + self.write(self.write_norm(x), z)
        return x + self.write_feed(self.write_feed_norm(x)), z


class RIN(nn.Module):
    """See the module's docstring."""

    def __init__(self, config: RINConfig, *, seed: int = 0):
        super().__init__()
        self.config = config
        d, wide, pixels = config.width, config.latent, config.patch**2 * config.channels
        self.embed = nn.Linear(pixels, d)
        self.stem_norm = nn.LayerNorm(d, eps=1e-6)
        self.position = nn.Parameter(torch.zeros(1, config.patches, d))
        self.time = nn.Sequential(nn.Linear(wide // 4, wide), nn.SiLU(), nn.Linear(wide, wide))
        self.label = nn.Linear(config.classes, wide)
        self.table = nn.Parameter(torch.zeros(1, config.slots - 2, wide))
        self.z_prev, self.carried, self.z_final = nn.Identity(), nn.Identity(), nn.Identity()
        self.carry_norm = nn.LayerNorm(wide, eps=1e-6)
        self.carry_feed = FeedForward(wide, config.ratio * wide)
        self.carry_out = nn.LayerNorm(wide, eps=1e-6)
        self.blocks = nn.ModuleList(RINBlock(config) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(d, eps=1e-6)
        self.readout = nn.Linear(d, pixels)
        initialise(self, seed=seed)
        with torch.no_grad():  # at first nothing is carried
            self.carry_out.weight.zero_()

    @property
    def stack(self) -> list[RINBlock]:
        """The blocks, in their order."""
        return cast(list[RINBlock], list(self.blocks))

    def no_latents(self, batch: int) -> Float[Tensor, "batch slots latent"]:
        """Where there is no last step."""
        return self.table.new_zeros(batch, self.config.slots, self.config.latent)

    def forward(
        self,
        images: Float[Tensor, "batch channels height width"],
        gamma: Float[Tensor, " batch"],
        label: Float[Tensor, "batch classes"],
        z_prev: Float[Tensor, "batch slots latent"],
    ) -> tuple[Float[Tensor, "batch channels height width"], Float[Tensor, "batch slots latent"]]:
        """Predicted noise, and the latents for the next step.

        Args:
            gamma: share of signal in the variance, by which the model knows the time.
            label: one-hot; all zero for none.

        Raises:
            ShapeError: images of another size.
        """
        config = self.config
        patches = patches_of(images, channels=config.channels, image=config.image, patch=config.patch)
        x = self.stem_norm(self.embed(patches)) + self.position
        z = self.latents(gamma, label, z_prev)
        for block in self.stack:
            x, z = block(x, z)
        noise = self.readout(self.norm(x))
        return picture_from(noise, image=config.image, patch=config.patch), self.z_final(z)

    def latents(self, gamma: Tensor, label: Tensor, z_prev: Tensor) -> Float[Tensor, "batch slots latent"]:
        """The initial latents: learnt, time and class, and what is carried over from the last step."""
        time = self.time(wave(gamma, self.config.latent // 4))[:, None]
        table = self.table.expand(len(gamma), -1, -1)
        z_prev = self.z_prev(z_prev)
        carried = self.carry_out(z_prev + self.carry_feed(self.carry_norm(z_prev)))
        return torch.cat([table, time, self.label(label)[:, None]], 1) + self.carried(carried)


def wave(gamma: Float[Tensor, " batch"], channels: int) -> Float[Tensor, "batch channels"]:
    """Sines and cosines of 1000 * gamma, standardised over channels."""
    place = torch.arange(channels, device=gamma.device)
    rates = 10_000.0 ** (-2 * (place // 2) / channels)
    angles = 1000 * gamma[:, None] * rates
    waves = torch.cat([angles[:, ::2].sin(), angles[:, 1::2].cos()], 1)
    return (waves - waves.mean(1, keepdim=True)) / waves.std(1, keepdim=True, correction=0)
