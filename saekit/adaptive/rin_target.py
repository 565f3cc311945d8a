"""A sampler as a target: labels in, pictures out, and which patches the slots read at each sampling step.

RIN takes no discrete decisions; what it decides is where to look. A trace says of each patch and step whether it was
read more than an equal share (our way of putting it), averaged over blocks, heads and slots.
"""

import torch
from jaxtyping import Int
from torch import Tensor

from saekit.adaptive.deciding import DecidingTarget
from saekit.adaptive.diffusion import Sampler, Sampling
from saekit.adaptive.rin import RIN
from saekit.adaptive.trace import DecisionTrace
from saekit.targets import Site, Target

OPTIONS = ("read less", "read more")


def rin_target(model: RIN, sampling: Sampling = Sampling(steps=25)) -> DecidingTarget:  # noqa: B008  frozen
    """Class labels in; the noise that each picture starts from is drawn by the seed of `sampling`."""
    sampler, config = Sampler(model, sampling), model.config
    shape = (config.channels, config.image, config.image)

    def forward(module: torch.nn.Module, labels: Int[Tensor, " batch"]) -> Tensor:
        generator = torch.Generator().manual_seed(sampling.seed)
        return module(torch.randn(len(labels), *shape, generator=generator), labels)

    target = Target.wrap(sampler, name="rin", forward=forward, example=torch.zeros(1, dtype=torch.int64))
    sites = [Site.parse(f"model.blocks.{number}.read.pattern:out@*") for number in range(config.blocks)]

    def trace(labels: Tensor) -> DecisionTrace:
        patterns = target.read(labels, sites)
        # (steps, batch, heads, slots, patches) of each block
        mass = torch.stack([patterns[site].mean((2, 3)) for site in sites]).mean(0).transpose(0, 1)
        margin = mass - 1 / config.patches
        seen = sampler.seen.transpose(0, 1)
        macs = float(config.macs * sampling.steps)
        return DecisionTrace(
            model="rin",
            options=OPTIONS,
            decision=(margin > 0).long(),
            margin=margin,
            score=mass,
            live=torch.ones_like(margin, dtype=torch.bool),
            macs=torch.full((len(labels),), macs),
            full_macs=macs,
            grid=(config.side, config.side),
            counts="read more",
            more={"seen": seen, "pictures": seen[:, -1]},
        )

    return DecidingTarget(target=target, steps=(), options=OPTIONS, trace_batch=trace)
