"""Sparse codes: what an SAE's encoder hands out and its decoder takes."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit.errors import ShapeError


@dataclass(frozen=True, slots=True)
class SparseCodes:
    """Which features are active on which token, and how strongly, in compressed-row form.

    Row `t` owns the slice `row_starts[t]:row_starts[t + 1]` of `values` and `features`. The number of
    entries is the sparsity budget, so it is the same for every batch under TopK, FeatureChoice and
    MutualChoice alike. A padded `(n_tokens, k)` rectangle keeps its size only under TopK.

    Attributes:
        values: activation strengths, `(nnz,)`. Zero where ReLU closed a selected entry: it is kept, so that
            sizes stay known without asking the device, and counts as not active. Negative only under a
            rule without ReLU.
        features: feature index of each value, `(nnz,)`, each in `[0, n_features)`.
        row_starts: `(n_tokens + 1,)`, non-decreasing, from 0 to `nnz`.
        n_features: width of the dictionary.

    Construction checks shapes only, which costs nothing; `validate` reads the contents, which waits
    for the device, and belongs where data enters the program.
    """

    values: Float[Tensor, " nnz"]
    features: Int[Tensor, " nnz"]
    row_starts: Int[Tensor, " rows"]
    n_features: int

    def __post_init__(self) -> None:
        if self.values.shape != self.features.shape or self.values.ndim != 1 or self.row_starts.ndim != 1:
            raise ShapeError(
                f"values {tuple(self.values.shape)}, features {tuple(self.features.shape)} and row_starts "
                f"{tuple(self.row_starts.shape)} do not form codes; expected (nnz,), (nnz,) and (n_tokens + 1,)"
            )

    @classmethod
    def from_pairs(
        cls,
        tokens: Int[Tensor, " nnz"],
        features: Int[Tensor, " nnz"],
        values: Float[Tensor, " nnz"],
        *,
        n_tokens: int,
        n_features: int,
    ) -> "SparseCodes":
        """Codes from (token, feature, value) triples in any order; entries come out by token, then feature."""
        order = (tokens * n_features + features).argsort()
        counts = torch.bincount(tokens, minlength=n_tokens)
        row_starts = torch.zeros(n_tokens + 1, dtype=torch.int64, device=tokens.device)
        torch.cumsum(counts, 0, out=row_starts[1:])
        return cls(values[order], features[order], row_starts, n_features)

    @classmethod
    def from_dense(cls, dense: Float[Tensor, "n_tokens n_features"]) -> "SparseCodes":
        """The non-zero entries of a dense matrix; for small examples and for other people's encoders."""
        tokens, features = dense.nonzero(as_tuple=True)
        return cls.from_pairs(
            tokens, features, dense[tokens, features], n_tokens=dense.shape[0], n_features=dense.shape[1]
        )

    @property
    def n_tokens(self) -> int:
        return len(self.row_starts) - 1

    @property
    def device(self) -> torch.device:
        return self.values.device

    def token_of_entry(self) -> Int[Tensor, " nnz"]:
        """The row that each entry belongs to."""
        tokens = torch.arange(self.n_tokens, device=self.device)
        return tokens.repeat_interleave(self.row_starts.diff(), output_size=len(self.values))

    def l0(self) -> Int[Tensor, " n_tokens"]:
        """Active (non-zero) entries of each token."""
        active = (self.values != 0).to(torch.int64)
        return torch.zeros(self.n_tokens, dtype=torch.int64, device=self.device).index_add_(
            0, self.token_of_entry(), active
        )

    def feature_counts(self) -> Int[Tensor, " n_features"]:
        """On how many tokens each feature is active."""
        counts = torch.zeros(self.n_features, dtype=torch.int64, device=self.device)
        return counts.index_add_(0, self.features, (self.values != 0).to(torch.int64))

    def to_dense(self) -> Float[Tensor, "n_tokens n_features"]:
        """The matrix; differentiable in `values`."""
        dense = self.values.new_zeros(self.n_tokens, self.n_features)
        return dense.index_put((self.token_of_entry(), self.features), self.values)

    def by_feature(self) -> "FeatureColumns":
        """The same entries, grouped by feature: for weight gradients and for feature pages."""
        order = self.features.argsort(stable=True)
        starts = torch.zeros(self.n_features + 1, dtype=torch.int64, device=self.device)
        torch.cumsum(torch.bincount(self.features, minlength=self.n_features), 0, out=starts[1:])
        return FeatureColumns(
            values=self.values[order],
            tokens=self.token_of_entry()[order],
            column_starts=starts,
            n_tokens=self.n_tokens,
        )

    def active(self) -> "SparseCodes":
        """Only the active entries. Waits for the device, since their number is not known beforehand."""
        return self.where(self.values != 0)

    def where(self, kept: Bool[Tensor, " nnz"]) -> "SparseCodes":
        """Only some of the entries, in the same order. Waits for the device, to learn how many."""
        kept_before = torch.nn.functional.pad(kept.cumsum(0), (1, 0))
        return SparseCodes(self.values[kept], self.features[kept], kept_before[self.row_starts], self.n_features)

    def select(self, tokens: Int[Tensor, " chosen"]) -> "SparseCodes":
        """The rows of some tokens, in the order given."""
        lengths = self.row_starts.diff()[tokens]
        row_starts = torch.zeros(len(tokens) + 1, dtype=torch.int64, device=self.device)
        torch.cumsum(lengths, 0, out=row_starts[1:])
        first = self.row_starts[:-1][tokens] - row_starts[:-1]
        entries = first.repeat_interleave(lengths) + torch.arange(int(row_starts[-1]), device=self.device)
        return SparseCodes(self.values[entries], self.features[entries], row_starts, self.n_features)

    def with_values(self, values: Float[Tensor, " nnz"]) -> "SparseCodes":
        """The same entries with other strengths."""
        return SparseCodes(values, self.features, self.row_starts, self.n_features)

    def to(self, device: torch.device | str) -> "SparseCodes":
        return SparseCodes(
            self.values.to(device), self.features.to(device), self.row_starts.to(device), self.n_features
        )

    def validate(self) -> "SparseCodes":
        """Return self.

        Raises:
            ShapeError: naming the first attribute whose contents break the rules above.
        """
        if int(self.row_starts[0]) != 0 or bool((self.row_starts.diff() < 0).any()):
            raise ShapeError("row_starts must begin at 0 and never fall; SparseCodes.from_pairs builds them")
        if int(self.row_starts[-1]) != len(self.values):
            raise ShapeError(
                f"row_starts ends at {int(self.row_starts[-1])}, but there are {len(self.values)} values; "
                "SparseCodes.from_pairs keeps the two in step"
            )
        if len(self.features) and not 0 <= int(self.features.min()) <= int(self.features.max()) < self.n_features:
            raise ShapeError(
                f"features reach from {int(self.features.min())} to {int(self.features.max())}, outside a dictionary "
                f"of {self.n_features}; were these codes made by a different SAE?"
            )
        return self


@dataclass(frozen=True, slots=True)
class FeatureColumns:
    """Codes grouped by feature: column `i` owns the slice `column_starts[i]:column_starts[i + 1]`.

    Attributes:
        values: `(nnz,)`, ordered by feature, then token.
        tokens: `(nnz,)` the token of each value.
        column_starts: `(n_features + 1,)`.
        n_tokens: how many tokens the codes describe.
    """

    values: Float[Tensor, " nnz"]
    tokens: Int[Tensor, " nnz"]
    column_starts: Int[Tensor, " columns"]
    n_tokens: int
