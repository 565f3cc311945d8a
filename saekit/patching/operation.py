"""What an intervention does to the numbers it finds: one small frozen value per operation.

An operation works on coordinates, `(n_tokens, width)`: the strengths of some features, the component
along one direction, or whole vectors. `Chosen` says which tokens they belong to and turns activations
from elsewhere into the same coordinates.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.errors import SaekitError, ShapeError


@dataclass(frozen=True, slots=True)
class Chosen:
    """The tokens that an operation works on.

    Attributes:
        row: `(n,)` which row of the batch each stands in.
        position: `(n,)` where, counted from the start of the text, what a cache holds included.
        norm: `(n,)` length of each activation vector as it came to the Site, in units of the coordinates.
        draw: number of the draw, for operations that draw at random: the pass and call, made one number.
        read: turns activations `(m, d_model)` of the same Site into coordinates `(m, width)`.
    """

    row: Int[Tensor, " n"]
    position: Int[Tensor, " n"]
    norm: Float[Tensor, " n"]
    draw: int
    read: Callable[[Tensor], Tensor]


@runtime_checkable
class Operation(Protocol):
    """New coordinates from old ones. Pure: randomness comes from a seed and the number of the draw."""

    @property
    def keeps_zero(self) -> bool:
        """Whether 0 stays 0 and elements do not mix, so that inactive features need no visit."""
        ...

    def __call__(self, old: Tensor, chosen: Chosen) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Zero:
    """Ablation by zero."""

    keeps_zero: ClassVar[bool] = True

    def __call__(self, old: Tensor, chosen: Chosen) -> Tensor:
        return torch.zeros_like(old)


@dataclass(frozen=True, slots=True)
class Scale:
    """`by` times what is there."""

    by: float
    keeps_zero: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_finite("Scale", self.by)

    def __call__(self, old: Tensor, chosen: Chosen) -> Tensor:
        return old * self.by


@dataclass(frozen=True, slots=True)
class Clamp:
    """At least `low` and at most `high`; both the same sets the value. None leaves a side open."""

    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        for bound in (self.low, self.high):
            _check_finite("Clamp", 0.0 if bound is None else bound)
        if (self.low is None and self.high is None) or (
            self.low is not None and self.high is not None and self.low > self.high
        ):
            raise SaekitError(f"Clamp got low={self.low}, high={self.high}; give one of them, or low <= high")

    @property
    def keeps_zero(self) -> bool:
        return (self.low is None or self.low <= 0) and (self.high is None or self.high >= 0)

    def __call__(self, old: Tensor, chosen: Chosen) -> Tensor:
        return old.clamp(self.low, self.high)


@dataclass(frozen=True, slots=True, eq=False)
class Mean:
    """Ablation by the mean over activations `(n, d_model)` of the same Site, tokens that count only."""

    vectors: Float[Tensor, "..."]
    keeps_zero: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_some("Mean", self.vectors)

    def __call__(self, old: Tensor, chosen: Chosen) -> Tensor:
        return chosen.read(self.vectors).mean(0).expand_as(old)


@dataclass(frozen=True, slots=True, eq=False)
class Resample:
    """Ablation by what other tokens have: each token takes the values of one of `vectors (n, d_model)`.

    Drawn at random, with replacement, anew in each pass. All coordinates of a token come from one vector,
    so they go together as they do in the pool.
    """

    vectors: Float[Tensor, "..."]
    seed: int = 0
    keeps_zero: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_some("Resample", self.vectors)

    def __call__(self, old: Tensor, chosen: Chosen) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + chosen.draw)
        drawn = torch.randint(len(self.vectors), (len(old),), generator=generator)
        return chosen.read(self.vectors)[drawn.to(old.device)]


@dataclass(frozen=True, slots=True, eq=False)
class ReplaceFrom:
    """What another run had at the same place: `vectors (batch, context, d_model)`, as `Target.read` gives them.

    A batch of one serves every row.
    """

    vectors: Float[Tensor, "..."]
    keeps_zero: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.vectors.ndim != 3:
            raise ShapeError(
                f"ReplaceFrom got {tuple(self.vectors.shape)}; give activations of one call of the Site, "
                "(batch, context, d_model), as Target.read gives them"
            )

    def __call__(self, old: Tensor, chosen: Chosen) -> Tensor:
        batch, context, _ = self.vectors.shape
        row = torch.zeros_like(chosen.row) if batch == 1 else chosen.row
        furthest = int(row.max()), int(chosen.position.max())
        if furthest[0] >= batch or furthest[1] >= context:
            raise ShapeError(
                f"ReplaceFrom holds {batch} rows of {context} tokens, but the edit reaches row {furthest[0]}, position "
                f"{furthest[1]}; read the other run on as many tokens, or name rows and positions"
            )
        there = self.vectors[row.to(self.vectors.device), chosen.position.to(self.vectors.device)]
        return chosen.read(there.to(old.device))


@dataclass(frozen=True, slots=True)
class Add:
    """`amount` more: to a feature's strength, or along a direction of unit length (steering).

    Attributes:
        amount: in units of the activations, or of the codes where features of an SAE with LayerNorm or ConstantNorm are
            named; may be negative.
        relative: `amount` is a share of each token's norm instead, for features with decoder rows of length 1.
        keep_norm: the vector is scaled back to the norm it had; for directions only.
    """

    amount: float
    relative: bool = False
    keep_norm: bool = False
    keeps_zero: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_finite("Add", self.amount)
        if self.amount == 0:
            raise SaekitError("Add(0) changes nothing; give another amount")

    def __call__(self, old: Tensor, chosen: Chosen) -> Tensor:
        return old + (self.amount * chosen.norm[:, None] if self.relative else self.amount)


def _check_finite(name: str, number: float) -> None:
    if not math.isfinite(number):
        raise SaekitError(f"{name}({number}) makes nothing that a model can go on with; give a finite number")


def _check_some(name: str, vectors: Tensor) -> None:
    if vectors.ndim != 2 or len(vectors) == 0:
        raise ShapeError(
            f"{name} got {tuple(vectors.shape)}; give activations of the Site, (n, d_model) with n of at least 1"
        )
