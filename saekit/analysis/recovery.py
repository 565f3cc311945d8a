"""How much of a known truth an SAE found: directions, activations, and where in the range of frequencies.

True features are compared with learned ones twice. By direction: the nearest by cosine, both ways, and
the best one-to-one matching. By activation: on which tokens the partner of a true feature fires. Counts
are sums over active entries; nothing is ever as large as tokens times features.

    mean_max_cosine    for each true feature the largest cosine with a live decoder row, mean
    learned_max_cosine for each live decoder row the largest cosine with a true feature, mean
    matched_cosine     the same one-to-one
    recovered          share of true features with a partner of at least the cosine `above`
    precision, recall  of the partner's activity as a test for the true feature's, mean over true features;
    f1                 0 for one that has no partner
    split              share of true features that are nearest to several live decoder rows of at least `above`
    absorbed           mean over children of how much more often the partner of their parent is silent where
                       the child fires than where the parent fires without it (after Chanin et al., arXiv
                       2409.14507, whose measure needs no truth and is another); over parents with a partner of
                       at least `above`; nan without such

In few dimensions a random dictionary has large cosines too: with the nearest of n directions in d dimensions
about `sqrt(2 ln n / d)`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.activations.firing import UNGATED
from saekit.activations.harvest import take
from saekit.activations.synthetic import SyntheticSource, SyntheticTruth
from saekit.analysis.matching import Matching, match_directions, nearest
from saekit.codes import SparseCodes
from saekit.errors import DataError, ShapeError
from saekit.sae import SAE

if TYPE_CHECKING:
    from scipy.sparse import csr_array

N_BANDS = 4
_BATCH_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class Agreement:
    """On how many tokens true and learned features fire, and each pair together. Counts of batches add up.

    Attributes:
        both: `(n_true, n_learned)` sparse integers.
        true: `(n_true,)`.
        learned: `(n_learned,)`.
        n_tokens: tokens counted.
    """

    both: "csr_array"
    true: Int[Tensor, " n_true"]
    learned: Int[Tensor, " n_learned"]
    n_tokens: int

    def __add__(self, other: "Agreement") -> "Agreement":
        if self.both.shape != other.both.shape:
            raise ShapeError(
                f"counts of {self.both.shape} and {other.both.shape} features do not add; "
                "give counts of one truth and one SAE"
            )
        both: csr_array = self.both + other.both
        return Agreement(both, self.true + other.true, self.learned + other.learned, self.n_tokens + other.n_tokens)

    def together(self, true: Int[Tensor, " n"], learned: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Tokens on which both features of each pair fire."""
        # copies, since scipy refuses to index by memory that numpy does not own
        counted = self.both[true.numpy().copy(), learned.numpy().copy()]
        return torch.from_numpy(np.asarray(counted).ravel().astype(np.float64))


