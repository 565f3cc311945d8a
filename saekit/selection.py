"""The rules: which (token, feature) matches an SAE keeps.

Sparsity is an allocation problem. A batch has a budget of `k * n_tokens` matches, and the rules differ
in who competes with whom (Ayonrinde, arXiv 2411.02124, calls the first token choice):

    TopK            every token keeps its k strongest features
    FeatureChoice   every feature keeps its m strongest tokens, with m equal or on a Zipf curve
    MutualChoice    the strongest matches of the whole batch are kept
    Threshold       whatever exceeds a fixed cut: for inference, where there is no batch to compete in

A rule called on dense pre-activations is the definition. `rule.encode` does product and selection in
one, holds no dense matrix, and gives the same codes. ReLU comes after selection; doing it before gives
the same codes, since only positive entries survive either way. A selected entry that ReLU closes stays
in the codes with value zero, so the number of entries is the budget, always.
"""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.codes import SparseCodes
from saekit.errors import SaekitError, ShapeError
from saekit.kernels.entries import encode_entries
from saekit.kernels.select import Selection, above, top_of_all, top_of_columns, top_of_rows

PreActs = Float[Tensor, "n_tokens n_features"]


@runtime_checkable
class SelectionRule(Protocol):
    """Maps encoder pre-activations to sparse codes. Pure: no state, no randomness."""

    looks_across_tokens: ClassVar[bool]
    """True: a token's codes depend on its batch-mates, so the rule cannot serve one prompt."""

    def __call__(self, pre_acts: PreActs) -> SparseCodes: ...

    def encode(
        self,
        x: Float[Tensor, "n_tokens d_model"],
        w_enc: Float[Tensor, "n_features d_model"],
        b_enc: Float[Tensor, " n_features"],
    ) -> SparseCodes: ...


@dataclass(frozen=True, slots=True)
class TopK:
    """Each token keeps its `k` strongest features (Gao et al., arXiv 2406.04093)."""

    k: int
    looks_across_tokens: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check_k("TopK", self.k)

    def __call__(self, pre_acts: PreActs) -> SparseCodes:
        _check_fits(self, pre_acts.shape[1])
        rank = _ranks(pre_acts, dim=1)
        return _codes_where(rank < self.k, pre_acts)

    def encode(self, x: Tensor, w_enc: Tensor, b_enc: Tensor) -> SparseCodes:
        _check_fits(self, len(w_enc))
        return _attach(x, w_enc, b_enc, top_of_rows(x, w_enc, b_enc, self.k))


@dataclass(frozen=True, slots=True)
class MutualChoice:
    """The `k * n_tokens` strongest matches of the batch are kept, whoever they belong to.

    The same selection as BatchTopK (Bussmann et al., arXiv 2412.06410).
    """

    k: int
    looks_across_tokens: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_k("MutualChoice", self.k)

    def __call__(self, pre_acts: PreActs) -> SparseCodes:
        _check_fits(self, pre_acts.shape[1])
        rank = _ranks(pre_acts.flatten()[None], dim=1).view_as(pre_acts)
        return _codes_where(rank < self.k * len(pre_acts), pre_acts)

    def encode(self, x: Tensor, w_enc: Tensor, b_enc: Tensor) -> SparseCodes:
        _check_fits(self, len(w_enc))
        return _attach(x, w_enc, b_enc, top_of_all(x, w_enc, b_enc, self.k * len(x)))


@dataclass(frozen=True, slots=True)
class FeatureChoice:
    """Each feature keeps its strongest tokens: `m_i` of them, with all `m_i` together `k * n_tokens`.

    `m` of the feature of rank `r` (from 1) is proportional to `(r + offset) ** -exponent`, at least 1
    and at most the batch. Exponent 0 is the uniform rule. That budgets follow a Zipf curve is reported
    of the paper; this curve, its caps and the assignment of ranks by running density are our
    reconstruction.

    Attributes:
        ranks: `(n_features,)` place of each feature on the curve, from 0; by index if None.
    """

    k: int
    exponent: float = 0.0
    offset: float = 0.0
    ranks: Int[Tensor, " n_features"] | None = field(default=None, compare=False, repr=False)
    looks_across_tokens: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_k("FeatureChoice", self.k)
        if not (0 <= self.exponent < math.inf and 0 <= self.offset < math.inf):
            raise SaekitError(
                f"FeatureChoice got exponent={self.exponent}, offset={self.offset}; give finite numbers of at least 0 "
                "(budgets fall with rank)"
            )

    def budgets(self, n_tokens: int, n_features: int) -> Int[Tensor, " n_features"]:
        """Tokens granted to each rank, largest first; they sum to exactly `k * n_tokens`.

        Raises:
            SaekitError: if the batch is too small to grant every feature one token.
        """
        return zipf_budgets(
            self.k, n_tokens=n_tokens, n_features=n_features, exponent=self.exponent, offset=self.offset
        )

    def __call__(self, pre_acts: PreActs) -> SparseCodes:
        _check_fits(self, pre_acts.shape[1])
        rank = _ranks(pre_acts, dim=0)
        return _codes_where(
            rank < self.feature_budgets(pre_acts.shape[0], pre_acts.shape[1], pre_acts.device), pre_acts
        )

    def encode(self, x: Tensor, w_enc: Tensor, b_enc: Tensor) -> SparseCodes:
        _check_fits(self, len(w_enc))
        budgets = self.feature_budgets(len(x), len(w_enc), x.device)
        return _attach(x, w_enc, b_enc, top_of_columns(x, w_enc, b_enc, budgets))

    def feature_budgets(self, n_tokens: int, n_features: int, device: torch.device) -> Int[Tensor, " n_features"]:
        """Tokens granted to each feature: the budget of its rank."""
        by_rank = self.budgets(n_tokens, n_features).to(device)
        if self.ranks is None:
            return by_rank
        if len(self.ranks) != n_features:
            raise ShapeError(
                f"FeatureChoice has ranks for {len(self.ranks)} features, but the dictionary has {n_features}"
            )
        return by_rank[self.ranks.to(device)]


