"""What a step of RIN costs beside one of a denoiser with full attention, counted and timed, by number of patches."""

import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from saekit.adaptive.full_attention import FullAttention, FullAttentionConfig
from saekit.adaptive.rin import RIN, RINConfig

SIZES = (64, 256, 1024)


def denoisers(patches: int) -> dict[str, RIN | FullAttention]:
    """The specification's sizes for this comparison, untrained, on patches of one pixel."""
    side = round(patches**0.5)
    rin = RINConfig(image=side, patch=1, slots=10, blocks=2, compute=2)
    return {"rin": RIN(rin), "full": FullAttention(FullAttentionConfig(image=side, patch=1, layers=6))}


def one_step(model: RIN | FullAttention, batch: int = 1) -> tuple[Tensor, ...]:
    """What a step takes: noise, halfway through."""
    config = model.config
    images = torch.zeros(batch, config.channels, config.image, config.image)
    return images, torch.full((batch,), 0.5), torch.zeros(batch, config.classes), model.no_latents(batch)


@torch.no_grad()
def counted_macs(model: RIN | FullAttention) -> int:
    """Multiplications of a step on one picture as PyTorch counts them, half a FLOP each; embeddings included."""
    with FlopCounterMode(display=False) as counter:
        model(*one_step(model))
    return counter.get_total_flops() // 2


@torch.no_grad()
def measure_cost(*, sizes: Sequence[int] = SIZES, batch: int = 8, repeats: int = 5) -> dict[str, float]:
    """Multiplications per picture, and milliseconds per step of a batch: medians of interleaved runs, this machine.

    constant_share is the part of RIN's multiplications that does not depend on the number of patches.
    """
    found: dict[str, float] = {}
    for patches in sizes:
        models = denoisers(patches)
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(repeats):
            for name, model in models.items():
                seconds[name].append(_seconds(model.eval(), one_step(model, batch)))
        for name, model in models.items():
            found[f"{name}_macs_at_{patches}"] = float(counted_macs(model))
            found[f"{name}_ms_at_{patches}"] = 1000 * statistics.median(seconds[name])
        rin = models["rin"].config
        assert isinstance(rin, RINConfig)
        found[f"constant_share_at_{patches}"] = rin.constant_macs / rin.macs
        found[f"times_the_macs_at_{patches}"] = found[f"full_macs_at_{patches}"] / found[f"rin_macs_at_{patches}"]
        found[f"times_the_ms_at_{patches}"] = found[f"full_ms_at_{patches}"] / found[f"rin_ms_at_{patches}"]
    return found


def _seconds(model: nn.Module, step: tuple[Tensor, ...]) -> float:
    began = time.perf_counter()
    model(*step)
    return time.perf_counter() - began