def count_agreement(true: SparseCodes, learned: SparseCodes) -> Agreement:
    """Count one batch, the same tokens in both codes.

    Raises:
        ShapeError: if the codes are not about the same number of tokens.
    """
    if true.n_tokens != learned.n_tokens:
        raise ShapeError(
            f"true codes of {true.n_tokens:,} tokens and learned ones of {learned.n_tokens:,}; pass the same tokens"
        )
    return Agreement(
        both=_as_ones(true).T.tocsr() @ _as_ones(learned),
        true=true.feature_counts().cpu(),
        learned=learned.feature_counts().cpu(),
        n_tokens=true.n_tokens,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Band:
    """Recovery of the true features between two ranks (from 1, both included).

    Attributes:
        density: their mean share of tokens.
        recovered, matched_cosine, f1: as for the whole truth.
    """

    first: int
    last: int
    density: float
    recovered: float
    matched_cosine: float
    f1: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Recovery:
    """What an SAE found of a truth; the definitions are in the module's docstring.

    Attributes:
        above: the cosine from which a true feature counts as found.
        n_tokens: tokens behind the activation scores.
        live: learned features that fired; only these are compared.
        bands: the same by rank of density, densest first; the bands are equally wide in log rank.
        matching: true features with their partners.
    """

    above: float
    n_tokens: int
    live: int
    mean_max_cosine: float
    learned_max_cosine: float
    matched_cosine: float
    recovered: float
    precision: float
    recall: float
    f1: float
    split: float
    absorbed: float
    bands: tuple[Band, ...]
    matching: Matching

    def summary(self) -> dict[str, float | int]:
        """The numbers alone, and the share recovered in each band."""
        numbers = {name: value for name, value in asdict(self).items() if isinstance(value, float | int)}
        return numbers | {f"recovered_{band.first}_to_{band.last}": band.recovered for band in self.bands}


@torch.no_grad()
def measure_recovery(
    sae: SAE, source: SyntheticSource, *, n_tokens: int = 65_536, seed: int = 1_000_003, above: float = 0.9
) -> Recovery:
    """Compare an SAE with the truth behind its training.

    Args:
        seed: of the tokens; another one than that of training, so that they are unseen.
    """
    unseen = take(source.stream(_BATCH_TOKENS, seed=seed), n_tokens, source.site)

    def pairs() -> Iterator[tuple[SparseCodes, SparseCodes]]:
        for part in torch.arange(n_tokens).split(_BATCH_TOKENS):
            batch = unseen.select(part)
            yield source.codes(batch.document, seed=seed), sae.encode(batch.vectors.to(sae.b_dec.device)).to("cpu")

    return recovery(source.truth, sae.W_dec.cpu(), pairs(), above=above)


def recovery(
    truth: SyntheticTruth,
    decoder: Float[Tensor, "n_learned d_model"],
    codes: Iterable[tuple[SparseCodes, SparseCodes]],
    *,
    above: float = 0.9,
) -> Recovery:
    """Compare any dictionary with the truth.

    Args:
        codes: true and learned codes of the same tokens, batch by batch.

    Raises:
        DataError: if there are no tokens, or no learned feature fires on any.
    """
    counts = None
    for true, learned in codes:
        counts = count_agreement(true, learned) if counts is None else counts + count_agreement(true, learned)
    if counts is None or not bool((counts.learned > 0).any()):
        raise DataError(
            "no learned feature fires on these tokens; there is nothing to compare; give more, or another SAE"
        )
    live = (counts.learned > 0).nonzero()[:, 0]
    found = match_directions(truth.directions, decoder[live])
    matching = Matching(found.left, live[found.right], found.cosine)
    near_true, _ = nearest(truth.directions, decoder[live])
    near_learned, owner = nearest(decoder[live], truth.directions)
    n_true = truth.config.n_features
    cosine = torch.zeros(n_true).index_put((matching.left,), matching.cosine)
    precision, recall, f1 = _scores(counts, matching, n_true)
    claims = torch.bincount(owner[near_learned >= above], minlength=n_true)
    return Recovery(
        above=above,
        n_tokens=counts.n_tokens,
        live=len(live),
        mean_max_cosine=float(near_true.mean()),
        learned_max_cosine=float(near_learned.mean()),
        matched_cosine=float(cosine.mean()),
        recovered=float((cosine >= above).double().mean()),
        precision=float(precision.mean()),
        recall=float(recall.mean()),
        f1=float(f1.mean()),
        split=float((claims > 1).double().mean()),
        absorbed=_absorbed(counts, matching, truth.firing.parent, above),
        bands=_bands(truth.density, cosine, f1, above),
        matching=matching,
    )


def _as_ones(codes: SparseCodes) -> "csr_array":
    """1 where a feature is active; `(n_tokens, n_features)`."""
    from scipy.sparse import csr_array

    active = codes.active().to("cpu")
    ones = np.ones(len(active.values), dtype=np.int64)
    return csr_array(
        (ones, active.features.numpy(), active.row_starts.numpy()), shape=(active.n_tokens, active.n_features)
    )


def _scores(counts: Agreement, matching: Matching, n_true: int) -> tuple[Tensor, Tensor, Tensor]:
    """Precision, recall and F1 of each true feature's partner."""
    both = counts.together(matching.left, matching.right)
    true, learned = counts.true[matching.left].double(), counts.learned[matching.right].double()
    # a partner is alive, so it fired; a true feature may not have
    scores = (both / learned, both / true.clamp(min=1), 2 * both / (true + learned))
    empty = torch.zeros(n_true, dtype=torch.float64)
    precision, recall, f1 = (empty.index_put((matching.left,), score) for score in scores)
    return precision, recall, f1


def _absorbed(counts: Agreement, matching: Matching, parent: Int[Tensor, " n_true"], above: float) -> float:
    partner = torch.full_like(parent, UNGATED)
    good = matching.cosine >= above
    partner[matching.left[good]] = matching.right[good]
    child = ((parent != UNGATED) & (partner[parent] != UNGATED)).nonzero()[:, 0]
    own = parent[child]
    with_child, without = counts.true[child], counts.true[own] - counts.true[child]
    usable = (with_child > 0) & (without > 0)
    child, own = child[usable], own[usable]
    if len(child) == 0:
        return float("nan")
    said = counts.together(child, partner[own])  # a child's tokens are its parent's too
    silent_with = 1 - said / with_child[usable]
    silent_without = 1 - (counts.together(own, partner[own]) - said) / without[usable]
    return float((silent_with - silent_without).mean())


def _bands(density: Tensor, cosine: Tensor, f1: Tensor, above: float) -> tuple[Band, ...]:
    n_true = len(density)
    edges = torch.logspace(0, 1, N_BANDS + 1, base=n_true + 1, dtype=torch.float64).round().long().unique().tolist()
    bands = []
    for first, end in pairwise(edges):
        part = slice(first - 1, end - 1)
        bands.append(
            Band(
                first=first,
                last=end - 1,
                density=float(density[part].mean()),
                recovered=float((cosine[part] >= above).double().mean()),
                matched_cosine=float(cosine[part].mean()),
                f1=float(f1[part].mean()),
            )
        )
    return tuple(bands)