@dataclass(frozen=True, slots=True, eq=False)
class Threshold:
    """Keeps what exceeds a fixed cut, one for all features or one each: the rule for inference.

    An SAE with this rule is a JumpReLU SAE (Rajamanoharan et al., arXiv 2407.14435).
    """

    theta: float | Float[Tensor, " n_features"]
    looks_across_tokens: ClassVar[bool] = False

    def __call__(self, pre_acts: PreActs) -> SparseCodes:
        theta = self.per_feature(pre_acts.shape[1], pre_acts)
        return _codes_where(pre_acts > theta, pre_acts)

    def encode(self, x: Tensor, w_enc: Tensor, b_enc: Tensor) -> SparseCodes:
        return _attach(x, w_enc, b_enc, above(x, w_enc, b_enc, self.per_feature(len(w_enc), x)))

    def per_feature(self, n_features: int, like: Tensor) -> Float[Tensor, " n_features"]:
        """The cut of each feature, on the device and in the type of `like`.

        Raises:
            ShapeError: if there is one cut per feature, but for another number of features.
        """
        theta = torch.as_tensor(self.theta).to(like)
        if theta.ndim and len(theta) != n_features:
            raise ShapeError(f"Threshold holds {len(theta)} cuts, but the dictionary has {n_features} features")
        # a negative cut would let entries through that ReLU closes anyway
        return theta.expand(n_features).clamp(min=0)


def zipf_budgets(
    k: int, *, n_tokens: int, n_features: int, exponent: float, offset: float
) -> Int[Tensor, " n_features"]:
    """Integers `m_1 >= m_2 >= ...` on a capped Zipf-Mandelbrot curve with sum exactly `k * n_tokens`.

    The curve `c * (r + offset) ** -exponent` is clipped to `[1, n_tokens]`, `c` is found by bisection so
    that the clipped curve has the right sum, and the units lost by rounding down go to the largest
    fractional parts, lower ranks first.

    Raises:
        SaekitError: if there are fewer matches than features, naming the smallest batch that works.
    """
    total = k * n_tokens
    if total < n_features:
        smallest = -(-n_features // k)
        raise SaekitError(
            f"FeatureChoice(k={k}) has {total:,} matches in a batch of {n_tokens:,} tokens to share among "
            f"{n_features:,} features; use a batch of at least {smallest:,} tokens"
        )
    if k > n_features:
        raise SaekitError(f"k={k} is more than the {n_features:,} features there are; choose a smaller k")
    # in logarithms, since a steep curve leaves the range of floating point
    log_weights = -exponent * (torch.arange(1, n_features + 1, dtype=torch.float64) + offset).log()
    low, high = -float(log_weights[0]), math.log(n_tokens) - float(log_weights[-1])
    for _ in range(100):
        log_scale = (low + high) / 2
        if float((log_scale + log_weights).exp().clamp(1, n_tokens).sum()) < total:
            low = log_scale
        else:
            high = log_scale
    exact = (high + log_weights).exp().clamp(1, n_tokens)
    budgets = exact.floor().to(torch.int64)
    missing = total - int(budgets.sum())
    order = (exact - budgets).sub((budgets >= n_tokens).double()).sort(descending=True, stable=True).indices
    while missing > 0:  # more than once round only when rounding left more units than features below the cap
        open_ranks = order[budgets[order] < n_tokens][:missing]
        budgets[open_ranks] += 1
        missing -= len(open_ranks)
    return budgets.sort(descending=True).values


def _check_k(name: str, k: int) -> None:
    if k < 1:
        raise SaekitError(f"{name}(k={k}): k is the mean number of active features per token; give at least 1")


def _check_fits(rule: TopK | MutualChoice | FeatureChoice, n_features: int) -> None:
    if rule.k >= n_features:
        raise SaekitError(
            f"{type(rule).__name__}(k={rule.k}) on {n_features:,} features would keep everything; "
            "choose k below the number of features"
        )


def _ranks(scores: Tensor, *, dim: int) -> Tensor:
    """Place of every element along `dim` when sorted: larger first, then lower index."""
    order = scores.detach().argsort(dim=dim, descending=True, stable=True)
    places = torch.arange(scores.shape[dim], device=scores.device)
    places = places[:, None] if dim == 0 else places[None]
    return torch.empty_like(order).scatter_(dim, order, places.expand_as(order))


def _codes_where(kept: Tensor, pre_acts: Tensor) -> SparseCodes:
    tokens, features = kept.nonzero(as_tuple=True)
    return SparseCodes.from_pairs(
        tokens, features, pre_acts[tokens, features].relu(), n_tokens=kept.shape[0], n_features=kept.shape[1]
    )


def _attach(x: Tensor, w_enc: Tensor, b_enc: Tensor, selection: Selection) -> SparseCodes:
    values = encode_entries(x, w_enc, b_enc, selection)
    return SparseCodes(values, selection.features, selection.row_starts, len(w_enc))
