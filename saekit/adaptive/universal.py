"""Universal Transformer with ACT, AdaTape's baseline: one block, run again until the input says that it is enough.

Dehghani et al., ICLR 2019 (arXiv 1807.03819), with Graves' halting (arXiv 1603.08983). Known from the code of AdaTape's
authors: one halting chance per input, and `out = state * u + out * (1 - u)`. Ours: no embedding of the step, and a
class token is read out.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saekit.adaptive.adatape import AdaTapeConfig
from saekit.adaptive.looped import Loop

EPS = 0.01


@dataclass(frozen=True, slots=True, eq=False)
class UniversalRun:
    """What one forward pass gave.

    Attributes:
        logits: `(batch, classes)`.
        steps: `(batch,)` how often the block was run.
        remainder: `(batch,)` what was left of 1 at the last step; with `steps` the cost, and alone with a gradient.
    """

    logits: Float[Tensor, "batch classes"]
    steps: Int[Tensor, " batch"]
    remainder: Float[Tensor, " batch"]


class UniversalTransformer(nn.Module):
    """See the module's docstring; sizes are those of AdaTape's config, `longest` is the most steps."""

    def __init__(self, config: AdaTapeConfig, *, seed: int = 0):
        super().__init__()
        self.loop = Loop(config, seed=seed)

    def forward(self, inputs: Float[Tensor, "batch *size"]) -> UniversalRun:
        """Every input runs on with the batch; what comes after its end does not count."""
        loop, state = self.loop, self.loop.tokens(inputs)
        out = torch.zeros_like(state)
        spent, remainder = torch.zeros_like(state[:, 0, 0]), torch.zeros_like(state[:, 0, 0])
        running, steps = torch.ones_like(spent, dtype=torch.bool), torch.zeros_like(spent, dtype=torch.int64)
        for number in range(loop.config.longest):
            chance = loop.chance(state)
            ends = running & ((spent + chance >= 1 - EPS) | (number == loop.config.longest - 1))
            share = torch.where(ends, 1 - spent, chance) * running
            remainder, steps = remainder + (1 - spent) * ends, steps + running
            state = loop.block(state)
            out = state * share[:, None, None] + out * (1 - share[:, None, None])
            spent, running = spent + share, running & ~ends
        return UniversalRun(loop.answer(out), steps, remainder)
