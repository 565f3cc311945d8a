"""How well each feature tells each concept: counts from sparse codes, and precision, recall and F1 from counts.

Counting is a sum over active entries, so a whole pass is a sum of `count_concepts` over batches. It
needs memory for `(n_features, n_concepts)` numbers and never for `(n_tokens, n_features)`.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from saekit.codes import SparseCodes
from saekit.errors import ShapeError

# sums of ones in float32 are exact below 2**24
_EXACT_TOKENS = 2**24


@dataclass(frozen=True, slots=True)
class ConceptCounts:
    """On how many known tokens features are active, concepts hold, and both. Counts of batches add up.

    Attributes:
        both: `(n_features, n_concepts)` tokens where the feature is active and the concept holds.
        active: `(n_features,)` tokens where the feature is active.
        labelled: `(n_concepts,)` tokens where the concept holds.
        n_tokens: tokens counted.
    """

    both: Int[Tensor, "n_features n_concepts"]
    active: Int[Tensor, " n_features"]
    labelled: Int[Tensor, " n_concepts"]
    n_tokens: int

    def __add__(self, other: "ConceptCounts") -> "ConceptCounts":
        if self.both.shape != other.both.shape:
            raise ShapeError(
                f"counts of (n_features, n_concepts) {tuple(self.both.shape)} and {tuple(other.both.shape)} do not "
                "add; give counts of one SAE and one list of concepts"
            )
        return ConceptCounts(
            both=self.both + other.both,
            active=self.active + other.active,
            labelled=self.labelled + other.labelled,
            n_tokens=self.n_tokens + other.n_tokens,
        )

    def scores(self) -> "ConceptScores":
        """Precision, recall and what follows from them; 0 where nothing was active or nothing labelled."""
        both = self.both.double()
        active, labelled = self.active.double()[:, None], self.labelled.double()[None, :]
        base_rate = labelled / max(self.n_tokens, 1)
        precision = _ratio(both, active)
        always = _ratio(2 * base_rate, 1 + base_rate)
        f1 = _ratio(2 * both, active + labelled)
        return ConceptScores(
            precision=precision.float(),
            recall=_ratio(both, labelled).float(),
            f1=f1.float(),
            lift=_ratio(precision, base_rate).float(),
            skill=_ratio(f1 - always, 1 - always).float(),
        )


@dataclass(frozen=True, slots=True)
class ConceptScores:
    """How well feature `i`, read as "active or not", tells concept `c`; all `(n_features, n_concepts)`.

    Attributes:
        precision: share of the tokens the feature is active on where the concept holds.
        recall: share of the tokens where the concept holds on which the feature is active.
        f1: their harmonic mean. A concept that holds on most tokens has a high one for any busy feature.
        lift: precision over the concept's base rate; 1 is chance.
        skill: F1 rescaled so that 0 is a feature that is always active and 1 is perfect; can be negative.
    """

    precision: Float[Tensor, "n_features n_concepts"]
    recall: Float[Tensor, "n_features n_concepts"]
    f1: Float[Tensor, "n_features n_concepts"]
    lift: Float[Tensor, "n_features n_concepts"]
    skill: Float[Tensor, "n_features n_concepts"]

    def best(self) -> tuple[Int[Tensor, " n_features"], Float[Tensor, " n_features"]]:
        """The concept that each feature tells best, by skill, and its F1.

        Not the largest F1: that would call every busy feature by the most common concept. A feature
        with an F1 of 0 tells no concept; its index means nothing.
        """
        concept = self.skill.argmax(dim=1)
        return concept, self.f1.gather(1, concept[:, None])[:, 0]


def count_concepts(
    codes: SparseCodes,
    labels: Bool[Tensor, "n_tokens n_concepts"],
    *,
    known: Bool[Tensor, " n_tokens"] | None = None,
    above: Float[Tensor, " n_features"] | None = None,
) -> ConceptCounts:
    """Count one batch.

    Args:
        labels: of the tokens of `codes`, in the same order, on the same device.
        known: tokens that have labels; the others count nowhere. All, if not given.
        above: a feature is active where its value exceeds this, say half its maximum; where it is not 0 if not given.

    Raises:
        ShapeError: if codes and labels are not about the same number of tokens.
    """
    n_tokens = len(labels)
    if codes.n_tokens != n_tokens or n_tokens > _EXACT_TOKENS:
        raise ShapeError(
            f"codes of {codes.n_tokens:,} tokens and labels of {n_tokens:,}; pass equally many, "
            f"and at most {_EXACT_TOKENS:,} at once"
        )
    if known is None:
        known = torch.ones(n_tokens, dtype=torch.bool, device=labels.device)
    tokens = codes.token_of_entry()
    fires = codes.values != 0 if above is None else codes.values > above[codes.features]
    counted = (fires & known[tokens]).nonzero()[:, 0]
    tokens, features = tokens[counted], codes.features[counted]

    # a bag a feature: the tokens it is active on; the sum of their label rows is what is wanted
    active = torch.bincount(features, minlength=codes.n_features)
    starts = torch.cumsum(active, 0) - active
    both = embedding_bag(tokens[features.argsort()], labels.float(), starts, mode="sum").long()
    return ConceptCounts(
        both=both,
        active=active,
        labelled=(labels & known[:, None]).sum(0),
        n_tokens=int(known.sum()),
    )


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    return torch.where(below > 0, above / below.clamp(min=1e-300), torch.zeros_like(above))
