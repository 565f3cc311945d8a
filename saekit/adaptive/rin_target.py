"""A sampler as a target: labels in, pictures out, and which patches the slots read at each sampling step.

RIN takes no discrete decisions; what it decides is where to look. A trace says of each patch and step whether it was
read more than an equal share (our way of putting it), averaged over blocks, heads and slots.
"""

import torch
from jaxtyping import Int
from torch import Tensor

from saekit.adaptive.deciding import DecidingTarget, Step
from saekit.adaptive.diffusion import Sampler, Sampling
from saekit.adaptive.rin import RIN
from saekit.adaptive.trace import DecisionTrace
from saekit.targets import Site, Target

OPTIONS = ("read less", "read more")


def rin_target(model: RIN, sampling: Sampling = Sampling(steps=25)) -> DecidingTarget:  # noqa: B008  frozen
    """Numbers in, a picture each: of the class that is the number modulo `classes`, from a noise of its own for each
    round of classes, so that 3, 13, 23 are three threes. A picture does not depend on what else is in the batch.

    A step reads what the first block's slots ask with, `(batch, slots, latent)`, which decides where they read and
    nothing else; what they find there is the content. Slots read, patches are what is decided about.
    """
    sampler, config = Sampler(model, sampling), model.config
    shape = (config.channels, config.image, config.image)

    def noise_of(number: int) -> Tensor:
        generator = torch.Generator().manual_seed(sampling.seed * 1_000_003 + number // config.classes)
        return torch.randn(*shape, generator=generator)

    def forward(module: torch.nn.Module, numbers: Int[Tensor, " batch"]) -> Tensor:
        noise = torch.stack([noise_of(number) for number in numbers.tolist()])
        return module(noise, numbers % config.classes, numbers)

    target = Target.wrap(sampler, name="rin", forward=forward, example=torch.zeros(1, dtype=torch.int64))
    sites = [Site.parse(f"model.blocks.{number}.read.pattern:out@*") for number in range(config.blocks)]

    def trace(numbers: Tensor) -> DecisionTrace:
        patterns = target.read(numbers, sites)
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
            macs=torch.full((len(numbers),), macs),
            full_macs=macs,
            grid=(config.side, config.side),
            counts="read more",
            more={"seen": seen, "pictures": seen[:, -1]},
        )

    steps = tuple(
        Step(
            reads=Site.parse(f"model.blocks.0.read.q:in@{number}"),
            content=Site.parse(f"model.blocks.0.z_read:out@{number}"),
            score=None,
            decision=None,
        )
        for number in range(sampling.steps)
    )
    return DecidingTarget(target=target, steps=steps, options=OPTIONS, trace_batch=trace)
