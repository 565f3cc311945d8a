"""How often each feature fires: running density, the Zipf curve through it, dead and under-used features.

Sorted densities of a trained SAE follow a Zipf-Mandelbrot line, `density(r) ~ (r + offset) ** -exponent`,
over most ranks and fall below it at the low end. Features under the line are the ones that the
auxiliary losses try to revive. (The observation is reported of arXiv 2411.02124; estimator, fit and
thresholds here are our reconstruction.)
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit.codes import SparseCodes


@dataclass(slots=True)
class RunningDensity:
    """Densities over training; part of the training state, updated in place by `observe`.

    Attributes:
        average: `(n_features,)` exponential moving average of the share of tokens a feature fires on,
            before bias correction.
        tokens_since_fired: `(n_features,)`.
        weight: how much of the average is filled; 0 at the start, towards 1.
        horizon: tokens over which the average forgets.
    """

    average: Float[Tensor, " n_features"]
    tokens_since_fired: Int[Tensor, " n_features"]
    weight: float = 0.0
    horizon: float = 500_000.0

    @classmethod
    def new(
        cls, n_features: int, *, horizon: float = 500_000.0, device: torch.device | str = "cpu"
    ) -> "RunningDensity":
        return cls(
            average=torch.zeros(n_features, dtype=torch.float64, device=device),
            tokens_since_fired=torch.zeros(n_features, dtype=torch.int64, device=device),
            horizon=horizon,
        )

    def observe(self, codes: SparseCodes) -> None:
        """Take in one batch of codes."""
        if not codes.n_tokens:
            return
        counts = codes.feature_counts()
        keep = 2.0 ** (-codes.n_tokens / self.horizon)
        self.average.mul_(keep).add_(counts.to(self.average) / codes.n_tokens, alpha=1 - keep)
        self.weight = keep * self.weight + (1 - keep)
        self.tokens_since_fired += codes.n_tokens
        self.tokens_since_fired.masked_fill_(counts > 0, 0)

    @property
    def density(self) -> Float[Tensor, " n_features"]:
        """Share of tokens on which each feature fires; zeros before the first batch."""
        return self.average / self.weight if self.weight else self.average.clone()

    def ranks(self) -> Int[Tensor, " n_features"]:
        """Place of each feature by density, densest first; among equals by index."""
        order = self.average.argsort(descending=True, stable=True)
        return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))


@dataclass(frozen=True, slots=True)
class ZipfFit:
    """The line `density(r) = scale * (r + offset) ** -exponent` over ranks `r` from 1."""

    exponent: float
    offset: float
    scale: float

    def expected(self, n_features: int) -> Float[Tensor, " n_features"]:
        """Density of each rank on the line, densest first, at most 1."""
        ranks = torch.arange(1, n_features + 1, dtype=torch.float64)
        return (self.scale * (ranks + self.offset) ** -self.exponent).clamp(max=1.0)


def zipf_fit(density: Float[Tensor, " n_features"], *, lowest: float = 0.001, highest: float = 0.65) -> ZipfFit:
    """Least squares of log density on log(rank + offset) over the middle ranks, on log-spaced ranks.

    The densest ranks are capped and the rarest fall under the line, so only ranks between `lowest` and
    `highest` (shares of `n_features`) take part, and features that never fired take no part. With
    fewer than three usable ranks the line is flat.
    """
    ranked = density.detach().double().cpu().sort(descending=True).values
    n_alive = int((ranked > 0).sum())
    first = int(lowest * len(ranked)) + 1
    last = min(n_alive, max(first + 2, int(highest * len(ranked))))
    ranks = torch.logspace(0, 1, 200, base=max(last / first, 1.0 + 1e-9), dtype=torch.float64).mul(first)
    ranks = ranks.round().long().clamp(max=max(last, 1)).unique()
    if n_alive < 3 or len(ranks) < 3:
        return ZipfFit(exponent=0.0, offset=0.0, scale=float(ranked.mean()) if len(ranked) else 0.0)
    # one straight-line fit per candidate offset, all at once
    offsets = torch.cat([torch.zeros(1), torch.logspace(-1, 3, 60)]).double()
    log_rank = (ranks + offsets[:, None]).log()  # (offsets, ranks)
    log_density = ranked[ranks - 1].log()
    centred = log_rank - log_rank.mean(1, keepdim=True)
    slope = (centred * (log_density - log_density.mean())).sum(1) / centred.square().sum(1)
    intercept = log_density.mean() - slope * log_rank.mean(1)
    error = (intercept[:, None] + slope[:, None] * log_rank - log_density).square().sum(1)
    error = error.masked_fill(intercept > 700, torch.inf)  # its exponential would be infinite, and the line nan
    best = int(error.argmin())
    return ZipfFit(exponent=-float(slope[best]), offset=float(offsets[best]), scale=float(intercept[best].exp()))


def expected_density(density: Float[Tensor, " n_features"], fit: ZipfFit) -> Float[Tensor, " n_features"]:
    """What each feature's density would be if its rank lay on the line."""
    order = density.argsort(descending=True, stable=True)
    line = fit.expected(len(density)).to(density)
    return torch.empty_like(density).scatter_(0, order, line)


def dead(tokens_since_fired: Int[Tensor, " n_features"], *, after: int) -> Bool[Tensor, " n_features"]:
    """Features that have not fired for more than `after` tokens."""
    return tokens_since_fired > after


def underused(
    density: Float[Tensor, " n_features"], expected: Float[Tensor, " n_features"], *, below: float = 0.5
) -> Bool[Tensor, " n_features"]:
    """Features that fire less than `below` times as often as the line expects of their rank."""
    return density < below * expected
