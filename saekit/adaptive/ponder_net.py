"""PonderNet, AdaTape's baseline: one block, run again; every step has an answer and a chance to be the last.

Banino et al., arXiv 2107.05407. The loss is expected over the steps, and the chances are kept near a geometric
distribution. Known from the paper: the distribution, in which the last step takes what is left, and the loss. Ours:
inference is without chance: the answer is that of the first step by which
half of the distribution is spent (the paper draws one).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saekit.adaptive.adatape import AdaTapeConfig
from saekit.adaptive.looped import Loop


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
        self.loop = Loop(config, seed=seed)

    def forward(self, inputs: Float[Tensor, "batch *size"]) -> PonderRun:
        loop, x = self.loop, self.loop.tokens(inputs)
        left, answers, halting = torch.ones_like(x[:, 0, 0]), [], []
        for number in range(loop.config.longest):
            x = loop.block(x)
            chance = loop.chance(x) if number < loop.config.longest - 1 else torch.ones_like(left)
            answers.append(loop.answer(x))
            halting.append(left * chance)
            left = left * (1 - chance)
        return PonderRun(torch.stack(answers, 1), torch.stack(halting, 1))


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
