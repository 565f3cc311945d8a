"""Denoising diffusion as RIN does it: schedules of the signal's share, the loss with latents carried, the samplers.

`x_t = sqrt(g) x_0 + sqrt(1 - g) eps` with g = gamma(t) from 1 (t = 0) to 0 (t = 1). The model is told gamma, not t, so
that sampling may use another schedule than training. Known from the authors' code.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saekit.adaptive.full_attention import FullAttention
from saekit.adaptive.rin import RIN
from saekit.errors import SaekitError

Schedule = Callable[[Float[Tensor, "..."]], Float[Tensor, "..."]]
Denoiser = RIN | FullAttention
"""Takes pictures, gamma, one-hot labels and latents; gives the noise in the pictures, and latents."""
_LEAST = 1e-9


def linear(t: Tensor) -> Tensor:
    """1 - t."""
    return (1 - t).clamp(_LEAST, 1)


def cosine(t: Tensor) -> Tensor:
    """The default of sampling."""
    return ((t + 0.0002) / 1.00025 * math.pi / 2).cos().square().clamp(_LEAST, 1)


def sigmoid(t: Tensor, *, start: float = -3.0, end: float = 3.0, tau: float = 0.9) -> Tensor:
    """The paper's for training, more stable than cosine on large pictures."""
    first, last = (torch.sigmoid(torch.tensor(v / tau)) for v in (start, end))
    return ((last - torch.sigmoid((t * (end - start) + start) / tau)) / (last - first)).clamp(_LEAST, 1)


def noised(x: Tensor, noise: Tensor, gamma: Float[Tensor, " batch"]) -> Tensor:
    g = gamma.view(-1, *[1] * (x.ndim - 1))
    return g.sqrt() * x + (1 - g).sqrt() * noise


def denoised(x: Tensor, eps: Tensor, gamma: Tensor) -> Tensor:
    """The picture that noise `eps` says is behind `x`; `noised` the other way round, held between -1 and 1."""
    return ((x - (1 - gamma).sqrt() * eps) / gamma.sqrt()).clamp(-1, 1)


def denoising_loss(
    model: Denoiser,
    images: Float[Tensor, "batch channels height width"],
    label: Float[Tensor, "batch classes"],
    *,
    rate: float,
    generator: torch.Generator,
    schedule: Schedule = linear,
) -> Float[Tensor, ""]:
    """Mean squared error of the predicted noise.

    Args:
        rate: share of the examples that are given latents: those of a first pass over the same noisy picture, which
            gets no gradient. The others are given zeros.
    """
    gamma = schedule(torch.rand(len(images), generator=generator))
    noise = torch.randn(images.shape, generator=generator)
    noisy = noised(images, noise, gamma)
    z = model.no_latents(len(images))
    given = torch.rand(len(images), generator=generator) < rate
    if bool(given.any()):
        with torch.no_grad():
            z = model(noisy, gamma, label, z)[1] * given[:, None, None]
    return (model(noisy, gamma, label, z)[0] - noise).square().mean()


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How pictures are made.

    Attributes:
        steps: of denoising.
        sampler: "ddim" is deterministic, "ddpm" adds noise at every step.
        carries: False gives every step zeros for latents.
        variance: of the noise that ddpm adds: "large" or "small" as in the code, or "none".
    """

    steps: int = 50
    sampler: Literal["ddim", "ddpm"] = "ddim"
    carries: bool = True
    variance: Literal["large", "small", "none"] = "large"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise SaekitError(f"steps={self.steps} makes no picture; give at least 1")


class Sampler(nn.Module):
    """A module that calls the model once per step, so that a Site's call is a sampling step.

    Attributes:
        seen: of the last run, x_0 as each step saw it, `(steps, batch, channels, height, width)`.
    """

    def __init__(self, model: Denoiser, sampling: Sampling, *, schedule: Schedule = cosine):
        super().__init__()
        self.model, self.sampling, self.schedule = model, sampling, schedule
        self.seen = torch.zeros(0)

    def forward(
        self,
        noise: Float[Tensor, "batch channels height width"],
        labels: Int[Tensor, " batch"] | None = None,
        numbers: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch channels height width"]:
        """Pictures from noise, between -1 and 1; without `labels` of no class.

        Args:
            numbers: of the pictures: what ddpm adds to one is then drawn by its number, and goes by nothing else in the
                batch.
        """
        how, n = self.sampling, len(noise)
        times = torch.linspace(1, 0, how.steps + 1)
        seeds = [how.seed] if numbers is None else [how.seed * 1_000_003 + number for number in numbers.tolist()]
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        label = self._one_hot(labels, n)
        x, z, seen = noise, self.model.no_latents(n), []
        for t, after in pairwise(times):
            g, g_after = self.schedule(t), self.schedule(after)
            eps, z_new = self.model(x, g.expand(n), label, z)
            clean = denoised(x, eps, g)
            eps = (x - g.sqrt() * clean) / (1 - g).sqrt().clamp(min=_LEAST)
            z = z_new if how.carries else z
            seen.append(clean)
            if how.sampler == "ddim":
                x = g_after.sqrt() * clean + (1 - g_after).sqrt() * eps
            else:
                x = self._ddpm(x, eps, g, g_after, generators)
        self.seen = torch.stack(seen)
        return seen[-1]

    def _ddpm(
        self, x: Tensor, eps: Tensor, g: Tensor, g_after: Tensor, generators: Sequence[torch.Generator]
    ) -> Tensor:
        kept = (g / g_after).clamp(0, 1)
        mean = (x - (1 - kept) / (1 - g).sqrt().clamp(min=_LEAST) * eps) / kept.sqrt().clamp(min=_LEAST)
        variance = {"large": 1 - kept, "small": (1 - kept) * (1 - g_after) / (1 - g), "none": 0 * kept}
        parts = zip(x.chunk(len(generators)), generators, strict=True)
        added = torch.cat([torch.randn(part.shape, generator=generator) for part, generator in parts])
        return mean + variance[self.sampling.variance].sqrt() * added

    def _one_hot(self, labels: Tensor | None, n: int) -> Float[Tensor, "n classes"]:
        classes = self.model.config.classes
        if labels is None:
            return torch.zeros(n, classes)
        if len(labels) != n or bool(((labels < 0) | (labels >= classes)).any()):
            raise SaekitError(f"{len(labels)} labels up to {int(labels.max())} for {n} pictures of {classes} classes")
        return nn.functional.one_hot(labels, classes).float()
