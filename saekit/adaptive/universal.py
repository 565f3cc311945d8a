"""Universal Transformer with ACT, AdaTape's baseline: one block, run again until the input says that it is enough.

Dehghani et al., ICLR 2019 (arXiv 1807.03819), with Graves' halting (arXiv 1603.08983). Known from the code of AdaTape's
authors: one halting chance per input, the mean over tokens of a sigmoid whose weights begin at 0 and whose bias
begins at -1, and `out = state * u + out * (1 - u)`. Ours: no embedding of the step, and a class token is read out.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saekit.adaptive.adatape import AdaTapeConfig
from saekit.adaptive.adatape_inputs import EntryTokens
from saekit.adaptive.block import Block, initialise, macs_of_block

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


class Chance(nn.Module):
    """The chance to stop now, of each input."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, 1)

    def begin(self) -> None:
        """As untrained: the same small chance for all."""
        nn.init.zeros_(self.linear.weight)
        nn.init.constant_(self.linear.bias, -1.0)

    def forward(self, x: Float[Tensor, "batch tokens width"]) -> Float[Tensor, " batch"]:
        return self.linear(x).sigmoid().mean((1, 2))


class UniversalTransformer(nn.Module):
    """See the module's docstring; sizes are those of AdaTape's config, `longest` is the most steps."""

    def __init__(self, config: AdaTapeConfig, *, seed: int = 0):
        super().__init__()
        self.config = config
        self.tokens = EntryTokens(config.seen, config.width)
        self.block = Block(config.width, config.heads, config.ratio * config.width)
        self.chance = Chance(config.width)
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.head = nn.Linear(config.width, config.classes)
        initialise(self, seed=seed)
        self.chance.begin()

    def forward(self, inputs: Float[Tensor, "batch *size"]) -> UniversalRun:
        """Every input runs on with the batch; what comes after its end does not count."""
        state = self.tokens(inputs)
        out = torch.zeros_like(state)
        spent, remainder = torch.zeros_like(state[:, 0, 0]), torch.zeros_like(state[:, 0, 0])
        running, steps = torch.ones_like(spent, dtype=torch.bool), torch.zeros_like(spent, dtype=torch.int64)
        for number in range(self.config.longest):
            chance = self.chance(state)
            ends = running & ((spent + chance >= 1 - EPS) | (number == self.config.longest - 1))
            share = torch.where(ends, 1 - spent, chance) * running
            remainder, steps = remainder + (1 - spent) * ends, steps + running
            state = self.block(state)
            out = state * share[:, None, None] + out * (1 - share[:, None, None])
            spent, running = spent + share, running & ~ends
        return UniversalRun(self.head(self.norm(out[:, 0])), steps, remainder)

    def macs(self, steps: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Multiplications of inputs that took so many steps."""
        return macs_of_loop(self.config, steps)


def macs_of_loop(config: AdaTapeConfig, steps: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """Of a block that is run again, with its chance to stop, between embedding and head."""
    seen, width = config.seen, config.width
    tokens = 1 + seen.n_entries
    step = macs_of_block(tokens, width, config.ratio) + tokens * width
    return step * steps.float() + seen.n_entries * seen.entry_size * width + width * config.classes
