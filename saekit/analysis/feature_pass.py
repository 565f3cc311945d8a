"""The one sparse pass: what every feature does over a text, from a stream of codes.

    batches of (codes, document, position) ─► statistics of each feature, its strongest and its usual examples

Memory is a few hundred numbers a feature, whatever the length of the text, and the result is the same
however the text is cut into batches and in whatever order they come (sums of floats to rounding):

* the strongest examples are a top-N with a fixed order among equals;
* the usual examples are the entries with the N smallest hashes of their own address, which is a uniform
  sample of the tokens that a feature is active on, without a random generator to keep in step;
* histogram bins are a power of two wide. When a stronger activation comes, they double, and neighbours
  add up exactly;
* an activation is as strong as its size: rules that keep negative ones (`AbsTopK`, `relu=False`) give signed
  values, ranked and binned by their distance from zero.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit.analysis.concept_scores import ConceptCounts, count_concepts
from saekit.codes import SparseCodes
from saekit.errors import DataError, ShapeError

NO_EXAMPLE = -1


class AddressedCodes(NamedTuple):
    """Codes of some tokens, and where these tokens stand; a plain tuple in this order does as well.

    Attributes:
        document: `(n,)` row of the `TokenRows`.
        position: `(n,)` place in that row.
        labels: `(n, n_concepts)` which concepts each token carries.
        known: `(n,)` tokens whose labels are known; all, if not given.
    """

    codes: SparseCodes
    document: Int[Tensor, " n"]
    position: Int[Tensor, " n"]
    labels: Bool[Tensor, "n n_concepts"] | None = None
    known: Bool[Tensor, " n"] | None = None


@dataclass(frozen=True, slots=True)
class FeatureStatistics:
    """What each feature did over `n_tokens` tokens. An entry of value 0 is not active.

    Attributes:
        n_tokens: tokens in the pass.
        active: `(n_features,)` tokens the feature is active on.
        sum: `(n_features,)` of its activations.
        sum_of_squares: `(n_features,)` of its activations.
        max: `(n_features,)` size of its largest activation; 0 if it never fired.
        histogram: `(n_features, n_bins)` activations of sizes in `[i, i + 1) * bin_width`. The last bin that is
            not empty lies in the upper half.
        bin_width: `(n_features,)` in units of activation; 0 if it never fired.
        l0_counts: `(largest + 1,)` how many tokens have 0, 1, 2, ... active features.
    """

    n_tokens: int
    active: Int[Tensor, " n_features"]
    sum: Float[Tensor, " n_features"]
    sum_of_squares: Float[Tensor, " n_features"]
    max: Float[Tensor, " n_features"]
    histogram: Int[Tensor, "n_features n_bins"]
    bin_width: Float[Tensor, " n_features"]
    l0_counts: Int[Tensor, " sizes"]

    @property
    def n_features(self) -> int:
        return len(self.active)

    @property
    def density(self) -> Float[Tensor, " n_features"]:
        """Share of the tokens each feature is active on."""
        return self.active.double() / self.n_tokens

    @property
    def mean(self) -> Float[Tensor, " n_features"]:
        """Mean over the tokens the feature is active on; 0 if there are none."""
        return self.sum / self.active.clamp(min=1)

    @property
    def deviation(self) -> Float[Tensor, " n_features"]:
        """Standard deviation over the tokens the feature is active on; 0 if there are none."""
        return (self.sum_of_squares / self.active.clamp(min=1) - self.mean.square()).clamp(min=0).sqrt()


@dataclass(frozen=True, slots=True)
class ExampleTable:
    """Up to `n` tokens for each feature, stronger values first, then lower document, then lower position.

    Attributes:
        value: `(n_features, n)` activations; 0 where there are fewer examples.
        document: `(n_features, n)` rows of the `TokenRows`; -1 where there are fewer examples.
        position: `(n_features, n)` places in these rows; -1 where there are fewer examples.
    """

    value: Float[Tensor, "n_features n"]
    document: Int[Tensor, "n_features n"]
    position: Int[Tensor, "n_features n"]


@dataclass(frozen=True, slots=True)
class FeatureExamples:
    """Where to look at a feature.

    Attributes:
        top: its strongest activations.
        sample: activations drawn uniformly from all of them; all of them, if they are few.
    """

    top: ExampleTable
    sample: ExampleTable


@dataclass(frozen=True, slots=True)
class FeatureMeasurements:
    """The result of one pass. `concepts` is None where the batches had no labels."""

    statistics: FeatureStatistics
    examples: FeatureExamples
    concepts: ConceptCounts | None


def measure_features(
    batches: Iterable[tuple],
    *,
    n_examples: int = 20,
    n_samples: int = 32,
    distinct_rows: bool = True,
    n_bins: int = 64,
    seed: int = 0,
) -> FeatureMeasurements:
    """Read a stream of `AddressedCodes` once. No `(n_tokens, n_features)` tensor is ever held.

    Args:
        n_examples: strongest examples kept for each feature.
        n_samples: size of the uniform sample kept for each feature.
        distinct_rows: at most one of the strongest examples from each document row, its strongest, so that
            examples differ. The sample is not thinned, or it would not be uniform.
        n_bins: bins of each feature's histogram.
        seed: of the sample.

    Raises:
        DataError: if there are no tokens, or only some batches have labels.
        ShapeError: if addresses do not fit their codes, or batches come from different SAEs.
    """
    running: _Running | None = None
    for item in batches:
        batch = AddressedCodes(*item)
        _check(batch, running)
        if running is None:
            running = _Running.new(batch, n_examples=n_examples, n_samples=n_samples, n_bins=n_bins)
        running.observe(batch, distinct_rows=distinct_rows, seed=seed)
    if running is None or running.n_tokens == 0:
        raise DataError(
            "no codes to measure, expected at least one batch with tokens; give more text, or mask less of it"
        )
    return running.result()


@dataclass(slots=True)
class _Kept:
    """The examples of largest score so far for each feature, best first; -inf where there are none yet."""

    score: Tensor  # (n_features, n)
    value: Tensor
    document: Tensor
    position: Tensor

    @classmethod
    def new(cls, n_features: int, n: int, device: torch.device) -> "_Kept":
        nowhere = torch.full((n_features, n), NO_EXAMPLE, dtype=torch.int64, device=device)
        zero = torch.zeros(n_features, n, dtype=torch.float64, device=device)
        return cls(score=zero - torch.inf, value=zero, document=nowhere, position=nowhere.clone())

    def offer(
        self, feature: Tensor, *, score: Tensor, value: Tensor, document: Tensor, position: Tensor, distinct_rows: bool
    ) -> None:
        """Take in some entries. After the first batches nearly all fail the bar and nothing is sorted."""
        n = self.score.shape[1]
        if n == 0:
            return
        above = (score >= self.score[feature, -1]).nonzero()[:, 0]
        touched = feature[above].unique()
        held = self.score[touched] > -torch.inf
        feature = torch.cat([feature[above], touched[:, None].expand_as(held)[held]])
        score = torch.cat([score[above], self.score[touched][held]])
        value = torch.cat([value[above], self.value[touched][held]])
        document = torch.cat([document[above], self.document[touched][held]])
        position = torch.cat([position[above], self.position[touched][held]])

        if distinct_rows:
            order = _lexsort(position, -score, document, feature)
            best = order[_starts_run(feature[order], document[order])]
            feature, score, value, document, position = (x[best] for x in (feature, score, value, document, position))
        order = _lexsort(position, document, -score, feature)
        place = _place_in_run(feature[order])
        order, place = order[place < n], place[place < n]
        self.score[touched] = -torch.inf
        for kept, new in (
            (self.score, score),
            (self.value, value),
            (self.document, document),
            (self.position, position),
        ):
            kept[feature[order], place] = new[order]

    def table(self) -> ExampleTable:
        """What was kept, the strongest first."""
        order = torch.arange(self.value.numel(), device=self.value.device)
        row = order // max(self.value.shape[1], 1)
        order = _lexsort(self.position.flatten(), self.document.flatten(), -self.value.flatten().abs(), row)
        return ExampleTable(*(x.flatten()[order].view_as(x) for x in (self.value, self.document, self.position)))


@dataclass(slots=True)
class _Running:
    """Sums and examples so far."""

    n_tokens: int
    active: Tensor
    sum: Tensor
    sum_of_squares: Tensor
    max: Tensor
    histogram: Tensor
    exponent: Tensor  # a feature's bins cover [0, 2 ** exponent)
    l0_counts: Tensor
    top: _Kept
    sample: _Kept
    concepts: ConceptCounts | None

    @classmethod
    def new(cls, batch: AddressedCodes, *, n_examples: int, n_samples: int, n_bins: int) -> "_Running":
        n_features, device = batch.codes.n_features, batch.codes.device
        count = torch.zeros(n_features, dtype=torch.int64, device=device)
        total = torch.zeros(n_features, dtype=torch.float64, device=device)
        return cls(
            n_tokens=0,
            active=count,
            sum=total,
            sum_of_squares=total.clone(),
            max=total.clone(),
            histogram=torch.zeros(n_features, n_bins, dtype=torch.int64, device=device),
            exponent=count.clone(),
            l0_counts=torch.zeros(1, dtype=torch.int64, device=device),
            top=_Kept.new(n_features, n_examples, device),
            sample=_Kept.new(n_features, n_samples, device),
            concepts=None,
        )

    def observe(self, batch: AddressedCodes, *, distinct_rows: bool, seed: int) -> None:
        entries = (batch.codes.values != 0).nonzero()[:, 0]
        feature, value = batch.codes.features[entries], batch.codes.values[entries].double()
        token = batch.codes.token_of_entry()[entries]
        document, position = batch.document.to(token.device)[token], batch.position.to(token.device)[token]

        self.n_tokens += batch.codes.n_tokens
        self.active.index_add_(0, feature, torch.ones_like(feature))
        self.sum.index_add_(0, feature, value)
        self.sum_of_squares.index_add_(0, feature, value.square())
        self.max.scatter_reduce_(0, feature, value.abs(), "amax")
        self._count_bins(feature, value.abs())
        l0 = torch.bincount(torch.bincount(token, minlength=batch.codes.n_tokens), minlength=len(self.l0_counts))
        l0[: len(self.l0_counts)] += self.l0_counts
        self.l0_counts = l0
        where = {"value": value, "document": document, "position": position}
        self.top.offer(feature, score=value.abs(), distinct_rows=distinct_rows, **where)
        self.sample.offer(feature, score=_hash(feature, document, position, seed), distinct_rows=False, **where)
        if batch.labels is not None:
            counts = count_concepts(batch.codes, batch.labels, known=batch.known)
            self.concepts = counts if self.concepts is None else self.concepts + counts

    def _count_bins(self, feature: Tensor, size: Tensor) -> None:
        exponent = torch.where(self.max > 0, torch.frexp(self.max).exponent.long(), self.exponent)
        grown = (exponent > self.exponent).nonzero()[:, 0]
        bins = torch.arange(self.histogram.shape[1], device=size.device)
        merged = bins >> (exponent - self.exponent)[grown, None].clamp(max=62)
        old = self.histogram[grown]
        self.histogram[grown] = torch.zeros_like(old).scatter_add_(1, merged, old)
        self.exponent = exponent
        # exact: a power of two only moves the exponent
        place = (size * torch.exp2(-exponent.double())[feature] * len(bins)).long()
        ones = torch.ones_like(place)
        self.histogram.view(-1).index_add_(0, feature * len(bins) + place, ones)

    def result(self) -> FeatureMeasurements:
        width = torch.exp2(self.exponent.double()) / self.histogram.shape[1]
        statistics = FeatureStatistics(
            n_tokens=self.n_tokens,
            active=self.active,
            sum=self.sum,
            sum_of_squares=self.sum_of_squares,
            max=self.max,
            histogram=self.histogram,
            bin_width=width * (self.active > 0),
            l0_counts=self.l0_counts,
        )
        return FeatureMeasurements(statistics, FeatureExamples(self.top.table(), self.sample.table()), self.concepts)


def _check(batch: AddressedCodes, running: _Running | None) -> None:
    n = batch.codes.n_tokens
    if len(batch.document) != n or len(batch.position) != n:
        raise ShapeError(
            f"codes of {n:,} tokens with {len(batch.document):,} documents and {len(batch.position):,} positions; "
            "pass one of each for every token"
        )
    if running is None:
        return
    if batch.codes.n_features != len(running.active):
        raise ShapeError(
            f"a batch with {batch.codes.n_features:,} features after one with {len(running.active):,}; "
            "measure one SAE at a time"
        )
    if (batch.labels is None) != (running.concepts is None):
        raise DataError("some batches have concept labels and some do not; pass labels with all batches or with none")


def _hash(feature: Tensor, document: Tensor, position: Tensor, seed: int) -> Tensor:
    """A number in [0, 1) that looks random but depends on the address alone (multiply, fold, repeat)."""
    mixed = torch.full_like(feature, seed)
    for part in (feature, document, position):
        # odd 64-bit constants, as signed numbers; products wrap
        mixed = (mixed + part + 1) * -7046029254386353131
        mixed = (mixed ^ ((mixed >> 29) & (2**35 - 1))) * -4658895280553007687
        mixed = mixed ^ ((mixed >> 32) & (2**32 - 1))
    return (mixed & (2**53 - 1)).double() / 2**53


def _lexsort(*keys: Tensor) -> Tensor:
    """The order by the last key, among equals by the one before it, and so on."""
    order = keys[0].argsort(stable=True)
    for key in keys[1:]:
        order = order[key[order].argsort(stable=True)]
    return order


def _starts_run(*keys: Tensor) -> Tensor:
    """True where one of the sorted keys differs from the entry before."""
    differs = torch.ones(len(keys[0]), dtype=torch.bool, device=keys[0].device)
    differs[1:] = torch.stack([key[1:] != key[:-1] for key in keys]).any(0)
    return differs


def _place_in_run(key: Tensor) -> Tensor:
    """How many entries of the same sorted key come before each."""
    index = torch.arange(len(key), device=key.device)
    return index - torch.where(_starts_run(key), index, 0).cummax(0).values
