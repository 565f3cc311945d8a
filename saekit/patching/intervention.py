"""An intervention: what is changed in a forward pass, where, how, and under which condition.

A frozen value. Several compose by being passed together: each reads the activations as they come to its
Site in this pass, and their changes add up. Two that would overwrite each other are refused.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saekit.errors import SaekitError
from saekit.patching.operation import Add, Operation
from saekit.patching.tokens import Grid
from saekit.targets import Site


class OffDistributionWarning(UserWarning):
    """An edit took an activation out of the range that the model is used to."""


@dataclass(frozen=True, slots=True)
class AllBut:
    """Every feature of the dictionary except these: to see whether they are enough."""

    features: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class When:
    """Only at tokens where another feature is active, before any edit.

    Attributes:
        feature: of the SAE at `site`.
        above: it counts as active above this strength.
        site: where it is read, which must come before the edit in the pass; the Site of the edit if None.
    """

    feature: int
    above: float = 0.0
    site: Site | None = None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Intervention:
    """One edit. Everything that is None means everywhere.

    Without `features` and `direction` the operation acts on the whole vector at the Site.

    Attributes:
        site: which tensor; its `call` says which call of a looped module, `@*` every one.
        features: of the SAE that is spliced in there.
        direction: `(d_model,)` of any length but 0; the operation acts on the component along it.
        positions: in the text, from 0; a negative one counts from the end of each pass, so that under
            `generate`, -1 is the last token of the prompt and then every new token.
        tokens: only where the model reads one of these ids.
        rows: of the batch.
        steps: forward passes since the edits are in place, from 0; under `generate`, 0 reads the prompt
            and n reads the nth new token.
        when: a condition on another feature at the same token.
        may_idle: True if it is fine that nothing changes, as it may be with a condition. Otherwise an
            edit that never changed anything is an error.
    """

    site: Site
    operation: Operation
    features: tuple[int, ...] | AllBut | None = None
    direction: Float[Tensor, " d_model"] | None = None
    positions: tuple[int, ...] | None = None
    tokens: tuple[int, ...] | None = None
    rows: tuple[int, ...] | None = None
    steps: tuple[int, ...] | None = None
    when: When | None = None
    may_idle: bool = False

    def __post_init__(self) -> None:
        named = self.features.features if isinstance(self.features, AllBut) else self.features
        for what, values in (
            ("features", named), ("positions", self.positions), ("tokens", self.tokens), ("rows", self.rows),
            ("steps", self.steps),
        ):  # fmt: skip
            if values is not None and (not values or len(set(values)) < len(values)):
                raise SaekitError(f"{what}={values} at {self.site}; name at least one, each once, or leave it out")
        if self.features is not None and self.direction is not None:
            raise SaekitError(f"an edit at {self.site} names features and a direction; make it two interventions")
        if self.direction is not None and not 0 < float(self.direction.norm()) < float("inf"):
            raise SaekitError(f"the direction at {self.site} has norm {float(self.direction.norm())}; give another")
        if isinstance(self.features, AllBut) and not self.operation.keeps_zero:
            raise SaekitError(
                f"{type(self.operation).__name__} would make every feature of {self.site} active on every token; "
                "with AllBut use Zero, Scale or a Clamp that leaves 0 at 0"
            )
        if isinstance(self.operation, Add) and self.direction is None:
            if self.features is None:
                raise SaekitError(f"Add at {self.site} needs to know along what; pass direction= or features=")
            if self.operation.keep_norm:
                raise SaekitError("keep_norm is for directions; pass direction=sae.W_dec[feature]")

    @property
    def adds(self) -> bool:
        """Whether it only adds, so that others may work on the same numbers."""
        return isinstance(self.operation, Add) and not self.operation.keep_norm

    def __str__(self) -> str:
        if isinstance(self.features, AllBut):
            what = f"all features but {_several(self.features.features)}"
        elif self.features is not None:
            what = f"features {_several(self.features)}"
        else:
            what = "a direction" if self.direction is not None else "whole vectors"
        return f"{type(self.operation).__name__} on {what} at {self.site}"

    def choose(self, grid: Grid) -> Bool[Tensor, "batch context"]:
        """The tokens of one call that are meant, conditions apart.

        Raises:
            SaekitError: a row that the batch does not have, positions counted from 0 where rows begin with padding,
                or a masked token where positions or tokens are named.
        """
        batch, context = grid.keep.shape
        wanted = torch.ones_like(grid.keep)
        if self.rows is not None:
            outside = [row for row in self.rows if not 0 <= row < batch]
            if outside:
                raise SaekitError(f"{self}: row {outside[0]} is outside a batch of {batch}; count rows from 0")
            chosen = torch.zeros_like(wanted)
            chosen[list(self.rows)] = True
            wanted = wanted & chosen
        if self.steps is not None and grid.number not in self.steps:
            return torch.zeros_like(wanted)
        if self.positions is not None:
            if grid.padded_in_front and max(self.positions) >= 0:
                raise SaekitError(
                    f"{self}: rows begin with padding, so position {max(self.positions)} is another column in each; "
                    "pad on the right, run the rows one by one, or count from the end (-1)"
                )
            chosen = torch.zeros_like(wanted)
            chosen[:, list(self.columns(context, grid.past).values())] = True
            wanted = wanted & chosen
        if self.tokens is not None:
            if grid.ids is None:
                raise SaekitError(f"{self} goes by token ids, but the model was given none; name positions instead")
            wanted = wanted & torch.isin(grid.ids, torch.tensor(self.tokens, device=grid.ids.device))
        masked = wanted & ~grid.keep
        if (self.positions is not None or self.tokens is not None) and bool(masked.any()):
            row, column = masked.nonzero()[0].tolist()
            raise SaekitError(
                f"{self}: position {column + grid.past} of row {row} is masked (BOS, padding or an outlier) and passes "
                "by; name other positions or rows, or pass another mask"
            )
        return wanted & grid.keep

    def columns(self, context: int, past: int) -> dict[int, int]:
        """Of each position that this pass has, its column."""
        found = {
            position: position - past if position >= 0 else context + position for position in self.positions or ()
        }
        return {position: column for position, column in found.items() if 0 <= column < context}


def _several(features: tuple[int, ...]) -> str:
    return ", ".join(map(str, features[:5])) + (f", ... ({len(features)} in all)" if len(features) > 5 else "")
