"""Activation vectors and where each came from, and who can supply them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit.errors import DataError, ShapeError
from saekit.targets import Site


@dataclass(frozen=True, slots=True)
class ActivationBatch:
    """Rows of activations with their addresses.

    Attributes:
        vectors: `(n, d_model)`.
        document: `(n,)` which sequence the model read: the row of its `TokenRows`.
        position: `(n,)` place in that sequence.
        token: `(n,)` id of the token there.
        step: `(n,)` which call of the module produced the vector; 0 unless the module is looped.
        halted: `(n,)` True where an adaptive model had already stopped working on the token.
    """

    vectors: Float[Tensor, "n d_model"]
    document: Int[Tensor, " n"]
    position: Int[Tensor, " n"]
    token: Int[Tensor, " n"]
    step: Int[Tensor, " n"]
    halted: Bool[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.vectors)

    @property
    def d_model(self) -> int:
        return self.vectors.shape[1]

    def check_same_tokens(self, other: "ActivationBatch") -> None:
        """Raises: ShapeError if the other's rows are not of the same tokens, as where a mask goes by norms."""
        if not (torch.equal(self.document, other.document) and torch.equal(self.position, other.position)):
            raise ShapeError(
                f"{len(self)} tokens at one Site and {len(other)}, or others, at another; leave max_norm out of the "
                "mask, or let the source give every Site the same documents and positions"
            )

    def select(self, rows: Int[Tensor, " chosen"] | slice) -> "ActivationBatch":
        """Some of the rows, in the order given."""
        return replace(self, **{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    @classmethod
    def concatenate(cls, batches: list["ActivationBatch"]) -> "ActivationBatch":
        return cls(**{field.name: torch.cat([getattr(b, field.name) for b in batches]) for field in fields(cls)})

    @classmethod
    def from_vectors(cls, vectors: Float[Tensor, "n d_model"]) -> "ActivationBatch":
        """Vectors from nowhere in particular: each is its own document."""
        n = len(vectors)
        zero = torch.zeros(n, dtype=torch.int64)
        return cls(vectors, torch.arange(n), zero, zero, zero, torch.zeros(n, dtype=torch.bool))

    def check_finite(self, site: Site) -> "ActivationBatch":
        """Return self.

        Raises:
            DataError: naming the first row that holds NaN or infinity.
        """
        bad = ~self.vectors.isfinite().all(dim=1)
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise DataError(
                f"activations at {site} are not finite: {int(bad.sum()):,} of {len(self):,} vectors, "
                f"first in row {int(self.document[row])} at position {int(self.position[row])}; "
                "check the model's dtype (float16 overflows)"
            )
        return self


@runtime_checkable
class ActivationSource(Protocol):
    """Anything that training can draw shuffled activations from, for ever."""

    @property
    def widths(self) -> Mapping[Site, int]:
        """`d_model` at each Site that this source supplies."""
        ...

    def stream(self, batch_tokens: int, *, seed: int) -> Iterator[Mapping[Site, ActivationBatch]]:
        """Batches of exactly `batch_tokens` rows; the same rows for every Site; endless."""
        ...
