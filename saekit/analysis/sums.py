"""What an evaluation adds up over batches; in float64 and integers, so that the order of batches does not show."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.codes import SparseCodes
from saekit.density import expected_density, underused, zipf_fit
from saekit.errors import DataError


class Unexplained:
    """Squared error of reconstructions, and the spread of what they reconstruct."""

    def __init__(self, width: int):
        self.tokens = 0
        self.error = 0.0
        self.total_square = 0.0
        self.total = torch.zeros(width, dtype=torch.float64)

    def observe(self, exact: Float[Tensor, "n width"], reconstructed: Float[Tensor, "n width"]) -> None:
        exact = exact.double()
        self.error += float((exact - reconstructed).square().sum())
        self.total_square += float(exact.square().sum())
        self.total += exact.sum(0).cpu()
        self.tokens += len(exact)

    @property
    def mean(self) -> Float[Tensor, " width"]:
        return self.total / self.tokens

    @property
    def fvu(self) -> float:
        """Raises DataError where there is no variance to explain."""
        variance = self.total_square - self.tokens * float(self.mean.square().sum())
        # what is left of equal vectors is rounding
        if variance <= 1e-12 * self.total_square:
            raise DataError(
                f"all {self.tokens:,} activations are equal, so that there is no variance to explain; "
                "give more text, or check the Site"
            )
        return self.error / variance


class Usage:
    """How often each feature fires, and how many fire on a token.

    Attributes:
        l0_counts: `(most + 1,)` tokens with 0, 1, 2, ... active features.
    """

    def __init__(self, n_features: int):
        self.tokens = 0
        self.counts = torch.zeros(n_features, dtype=torch.int64)
        self.l0_counts: Int[Tensor, " most"] = torch.zeros(1, dtype=torch.int64)

    def observe(self, codes: SparseCodes) -> None:
        self.tokens += codes.n_tokens
        self.counts += codes.feature_counts().cpu()
        batch_l0 = torch.bincount(codes.l0().cpu())
        longest = max(len(self.l0_counts), len(batch_l0))
        self.l0_counts = _padded(self.l0_counts, longest) + _padded(batch_l0, longest)

    @property
    def density(self) -> Float[Tensor, " n_features"]:
        return self.counts.double() / self.tokens

    def metrics(self) -> dict[str, Any]:
        """The fields of an evaluation that are about codes alone."""
        cumulative = self.l0_counts.cumsum(0).double() / self.tokens
        values = torch.arange(len(self.l0_counts), dtype=torch.float64)
        density = self.density
        fit = zipf_fit(density)
        behind = underused(density, expected_density(density, fit)) & (density > 0)
        return {
            "tokens": self.tokens,
            "l0": float((values * self.l0_counts).sum() / self.tokens),
            "l0_p5": float(values[(cumulative >= 0.05).nonzero()[0, 0]]),
            "l0_p95": float(values[(cumulative >= 0.95).nonzero()[0, 0]]),
            "dead_fraction": float((density == 0).double().mean()),
            "underused_fraction": float(behind.double().mean()),
            "density": density,
            "l0_counts": self.l0_counts,
            "zipf": fit,
        }


def _padded(counts: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(counts, (0, length - len(counts)))
