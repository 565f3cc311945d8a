"""PonderNet, AdaTape's baseline: one block, run again; every step has an answer and a chance to be the last.

Banino et al., arXiv 2107.05407. The loss is expected over the steps, and the chances are kept near a geometric
distribution. Known from the paper: the distribution, in which the last step takes what is left, and the loss. Ours:
the chance is read as in `universal`, and without chance at inference: the answer is that of the first step by which
half of the distribution is spent (the paper draws one).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saekit.adaptive.adatape import AdaTapeConfig
from saekit.adaptive.adatape_inputs import EntryTokens
from saekit.adaptive.block import Block, initialise
from saekit.adaptive.universal import Chance, macs_of_loop


@dataclass(frozen=True, slots=True, eq=False)
class PonderRun:
    """What one forward pass gave.

    Attributes:
        answers: `(batch, steps, classes)` logits after every step.
        halting: `(batch, steps)` the chance that a step is the last; adds up to 1.
    """

    answers: Float[Tensor, "batch steps classes"]
    halting: Float[Tensor, "batch steps"]

    @property
    def steps(self) -> Int[Tensor, " batch"]:
        """How many steps are taken without chance."""
        # counted from what lies below one half, so that rounding in the last sum cannot ask for a step too many
        return 1 + (self.halting.cumsum(1)[:, :-1] < 0.5).sum(1)

    @property
    def logits(self) -> Float[Tensor, "batch classes"]:
        """The answer of the last step taken."""
        return self.answers[torch.arange(len(self.answers)), self.steps - 1]


class PonderNet(nn.Module):
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

    def forward(self, inputs: Float[Tensor, "batch *size"]) -> PonderRun:
        x = self.tokens(inputs)
        left, answers, halting = torch.ones_like(x[:, 0, 0]), [], []
        for number in range(self.config.longest):
            x = self.block(x)
            chance = self.chance(x) if number < self.config.longest - 1 else torch.ones_like(left)
            answers.append(self.head(self.norm(x[:, 0])))
            halting.append(left * chance)
            left = left * (1 - chance)
        return PonderRun(torch.stack(answers, 1), torch.stack(halting, 1))

    def macs(self, steps: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Multiplications of inputs that took so many steps."""
        return macs_of_loop(self.config, steps)


def ponder_task(run: PonderRun, labels: Int[Tensor, " batch"]) -> Float[Tensor, ""]:
    """Cross-entropy, expected over the steps."""
    answers = run.answers.flatten(0, 1)
    repeated = labels.repeat_interleave(run.answers.shape[1])
    each = nn.functional.cross_entropy(answers, repeated, reduction="none").view_as(run.halting)
    return (run.halting * each).sum(1).mean()


def ponder_prior(halting: Float[Tensor, "batch steps"], chance: float) -> Float[Tensor, ""]:
    """KL of the steps' distribution from a geometric one, cut off and normalised."""
    prior = chance * (1 - chance) ** torch.arange(halting.shape[1], device=halting.device)
    prior = prior / prior.sum()
    return (torch.xlogy(halting, halting) - halting * prior.log()).sum(1).mean()
