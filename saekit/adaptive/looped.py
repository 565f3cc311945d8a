"""What models that run one block again are made of: entries as tokens, the block, a chance to stop, and a head."""

from jaxtyping import Float, Int
from torch import Tensor, nn

from saekit.adaptive.adatape import AdaTapeConfig
from saekit.adaptive.adatape_inputs import EntryTokens
from saekit.adaptive.block import Block, initialise, macs_of_block


class Loop(nn.Module):
    """The parts; how often the block is run, and whose answer counts, is the model's affair.

    The chance to stop of an input is the mean over its tokens of a sigmoid, whose weights begin at 0 and whose bias
    begins at -1: at first the same small chance for all. Known from the code of AdaTape's authors.
    """

    def __init__(self, config: AdaTapeConfig, *, seed: int):
        super().__init__()
        self.config = config
        self.tokens = EntryTokens(config.seen, config.width)
        self.block = Block(config.width, config.heads, config.ratio * config.width)
        self.stop = nn.Linear(config.width, 1)
        self.norm = nn.LayerNorm(config.width, eps=1e-6)
        self.head = nn.Linear(config.width, config.classes)
        initialise(self, seed=seed)
        nn.init.zeros_(self.stop.weight)
        nn.init.constant_(self.stop.bias, -1.0)

    def chance(self, x: Float[Tensor, "batch tokens width"]) -> Float[Tensor, " batch"]:
        """Of each input to stop now."""
        return self.stop(x).sigmoid().mean((1, 2))

    def answer(self, x: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch classes"]:
        """Logits, read off the class token."""
        return self.head(self.norm(x[:, 0]))

    def macs(self, steps: Int[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Multiplications of inputs for which the block was run so many times, embedding and head included."""
        seen, width = self.config.seen, self.config.width
        tokens = 1 + seen.n_entries
        step = macs_of_block(tokens, width, self.config.ratio) + tokens * width
        ends = seen.n_entries * seen.entry_size * width + width * self.config.classes
        return step * steps.float() + ends
