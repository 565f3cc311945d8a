"""Activations whose true features are known: what an SAE should find, without asking a model.

    x = mean + sum over the firing features i of a_i * d_i + noise

Directions `d_i` are random unit vectors, more of them than dimensions. Which features fire is a
`FiringLaw`: densities fall with rank on a Zipf-Mandelbrot curve; features can be made to co-occur in
clusters and to stand under parents. Magnitudes `a_i` are independent of each other and of what else
fires, positive, of mean square 1. The mean can be made large in a few dimensions: activation outliers
are reported to be what kills features (arXiv 2605.31518). All shapes of the law are our choice.

Feature `i` has rank `i + 1`: features are numbered by density, densest first.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import exp, pi
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.activations.batch import ActivationBatch
from saekit.activations.firing import UNGATED, FiringLaw, zipf_densities
from saekit.codes import SparseCodes
from saekit.errors import DataError, SaekitError
from saekit.kernels.entries import decode_rows
from saekit.targets import Site

# where synthetic activations come from, for configs that must name a Site
SYNTHETIC = Site("synthetic")
# tokens are drawn in blocks, each from its own seed, so that any of them can be drawn again
BLOCK_TOKENS = 4096
# a parent is at most this many times nearer to the top than its child, so that the child explains some of it
_FURTHEST_PARENT = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticConfig:
    """What decides a synthetic truth.

    Attributes:
        d_model: dimensions.
        n_features: true features; more than dimensions is superposition.
        l0: mean number of true features per token.
        exponent: density of rank r is proportional to `(r + offset) ** -exponent`.
        most_dense: the largest density; what the curve gives beyond it goes to the other ranks.
        cluster_size: features of neighbouring ranks that share a topic; 0 for none. Children have no topic
            but their parent's.
        correlation: 0 to 1. A topic is as frequent as its densest member to this power: at 1 that member
            fires whenever the topic is there, near 0 the topic is always there and means nothing.
        children: share of features that fire only where another, their parent, does.
        magnitudes: "log-normal" (sigma is `spread`) has few values near zero, "half-normal" many.
        spread: sigma of log-normal magnitudes; 0 makes them all 1.
        noise: standard deviation of Gaussian noise in every dimension.
        mean_size: |mean| over the standard deviation, in every dimension, with random signs.
        outlier_dims: how many dimensions have a larger mean.
        outlier_size: |mean| over the standard deviation in these.
        seed: of directions, parents, mean and which dimensions are outliers.
    """

    d_model: int = 64
    n_features: int = 512
    l0: float = 8.0
    exponent: float = 1.0
    offset: float = 5.0
    most_dense: float = 0.5
    cluster_size: int = 0
    correlation: float = 0.5
    children: float = 0.0
    magnitudes: Literal["log-normal", "half-normal"] = "log-normal"
    spread: float = 0.5
    noise: float = 0.02
    mean_size: float = 0.0
    outlier_dims: int = 0
    outlier_size: float = 30.0
    seed: int = 0

    def __post_init__(self) -> None:
        shares = {"most_dense": self.most_dense, "correlation": self.correlation, "children": self.children}
        for name, share in shares.items():
            if not 0 <= share <= 1 or (name == "most_dense" and share in (0, 1)):
                raise SaekitError(f"{name}={share} is a share; give 0 to 1 (most_dense strictly between)")
        if not 0 <= self.outlier_dims <= self.d_model:
            raise SaekitError(f"{self.outlier_dims} outlier dimensions of {self.d_model}; give 0 to {self.d_model}")
        if self.cluster_size and self.correlation == 0:
            raise SaekitError("correlation=0 makes topics mean nothing; raise it, or set cluster_size=0")

    @property
    def mean_magnitude(self) -> float:
        """Expected magnitude of a feature that fires; the mean square is 1."""
        return (2 / pi) ** 0.5 if self.magnitudes == "half-normal" else exp(-(self.spread**2) / 2)


@dataclass(frozen=True, slots=True, eq=False)
class SyntheticTruth:
    """The features behind synthetic activations; made by `synthetic_truth`.

    Attributes:
        directions: `(n_features, d_model)` of unit norm.
        firing: which features fire together and how often; exact densities are `firing.density`.
        mean: `(d_model,)` the constant part of every vector.
    """

    config: SyntheticConfig
    directions: Float[Tensor, "n_features d_model"]
    firing: FiringLaw
    mean: Float[Tensor, " d_model"]

    @property
    def density(self) -> Float[Tensor, " n_features"]:
        """Share of tokens on which each feature fires; exact."""
        return self.firing.density

    def draw_codes(self, n_tokens: int, generator: torch.Generator) -> SparseCodes:
        """True codes of `n_tokens` tokens: the features that fire and their magnitudes."""
        tokens, features = self.firing.sample(n_tokens, generator)
        normal = torch.randn(len(tokens), generator=generator)
        sigma = self.config.spread
        values = normal.abs() if self.config.magnitudes == "half-normal" else (sigma * normal - sigma**2).exp()
        return SparseCodes.from_pairs(tokens, features, values, n_tokens=n_tokens, n_features=self.config.n_features)

    def vectors(self, codes: SparseCodes) -> Float[Tensor, "n_tokens d_model"]:
        """What tokens with these codes look like, without noise."""
        return decode_rows(codes.values, codes.features, codes.row_starts, self.directions) + self.mean

    def draw(self, n_tokens: int, generator: torch.Generator) -> tuple[Float[Tensor, "n_tokens d_model"], SparseCodes]:
        """Activations of `n_tokens` tokens, and their true codes."""
        codes = self.draw_codes(n_tokens, generator)
        noise = torch.randn(n_tokens, self.config.d_model, generator=generator)
        return self.vectors(codes) + self.config.noise * noise, codes


@dataclass(frozen=True, kw_only=True)
class SyntheticSource:
    """An `ActivationSource` that never repeats itself, and knows the true codes of everything it gave.

    The tokens of a seed are numbered; `document` of a batch holds the numbers. They come in their order,
    since neighbours have nothing in common, and are the same for every size of batch.
    """

    truth: SyntheticTruth
    site: Site = SYNTHETIC

    @property
    def widths(self) -> dict[Site, int]:
        return {self.site: self.truth.config.d_model}

    def stream(self, batch_tokens: int, *, seed: int) -> Iterator[dict[Site, ActivationBatch]]:
        """Batches for ever; another seed gives other tokens of the same truth."""
        held = self._block(0, seed)
        block = 1
        while True:
            while len(held) < batch_tokens:
                held = ActivationBatch.concatenate([held, self._block(block, seed)])
                block += 1
            yield {self.site: held.select(slice(batch_tokens))}
            held = held.select(slice(batch_tokens, None))

    def codes(self, document: Int[Tensor, " n"], *, seed: int) -> SparseCodes:
        """The true codes of tokens that `stream(..., seed=seed)` gave, by their numbers, in the order asked.

        Raises:
            DataError: for a negative number.
        """
        if bool((document < 0).any()):
            raise DataError(f"there is no token {int(document.min())}; pass the `document` of a batch of this source")
        tokens, features, values = [], [], []
        for block in (document // BLOCK_TOKENS).unique().tolist():
            here = (document // BLOCK_TOKENS == block).nonzero()[:, 0]
            drawn = self.truth.draw_codes(BLOCK_TOKENS, self._generator(block, seed))
            codes = drawn.select(document[here] % BLOCK_TOKENS)
            tokens.append(here[codes.token_of_entry()])
            features.append(codes.features)
            values.append(codes.values)
        n_features = self.truth.config.n_features
        if not tokens:
            return SparseCodes.from_dense(torch.zeros(0, n_features))
        return SparseCodes.from_pairs(
            torch.cat(tokens), torch.cat(features), torch.cat(values), n_tokens=len(document), n_features=n_features
        )

    def _block(self, block: int, seed: int) -> ActivationBatch:
        vectors, _ = self.truth.draw(BLOCK_TOKENS, self._generator(block, seed))
        nothing = torch.zeros(BLOCK_TOKENS, dtype=torch.int64)
        number = torch.arange(block * BLOCK_TOKENS, (block + 1) * BLOCK_TOKENS)
        return ActivationBatch(vectors, number, nothing, nothing, nothing, nothing.bool())

    def _generator(self, block: int, seed: int) -> torch.Generator:
        return _hashed_generator(self.truth.config.seed, seed, block)


def synthetic_truth(config: SyntheticConfig) -> SyntheticTruth:
    """Draw directions, parents and mean. The same config gives the same truth, bit by bit."""
    generator = _hashed_generator(config.seed)
    directions = torch.randn(config.n_features, config.d_model, generator=generator)
    firing = _firing_law(config, generator)
    signs = torch.randint(2, (config.d_model,), generator=generator) * 2.0 - 1
    size = torch.full((config.d_model,), config.mean_size)
    size[torch.randperm(config.d_model, generator=generator)[: config.outlier_dims]] = config.outlier_size
    return SyntheticTruth(
        config=config,
        directions=torch.nn.functional.normalize(directions, dim=1),
        firing=firing,
        mean=signs * size * _deviation(config, firing.density),
    )


def _hashed_generator(*numbers: int) -> torch.Generator:
    """A generator of its own for these numbers.

    Not seeded with a number itself: an SAE of the same seed would begin with the very directions that it is
    to find. And torch reads only 32 bits of a seed, which therefore must depend on all numbers.
    """
    entropy = [number & (2**63 - 1) for number in numbers]
    return torch.Generator().manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))


def _deviation(config: SyntheticConfig, density: Tensor) -> float:
    """Root mean variance of a dimension; what features that fire together add to it averages out over directions."""
    variance = density - (density * config.mean_magnitude).square()
    return float((variance.sum() / config.d_model + config.noise**2).sqrt())


def _firing_law(config: SyntheticConfig, generator: torch.Generator) -> FiringLaw:
    density = zipf_densities(
        config.n_features,
        total=config.l0,
        exponent=config.exponent,
        offset=config.offset,
        most=config.most_dense,
    )
    gate = torch.full((config.n_features,), UNGATED)
    # the densest feature has nobody to hang under
    n_children = min(round(config.children * config.n_features), config.n_features - 1)
    children = torch.randperm(config.n_features - 1, generator=generator)[:n_children].sort().values + 1
    is_root = torch.ones(config.n_features, dtype=torch.bool).index_fill(0, children, value=False)
    roots = is_root.nonzero()[:, 0]
    last = torch.searchsorted(roots, children)  # how many roots are denser
    first = torch.minimum(torch.searchsorted(roots, children // _FURTHEST_PARENT), last - 1)
    drawn = torch.rand(n_children, generator=generator, dtype=torch.float64)
    gate[children] = roots[first + (drawn * (last - first)).long()]
    if config.cluster_size == 0:
        return FiringLaw(density, gate, config.n_features)
    topic = torch.arange(len(roots)) // config.cluster_size
    gate[roots] = config.n_features + topic
    frequency = density[roots[:: config.cluster_size]] ** config.correlation
    return FiringLaw(
        torch.cat([density, frequency]),
        torch.cat([gate, torch.full_like(frequency, UNGATED).long()]),
        config.n_features,
    )
