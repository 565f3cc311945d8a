"""What AdaTape and its baselines see: an input as a few tokens of its own, and as the many entries of a bank.

Values, not modules: they cut an input into rows of numbers; the models embed these.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saekit.adaptive.patches import patches_of
from saekit.errors import SaekitError, ShapeError


@runtime_checkable
class Seen(Protocol):
    """A sort of input.

    Attributes:
        n_own, own_size: tokens of the model's own, and the numbers in each.
        n_entries, entry_size: the same of a bank that is made of the input.
        placed: whether rows get learnt positions.
        example: one input, all zero.
    """

    @property
    def n_own(self) -> int: ...
    @property
    def own_size(self) -> int: ...
    @property
    def n_entries(self) -> int: ...
    @property
    def entry_size(self) -> int: ...
    @property
    def placed(self) -> bool: ...
    @property
    def example(self) -> Tensor: ...

    def own(self, inputs: Tensor) -> Float[Tensor, "batch own size"]: ...

    def entries(self, inputs: Tensor) -> Float[Tensor, "batch entries size"]: ...


@dataclass(frozen=True, slots=True)
class Symbols:
    """Sequences of 1, 0 and -1: one token for the whole, an entry without a position for each symbol.

    As in the released code for parity. `symbols` are numbers, not token ids.
    """

    length: int
    n_own = 1
    entry_size = 3
    placed = False

    @property
    def own_size(self) -> int:
        return 3 * self.length

    @property
    def n_entries(self) -> int:
        return self.length

    @property
    def example(self) -> Float[Tensor, "1 length"]:
        return torch.zeros(1, self.length)

    def own(self, inputs: Float[Tensor, "batch length"]) -> Float[Tensor, "batch 1 size"]:
        return self.entries(inputs).flatten(1)[:, None]

    def entries(self, inputs: Float[Tensor, "batch length"]) -> Float[Tensor, "batch length 3"]:
        """The symbols as one-hot vectors.

        Raises:
            ShapeError: sequences of another length.
            SaekitError: a symbol other than 1, 0 and -1.
        """
        if inputs.shape[1:] != (self.length,):
            raise ShapeError(
                f"sequences have {inputs.shape[1]} symbols, but this model reads {self.length}; give as many"
            )
        one_hot = inputs[..., None] == torch.tensor([-1.0, 0.0, 1.0], device=inputs.device)
        if not bool(one_hot.any(-1).all()):
            raise SaekitError(f"there is a symbol {float(inputs[~one_hot.any(-1)][0]):g}; give 1, 0 and -1")
        return one_hot.float()


@dataclass(frozen=True, slots=True)
class Pictures:
    """Square grey pictures: coarse patches for the model, fine ones for the bank, both with positions."""

    side: int
    coarse: int
    fine: int
    placed = True

    def __post_init__(self) -> None:
        if self.side % self.coarse or self.side % self.fine:
            raise SaekitError(
                f"{self.side} pixels are no whole number of patches of {self.coarse} and of {self.fine}; give divisors"
            )

    @property
    def n_own(self) -> int:
        return (self.side // self.coarse) ** 2

    @property
    def own_size(self) -> int:
        return self.coarse**2

    @property
    def n_entries(self) -> int:
        return (self.side // self.fine) ** 2

    @property
    def entry_size(self) -> int:
        return self.fine**2

    @property
    def example(self) -> Float[Tensor, "1 1 side side"]:
        return torch.zeros(1, 1, self.side, self.side)

    def own(self, inputs: Float[Tensor, "batch 1 side side"]) -> Float[Tensor, "batch own size"]:
        return patches_of(inputs, channels=1, image=self.side, patch=self.coarse)

    def entries(self, inputs: Float[Tensor, "batch 1 side side"]) -> Float[Tensor, "batch entries size"]:
        return patches_of(inputs, channels=1, image=self.side, patch=self.fine)


class EntryTokens(nn.Module):
    """Every entry as a token with its position, behind a class token: how the baselines without a tape read."""

    def __init__(self, seen: Seen, width: int):
        super().__init__()
        self.seen = seen
        self.embed = nn.Linear(seen.entry_size, width)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.zeros(1, seen.n_entries, width))

    def forward(self, inputs: Tensor) -> Float[Tensor, "batch tokens width"]:
        tokens = self.embed(self.seen.entries(inputs)) + self.position
        return torch.cat([self.class_token.expand(len(inputs), -1, -1), tokens], 1)
