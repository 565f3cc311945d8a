"""The rules: which (token, feature) matches an SAE keeps.

Sparsity is an allocation problem. A batch has a budget of `k * n_tokens` matches, and the rules differ
in who competes with whom (Ayonrinde, arXiv 2411.02124, calls the first token choice):

    TopK            every token keeps its k strongest features
    FeatureChoice   every feature keeps its m strongest tokens, with m equal or on a Zipf curve
    MutualChoice    the strongest matches of the whole batch are kept
    Threshold       whatever exceeds a fixed cut: for inference, where there is no batch to compete in
    AbsTopK         every token keeps its k largest in size, of either sign
    GroupMax        every token keeps the strongest feature of each of k groups

A rule called on dense pre-activations is the definition. `rule.encode` does product and selection in
one, holds no dense matrix, and gives the same codes. ReLU comes after selection; doing it before gives
the same codes, since only positive entries survive either way. A selected entry that ReLU closes stays
in the codes with value zero, so the number of entries is the budget, always. With `relu=False` a rule
keeps what it selects as it is, negative values included: another model, in which under Feature Choice
no feature can be dead.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.budgets import smallest_batch, zipf_budgets, zipf_shares
from saekit.codes import SparseCodes
from saekit.errors import SaekitError, ShapeError
from saekit.kernels.entries import encode_entries
from saekit.kernels.select import Selection, above, top_of_all, top_of_columns, top_of_groups, top_of_rows

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


def check_serves_prompts(rule: SelectionRule) -> None:
    """Refuse a rule under which a prompt's later tokens would change what its earlier ones mean.

    Raises:
        SaekitError: naming the rule.
    """
    if rule.looks_across_tokens:
        raise SaekitError(
            f"{type(rule).__name__} decides over a batch and cannot serve a prompt; give the SAE thresholds: "
            "`saekit convert SAE OUT --calibrate 100000`"
        )


class _Briefly:
    """Prints a rule as one would write it: what is as usual is left out."""

    __slots__ = ()

    def __repr__(self) -> str:
        shown = [f for f in fields(self) if f.repr and getattr(self, f.name) != f.default]  # pyright: ignore[reportArgumentType]
        return f"{type(self).__name__}({', '.join(f'{f.name}={getattr(self, f.name)!r}' for f in shown)})"


@dataclass(frozen=True, slots=True, repr=False)
class TopK(_Briefly):
    """Each token keeps its `k` strongest features (Gao et al., arXiv 2406.04093)."""

    k: int
    relu: bool = True
    looks_across_tokens: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_k("TopK", self.k)

    def __call__(self, pre_acts: PreActs) -> SparseCodes:
        _check_fits(self, pre_acts.shape[1])
        rank = _ranks(pre_acts, dim=1)
        return _codes_where(rank < self.k, pre_acts, relu=self.relu)

    def encode(self, x: Tensor, w_enc: Tensor, b_enc: Tensor) -> SparseCodes:
        _check_fits(self, len(w_enc))
        return _attach(x, w_enc, b_enc, top_of_rows(x, w_enc, b_enc, self.k), relu=self.relu)


@dataclass(frozen=True, slots=True, repr=False)
class AbsTopK(_Briefly):
    """Each token keeps the `k` pre-activations that are largest in size, with their signs."""

    k: int
    looks_across_tokens: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_k("AbsTopK", self.k)

    def __call__(self, pre_acts: PreActs) -> SparseCodes:
        _check_fits(self, pre_acts.shape[1])
        return _codes_where(_ranks(pre_acts.abs(), dim=1) < self.k, pre_acts, relu=False)

    def encode(self, x: Tensor, w_enc: Tensor, b_enc: Tensor) -> SparseCodes:
        _check_fits(self, len(w_enc))
        return _attach(x, w_enc, b_enc, top_of_rows(x, w_enc, b_enc, self.k, by_size=True), relu=False)


@dataclass(frozen=True, slots=True, repr=False)
class GroupMax(_Briefly):
    """Each token keeps the strongest feature of each of `k` groups of neighbours (EleutherAI's sparsify)."""

    k: int
    looks_across_tokens: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_k("GroupMax", self.k)

    def __call__(self, pre_acts: PreActs) -> SparseCodes:
        self._check_groups(pre_acts.shape[1])
        grouped = pre_acts.unflatten(1, (self.k, -1))
        return _codes_where((_ranks(grouped.flatten(0, 1), dim=1) < 1).view_as(pre_acts), pre_acts)

    def encode(self, x: Tensor, w_enc: Tensor, b_enc: Tensor) -> SparseCodes:
        self._check_groups(len(w_enc))
        return _attach(x, w_enc, b_enc, top_of_groups(x, w_enc, b_enc, self.k))

    def _check_groups(self, n_features: int) -> None:
        _check_fits(self, n_features)
        if n_features % self.k:
            raise SaekitError(
                f"GroupMax(k={self.k}) cannot divide {n_features:,} features into groups of one size; "
                "choose a k that divides the number of features"
            )


@dataclass(frozen=True, slots=True, repr=False)
class MutualChoice(_Briefly):
    """The `k * n_tokens` strongest matches of the batch are kept, whoever they belong to.

    The same selection as BatchTopK (Bussmann et al., arXiv 2412.06410).
    """

    k: int
    relu: bool = True
    looks_across_tokens: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_k("MutualChoice", self.k)

    def __call__(self, pre_acts: PreActs) -> SparseCodes:
        _check_fits(self, pre_acts.shape[1])
        rank = _ranks(pre_acts.flatten()[None], dim=1).view_as(pre_acts)
        return _codes_where(rank < self.k * len(pre_acts), pre_acts, relu=self.relu)

    def encode(self, x: Tensor, w_enc: Tensor, b_enc: Tensor) -> SparseCodes:
        _check_fits(self, len(w_enc))
        return _attach(x, w_enc, b_enc, top_of_all(x, w_enc, b_enc, self.k * len(x)), relu=self.relu)


@dataclass(frozen=True, slots=True, repr=False)
class FeatureChoice(_Briefly):
    """Each feature keeps its strongest tokens: `m_i` of them, with all `m_i` together `k * n_tokens`.

    `m` of the feature of rank `r` (from 1) is proportional to `(r + offset) ** -exponent`; see
    `saekit.budgets`. Exponent 0 is the uniform rule. That budgets follow a Zipf curve is reported of the
    paper; this curve, its caps and floors and the assignment of ranks by density are our reconstruction.

    Attributes:
        exponent: how fast budgets fall with rank.
        offset: how flat the curve is among the first ranks.
        floor: least budget of a feature, in tokens; None lets the curve decide, and asks for a batch so
            large that it grants the last rank a token.
        cap: largest share of the batch that a feature may have.
        ranks: `(n_features,)` place of each feature on the curve, from 0; by index if None.
    """

    k: int
    exponent: float = 0.0
    offset: float = 0.0
    floor: int | None = None
    cap: float = 1.0
    relu: bool = True
    ranks: Int[Tensor, " n_features"] | None = field(default=None, compare=False, repr=False)
    looks_across_tokens: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_k("FeatureChoice", self.k)
        if not (0 <= self.exponent < math.inf and 0 <= self.offset < math.inf):
            raise SaekitError(
                f"FeatureChoice got exponent={self.exponent}, offset={self.offset}; give finite numbers of at least 0 "
                "(budgets fall with rank)"
            )
        if not (0 < self.cap <= 1) or (self.floor is not None and self.floor < 0):
            raise SaekitError(
                f"FeatureChoice got floor={self.floor}, cap={self.cap}; give a floor of at least 0 tokens "
                "and a cap above 0 and up to 1, a share of the batch"
            )

    def budgets(self, n_tokens: int, n_features: int) -> Int[Tensor, " n_features"]:
        """Tokens granted to each rank, largest first; they sum to exactly `k * n_tokens`.

        Raises:
            SaekitError: if the batch is too small to grant every feature its least budget.
        """
        return zipf_budgets(self.k, n_tokens=n_tokens, **self._curve(n_features))

    def densities(self, n_features: int) -> Float[Tensor, " n_features"]:
        """Share of the tokens that the curve grants each rank, whatever the batch; without the floor.

        Raises:
            SaekitError: if so few features, capped so, cannot spend `k` on every token.
        """
        return zipf_shares(
            self.k, n_features=n_features, exponent=self.exponent, offset=self.offset, most=self.cap
        ).clone()

    def smallest_batch(self, n_features: int) -> int:
        """The fewest tokens that these budgets can be shared over."""
        return smallest_batch(self.k, **self._curve(n_features))

    def _curve(self, n_features: int) -> dict[str, Any]:
        return {
            "n_features": n_features,
            "exponent": self.exponent,
            "offset": self.offset,
            "floor": self.floor,
            "cap": self.cap,
        }

    def __call__(self, pre_acts: PreActs) -> SparseCodes:
        _check_fits(self, pre_acts.shape[1])
        budgets = self.feature_budgets(len(pre_acts), pre_acts.shape[1], pre_acts.device)
        return _codes_where(_ranks(pre_acts, dim=0) < budgets, pre_acts, relu=self.relu)

    def encode(self, x: Tensor, w_enc: Tensor, b_enc: Tensor) -> SparseCodes:
        _check_fits(self, len(w_enc))
        budgets = self.feature_budgets(len(x), len(w_enc), x.device)
        return _attach(x, w_enc, b_enc, top_of_columns(x, w_enc, b_enc, budgets), relu=self.relu)

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


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Threshold:
    """Keeps what exceeds a fixed cut, one for all features or one each: the rule for inference.

    An SAE with this rule is a JumpReLU SAE (Rajamanoharan et al., arXiv 2407.14435).
    """

    theta: float | Float[Tensor, " n_features"]
    relu: bool = True
    looks_across_tokens: ClassVar[bool] = False

    def __repr__(self) -> str:
        """Without the cuts themselves, of which there may be a hundred thousand."""
        theta = torch.as_tensor(self.theta)
        cuts = f"{len(theta):,} cuts, {theta.min():.4g} to {theta.max():.4g}" if theta.ndim else f"{float(theta):.6g}"
        return f"Threshold({cuts}{'' if self.relu else ', relu=False'})"

    def __call__(self, pre_acts: PreActs) -> SparseCodes:
        theta = self.per_feature(pre_acts.shape[1], pre_acts)
        return _codes_where(pre_acts > theta, pre_acts, relu=self.relu)

    def encode(self, x: Tensor, w_enc: Tensor, b_enc: Tensor) -> SparseCodes:
        theta = self.per_feature(len(w_enc), x)
        return _attach(x, w_enc, b_enc, above(x, w_enc, b_enc, theta), relu=self.relu)

    def per_feature(self, n_features: int, like: Tensor) -> Float[Tensor, " n_features"]:
        """The cut of each feature, on the device and in the type of `like`.

        Raises:
            ShapeError: if there is one cut per feature, but for another number of features.
        """
        theta = torch.as_tensor(self.theta).to(like)
        if theta.ndim and len(theta) != n_features:
            raise ShapeError(f"Threshold holds {len(theta)} cuts, but the dictionary has {n_features} features")
        # a negative cut would let entries through that ReLU closes anyway
        theta = theta.expand(n_features)
        return theta.clamp(min=0) if self.relu else theta


def keeps_negatives(rule: SelectionRule) -> bool:
    """Whether activations below zero are kept as they are."""
    return isinstance(rule, AbsTopK) or not getattr(rule, "relu", True)


def check_k(name: str, k: int) -> None:
    """Refuse a mean number of active features below 1."""
    if k < 1:
        raise SaekitError(f"{name}(k={k}): k is the mean number of active features per token; give at least 1")


def _check_fits(rule: TopK | AbsTopK | GroupMax | MutualChoice | FeatureChoice, n_features: int) -> None:
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


def _codes_where(kept: Tensor, pre_acts: Tensor, *, relu: bool = True) -> SparseCodes:
    tokens, features = kept.nonzero(as_tuple=True)
    values = pre_acts[tokens, features]
    return SparseCodes.from_pairs(
        tokens, features, values.relu() if relu else values, n_tokens=kept.shape[0], n_features=kept.shape[1]
    )


def _attach(x: Tensor, w_enc: Tensor, b_enc: Tensor, selection: Selection, *, relu: bool = True) -> SparseCodes:
    values = encode_entries(x, w_enc, b_enc, selection, relu=relu)
    return SparseCodes(values, selection.features, selection.row_starts, len(w_enc))
