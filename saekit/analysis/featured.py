"""What feature pages need beyond the pass: a choice of features, examples in context, effects on logits."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.activations.tokens import TokenRows
from saekit.analysis.feature_pass import NO_EXAMPLE, AddressedCodes, FeatureStatistics
from saekit.errors import ShapeError

EncodeRows = Callable[[Int[Tensor, " chosen"]], Iterable[tuple]]


@dataclass(frozen=True, slots=True)
class ExampleWindow:
    """Tokens around one example, and how active its feature is on each of them.

    Attributes:
        document: row of the `TokenRows`.
        position: place of the example in that row.
        start: place of the first token of the window in that row.
        tokens: ids.
        values: activations, one a token; 0 where the feature is not active or the token is masked.
    """

    document: int
    position: int
    start: int
    tokens: tuple[int, ...]
    values: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class LogitEffects:
    """The tokens that each feature speaks for and against most; all `(n_chosen, k)`, strongest first."""

    promoted: Int[Tensor, "n_chosen k"]
    promoted_by: Float[Tensor, "n_chosen k"]
    suppressed: Int[Tensor, "n_chosen k"]
    suppressed_by: Float[Tensor, "n_chosen k"]


def interesting_features(
    statistics: FeatureStatistics,
    *,
    count: int,
    concept: Int[Tensor, " n_features"] | None = None,
    score: Float[Tensor, " n_features"] | None = None,
    min_active: int = 10,
    max_density: float = 0.2,
) -> Int[Tensor, " chosen"]:
    """At most `count` features worth a page, the same ones every time; all that fired if there are no more than that.

    Otherwise features active on fewer than `min_active` tokens or on more than a share of `max_density` take no
    part. Half of the page goes to the best scores: the best feature of every concept, by score, then the
    second best of every concept, and so on. The other half shows what no concept explains: what is left,
    ordered by density and cut into equal groups, sends from each the feature with the most energy (mean
    square) on the tokens it is active on. Among equals the denser comes first, then the lower index.

    Args:
        concept: the concept each feature tells best, and
        score: how well (F1, lift or skill); scores of 0 or less tell nothing. Without them every place
            goes to the spread over densities.
    """
    fired = statistics.active > 0
    if int(fired.sum()) <= count:
        eligible = fired
    else:
        eligible = (statistics.active >= min_active) & (statistics.density <= max_density)
    chosen = torch.zeros(0, dtype=torch.int64, device=eligible.device)
    if concept is not None and score is not None:
        chosen = _best_by_concept(concept, score.masked_fill(~eligible, 0))[: (count + 1) // 2]
    rest = eligible.clone()
    rest[chosen] = False
    left = rest.nonzero()[:, 0]
    left = left[statistics.active[left].argsort(descending=True, stable=True)]
    energy = statistics.sum_of_squares / statistics.active.clamp(min=1)
    groups = left.tensor_split(max(min(count - len(chosen), len(left)), 1)) if count > len(chosen) else ()
    spread = [group[energy[group].argmax()] for group in groups if len(group)]
    return torch.cat([chosen, torch.stack(spread)]) if spread else chosen


def _best_by_concept(concept: Tensor, score: Tensor) -> Tensor:
    """Features with a positive score: by their place within their concept, then by score."""
    by_score = score.argsort(descending=True, stable=True)
    by_concept = by_score[concept[by_score].argsort(stable=True)]
    first = torch.searchsorted(concept[by_concept], concept[by_concept])
    place = torch.empty_like(concept)
    place[by_concept] = torch.arange(len(concept), device=concept.device) - first
    order = by_score[place[by_score].argsort(stable=True)]
    return order[score[order] > 0]


def windows(
    feature: Int[Tensor, " n"],
    document: Int[Tensor, " n"],
    position: Int[Tensor, " n"],
    *,
    rows: TokenRows,
    encode_rows: EncodeRows,
    before: int = 40,
    after: int = 24,
) -> list[ExampleWindow | None]:
    """The context of `n` examples, cut at the ends of their rows; None for a document of -1.

    Args:
        encode_rows: takes rows of `rows` and yields `AddressedCodes` of their tokens; called once, with
            the rows that are needed. It should encode as the pass did. A rule that looks across tokens
            decides otherwise in other company, so give it the calibrated threshold.

    Raises:
        ShapeError: if an example lies outside `rows`.
    """
    real = document != NO_EXAMPLE
    needed = document[real].unique()
    if not len(needed):
        return [None] * len(feature)
    if int(needed[-1]) >= len(rows) or int(position[real].max()) >= rows.context:
        raise ShapeError(
            f"examples reach to row {int(needed[-1])} and position {int(position[real].max())}, but there are "
            f"{len(rows)} rows of {rows.context}; pass the rows that the pass has read"
        )

    def key_of(feature: Tensor, document: Tensor, position: Tensor) -> Tensor:
        return (feature * len(rows) + document) * rows.context + position

    key, value = _values_by_key(encode_rows(needed), key_of, wanted=feature[real].unique())
    place = position[:, None] + torch.arange(-before, after + 1)  # (n, window)
    inside = (place >= 0) & (place < rows.context)
    asked = key_of(feature[:, None], document[:, None], place)
    found = torch.searchsorted(key, asked).clamp(max=len(key) - 1)
    shown = torch.where(key[found] == asked, value[found], 0.0)
    result: list[ExampleWindow | None] = []
    for i, is_real in enumerate(real.tolist()):
        if not is_real:
            result.append(None)
            continue
        at = place[i][inside[i]]
        tokens = tuple(rows.ids[document[i], at].tolist())
        values = tuple(shown[i][inside[i]].tolist())
        result.append(ExampleWindow(int(document[i]), int(position[i]), int(at[0]), tokens, values))
    return result


def _values_by_key(
    batches: Iterable[tuple], key_of: Callable[[Tensor, Tensor, Tensor], Tensor], *, wanted: Tensor
) -> tuple[Tensor, Tensor]:
    """Sorted keys of the active entries of wanted features, and their values; the largest first among equals."""
    # opens with a key that nobody asks for, so that there always is one
    keys, values = [torch.tensor([-1])], [torch.zeros(1)]
    for item in batches:
        batch = AddressedCodes(*item)
        codes = batch.codes.to("cpu")
        entries = (torch.isin(codes.features, wanted) & (codes.values != 0)).nonzero()[:, 0]
        token = codes.token_of_entry()[entries]
        keys.append(key_of(codes.features[entries], batch.document.cpu()[token], batch.position.cpu()[token]))
        values.append(codes.values[entries].detach().float())
    key, value = torch.cat(keys), torch.cat(values)
    order = value.argsort(descending=True)
    order = order[key[order].argsort(stable=True)]
    return key[order], value[order]


def logit_effects(
    w_dec: Float[Tensor, "n_chosen d_model"], unembed: Float[Tensor, "vocab d_unembed"], *, k: int = 10
) -> LogitEffects:
    """What each feature adds to every token's logit, per unit of activation: `w_dec @ unembed.T`.

    Right for features written to the residual stream, as far as the layers above leave them alone. `unembed` is
    `saekit.targets.readout.stream_to_logits`, which leaves out the scale that the final norm divides by.

    Raises:
        ShapeError: if the two do not have the same width, or the vocabulary is smaller than `k`.
    """
    if w_dec.shape[1] != unembed.shape[1] or k > len(unembed):
        raise ShapeError(
            f"decoder rows {tuple(w_dec.shape)} and unembedding {tuple(unembed.shape)} for the {k} strongest tokens; "
            "expected (n_features, d_model) and (vocab, d_model) with k <= vocab"
        )
    effects = w_dec.detach().float() @ unembed.detach().float().T
    promoted, suppressed = effects.topk(k, dim=1), effects.topk(k, dim=1, largest=False)
    return LogitEffects(promoted.indices, promoted.values, suppressed.indices, suppressed.values)
