"""What the page of an SAE shows, as plain values, and how it is gathered from one sparse pass."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.activations.tokens import NO_SOURCE, TokenRows
from saekit.analysis.concept_scores import ConceptScores
from saekit.analysis.concepts import Concept
from saekit.analysis.feature_pass import NO_EXAMPLE, ExampleTable, FeatureMeasurements
from saekit.analysis.featured import EncodeRows, ExampleWindow, LogitEffects, windows
from saekit.dashboards.feature_effect import FeatureEffect
from saekit.density import ZipfFit, zipf_fit
from saekit.errors import ShapeError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# examples that agree on this many tokens before and after their peaks are shown once
_ALIKE_BEFORE, _ALIKE_AFTER = 8, 4
_BEST_CONCEPTS = 5


@dataclass(frozen=True, slots=True)
class ConceptBar:
    """How well a feature tells one concept."""

    name: str
    description: str
    precision: float
    recall: float
    f1: float


@dataclass(frozen=True, slots=True)
class ShownExample:
    """One example in its context.

    Attributes:
        window: its tokens and activations.
        source: the name of the document it comes from; "" if not known.
        alike: how many examples were left out because they read the same.
    """

    window: ExampleWindow
    source: str
    alike: int = 0


@dataclass(frozen=True, slots=True)
class ExampleGroup:
    """Examples under one heading, strongest first."""

    title: str
    examples: tuple[ShownExample, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class FeaturePage:
    """All that the page shows of one feature; `promoted` and `suppressed` are pairs of token and effect."""

    feature: int
    density: float
    active: int
    mean: float
    deviation: float
    max: float
    bin_width: float
    histogram: tuple[int, ...]
    concepts: tuple[ConceptBar, ...]
    promoted: tuple[tuple[int, float], ...]
    suppressed: tuple[tuple[int, float], ...]
    groups: tuple[ExampleGroup, ...]
    effect: FeatureEffect | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Homes:
    """Where the features of a crosscoder live.

    Attributes:
        sites: of the crosscoder, in its order; what features promote is said of the last.
        shares: `(n_features, n_sites)` part of each feature's squared norm that it writes there.
        metrics: of each Site, by the keys of `METRICS`.
    """

    sites: tuple[str, ...]
    shares: Float[Tensor, "n_features n_sites"]
    metrics: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class PageData:
    """All that the file shows.

    Attributes:
        title: of the file.
        model: what was interpreted.
        site: where in it.
        rule: which matches are kept.
        n_tokens: tokens that the statistics and curves are over.
        metrics: by the keys of `METRICS`; others are shown under their own name, absent ones not at all.
        density: `(n_features,)` of all features.
        l0_counts: `(largest + 1,)` tokens by their number of active features.
        zipf: the line through the densities, or None to leave it out.
        features: those that have a page, in order of interest.
        token_text: what each token that occurs reads.
        special: tokens that stand for no text, such as BOS.
        homes: of a crosscoder, where features live; None of an SAE of one Site.
    """

    title: str
    model: str
    site: str
    rule: str
    n_tokens: int
    metrics: Mapping[str, float]
    density: Float[Tensor, " n_features"]
    l0_counts: Int[Tensor, " sizes"]
    zipf: ZipfFit | None
    features: tuple[FeaturePage, ...]
    token_text: Mapping[int, str]
    special: tuple[int, ...] = ()
    homes: Homes | None = None

    @property
    def n_features(self) -> int:
        return len(self.density)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExampleLayout:
    """How many examples a feature's page shows, and how much text around each.

    Attributes:
        n_top: of the strongest.
        n_intervals: equal parts into which the activations are cut, by size, below them.
        n_per_interval: of each part.
        before: tokens before an example's peak.
        after: tokens after it.
    """

    n_top: int = 12
    n_intervals: int = 4
    n_per_interval: int = 3
    before: int = 36
    after: int = 24


def token_texts(tokenizer: "PreTrainedTokenizerBase", ids: Iterable[int]) -> dict[int, str]:
    """What each token reads inside a text, leading space included.

    Each is decoded after another token and that one's text cut off, since some tokenizers drop the
    space at the start of a text. A token that holds part of a character reads as U+FFFD.
    """
    anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]

    def decode(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    lead = len(decode(anchor))
    return {token: decode([*anchor, token])[lead:] for token in ids}


def build_page_data(
    measured: FeatureMeasurements,
    features: Int[Tensor, " n_chosen"],
    *,
    rows: TokenRows,
    encode_rows: EncodeRows,
    token_text: Callable[[list[int]], Mapping[int, str]],
    model: str,
    site: str,
    rule: str,
    metrics: Mapping[str, float],
    concepts: Sequence[Concept] = (),
    effects: LogitEffects | None = None,
    title: str = "Sparse autoencoder",
    layout: ExampleLayout = ExampleLayout(),
) -> PageData:
    """The page of the chosen features, from one pass and a second look at the rows with their examples.

    Args:
        features: which, in the order of the page (`interesting_features`).
        rows: what the pass has read.
        encode_rows: see `saekit.analysis.featured.windows`.
        token_text: gives the texts of some tokens, for example `partial(token_texts, tokenizer)`.
        concepts: what the columns of `measured.concepts` are; without them no scores are shown.
        effects: of the chosen features, in their order.

    Raises:
        ShapeError: if effects or concepts do not match the features or the counts.
    """
    features = features.cpu()
    scores = measured.concepts.scores() if measured.concepts is not None and concepts else None
    if effects is not None and len(effects.promoted) != len(features):
        raise ShapeError(
            f"logit effects of {len(effects.promoted)} features for a page of {len(features)}; "
            "pass logit_effects(W_dec[features], ...)"
        )
    if scores is not None and scores.f1.shape[1] != len(concepts):
        raise ShapeError(
            f"{len(concepts)} concepts for counts of {scores.f1.shape[1]}; pass those that the labels were made of"
        )
    groups = _example_groups(measured, features, rows=rows, encode_rows=encode_rows, layout=layout)
    pages = tuple(
        _feature_page(measured, feature, place=place, scores=scores, concepts=concepts, effects=effects, groups=group)
        for place, (feature, group) in enumerate(zip(features.tolist(), groups, strict=True))
    )
    density = measured.statistics.density.cpu()
    return PageData(
        title=title,
        model=model,
        site=site,
        rule=rule,
        n_tokens=measured.statistics.n_tokens,
        metrics=dict(metrics),
        density=density,
        l0_counts=measured.statistics.l0_counts.cpu(),
        zipf=zipf_fit(density) if bool((density > 0).any()) else None,
        features=pages,
        token_text=dict(token_text(sorted(_tokens_of(pages)))),
        special=tuple({token for token in (rows.bos, rows.pad) if token is not None}),
    )


def _tokens_of(pages: Sequence[FeaturePage]) -> set[int]:
    effects = {token for page in pages for token, _ in (*page.promoted, *page.suppressed)}
    shown = (example.window for page in pages for group in page.groups for example in group.examples)
    return effects.union(*(window.tokens for window in shown))


def _feature_page(
    measured: FeatureMeasurements,
    feature: int,
    *,
    place: int,
    scores: ConceptScores | None,
    concepts: Sequence[Concept],
    effects: LogitEffects | None,
    groups: tuple[ExampleGroup, ...],
) -> FeaturePage:
    statistics = measured.statistics
    return FeaturePage(
        feature=feature,
        density=float(statistics.density[feature]),
        active=int(statistics.active[feature]),
        mean=float(statistics.mean[feature]),
        deviation=float(statistics.deviation[feature]),
        max=float(statistics.max[feature]),
        bin_width=float(statistics.bin_width[feature]),
        histogram=tuple(statistics.histogram[feature].tolist()),
        concepts=() if scores is None else _concept_bars(scores, concepts, feature),
        promoted=() if effects is None else _pairs(effects.promoted[place], effects.promoted_by[place]),
        suppressed=() if effects is None else _pairs(effects.suppressed[place], effects.suppressed_by[place]),
        groups=groups,
    )


def _pairs(tokens: Tensor, by: Tensor) -> tuple[tuple[int, float], ...]:
    return tuple(zip(tokens.tolist(), by.tolist(), strict=True))


def _concept_bars(scores: ConceptScores, concepts: Sequence[Concept], feature: int) -> tuple[ConceptBar, ...]:
    """The concepts it tells best, by skill: F1 alone would put the most common concepts on top."""
    skill = scores.skill[feature]
    best = [
        place for place in skill.argsort(descending=True, stable=True)[:_BEST_CONCEPTS].tolist() if skill[place] > 0
    ]
    return tuple(
        ConceptBar(
            name=concepts[place].name,
            description=concepts[place].description,
            precision=float(scores.precision[feature, place]),
            recall=float(scores.recall[feature, place]),
            f1=float(scores.f1[feature, place]),
        )
        for place in best
    )


def _example_groups(
    measured: FeatureMeasurements,
    features: Tensor,
    *,
    rows: TokenRows,
    encode_rows: EncodeRows,
    layout: ExampleLayout,
) -> list[tuple[ExampleGroup, ...]]:
    """For each feature its strongest examples, then some from each interval of its sample."""
    top, sample = measured.examples.top, measured.examples.sample
    wanted: list[tuple[int, str, list[tuple[int, int]]]] = []
    for feature in features.tolist():
        wanted.append((feature, "Strongest", _addresses(top, feature)))
        wanted += [(feature, title, found) for title, found in _intervals(sample, feature, layout)]
    flat = torch.tensor(
        [(feature, *address) for feature, _, found in wanted for address in found], dtype=torch.int64
    ).view(-1, 3)
    shown = iter(windows(*flat.T, rows=rows, encode_rows=encode_rows, before=layout.before, after=layout.after))
    groups: dict[int, list[ExampleGroup]] = {feature: [] for feature in features.tolist()}
    for feature, title, found in wanted:
        examples = _without_repeats([next(shown) for _ in found], rows)
        limit = layout.n_per_interval if groups[feature] else layout.n_top
        groups[feature].append(ExampleGroup(title, examples[:limit]))
    return [tuple(group for group in groups[feature] if group.examples) for feature in features.tolist()]


def _addresses(table: ExampleTable, feature: int) -> list[tuple[int, int]]:
    cells = zip(table.document[feature].tolist(), table.position[feature].tolist(), strict=True)
    return [(document, position) for document, position in cells if document != NO_EXAMPLE]


def _intervals(sample: ExampleTable, feature: int, layout: ExampleLayout) -> list[tuple[str, list[tuple[int, int]]]]:
    """The sample cut into equal parts, strongest first; each part stands for its share of the activations."""
    found = _addresses(sample, feature)
    n = layout.n_intervals
    if len(found) < n:
        return []
    cuts = [round(len(found) * part / n) for part in range(n + 1)]
    parts = [found[first:last] for first, last in pairwise(cuts)]
    titles = [f"Percentile {100 * (n - part - 1) / n:.0f} to {100 * (n - part) / n:.0f}" for part in range(n)]
    return list(zip(titles, parts, strict=True))


def _without_repeats(found: Sequence[ExampleWindow | None], rows: TokenRows) -> tuple[ShownExample, ...]:
    """The first of all examples that read alike around their peaks, with the number of the others."""
    alike: dict[tuple[int, ...], list[ExampleWindow]] = {}
    for window in found:
        if window is not None:
            peak = window.position - window.start
            key = window.tokens[max(peak - _ALIKE_BEFORE, 0) : peak + _ALIKE_AFTER + 1]
            alike.setdefault(key, []).append(window)
    return tuple(ShownExample(same[0], _source_name(rows, same[0]), len(same) - 1) for same in alike.values())


def _source_name(rows: TokenRows, window: ExampleWindow) -> str:
    source = int(rows.source[window.document, window.position])
    return "" if source == NO_SOURCE else rows.names[source]
