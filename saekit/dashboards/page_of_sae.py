"""From an SAE or a crosscoder and its model to the data of a page: one pass over the rows, then a look at examples."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.activations.harvest import Harvest
from saekit.activations.text import Document
from saekit.activations.tokens import TokenRows
from saekit.analysis.concepts import ConceptLabels, label_tokens
from saekit.analysis.feature_pass import AddressedCodes, FeatureMeasurements, measure_features
from saekit.analysis.featured import interesting_features, logit_effects
from saekit.codes import SparseCodes
from saekit.crosscoder import Crosscoder
from saekit.dashboards.feature_effect import effect_of
from saekit.dashboards.page_data import Homes, PageData, build_page_data, token_texts
from saekit.patching.effects_file import KeptEffects
from saekit.patching.splice import writing_site
from saekit.sae import SAE
from saekit.targets import Site
from saekit.targets.readout import is_in_stream, stream_to_logits

Encode = Callable[[Mapping[Site, Float[Tensor, "n d_site"]]], SparseCodes]


@dataclass(frozen=True, slots=True)
class _Reader:
    """Codes, addresses and labels of rows, as `measure_features` wants them."""

    encode: Encode
    device: torch.device
    harvest: Harvest
    labels: ConceptLabels | None
    on_progress: Callable[[int], None]

    def read(self, chosen: Int[Tensor, " chosen"]) -> Iterator[AddressedCodes]:
        for batches in self.harvest.in_order(chosen):
            batch = next(iter(batches.values()))  # the tokens of one Site are those of all
            with torch.no_grad():
                codes = self.encode({site: at.vectors.to(self.device) for site, at in batches.items()}).to("cpu")
            labels = known = None
            if self.labels is not None:
                labels = self.labels.at(batch.document, batch.position)
                known = self.labels.known[batch.document, batch.position]
            self.on_progress(self.harvest.batch_rows)
            yield AddressedCodes(codes, batch.document, batch.position, labels, known)


def page_of_sae(
    sae: SAE,
    harvest: Harvest,
    *,
    metrics: Mapping[str, float | int],
    documents: Sequence[Document] = (),
    n_features: int = 60,
    kept: KeptEffects | None = None,
    on_progress: Callable[[int], None] = lambda rows_done: None,
) -> tuple[PageData, FeatureMeasurements]:
    """The most interesting features of `sae` over the rows of `harvest`, ready for `write_page`.

    Args:
        harvest: of the SAE's one Site; all of its rows are read.
        metrics: shown on the first screen, under the names that `Evaluation.metrics` uses.
        documents: Python modules that the rows were made from; features are then scored against the
            concepts of their source. Leave it out for any other text.
        kept: what the features do to the loss, if that was measured.
    """
    (site,) = harvest.sites
    page, measured = _page(
        sae,
        harvest,
        encode=lambda vectors: sae.encode(vectors[site]),
        w_dec=sae.W_dec,
        written=writing_site(sae, site),
        metrics=metrics,
        documents=documents,
        n_features=n_features,
        on_progress=on_progress,
    )
    return page if kept is None else with_effects(page, kept), measured


def page_of_crosscoder(
    crosscoder: Crosscoder,
    harvest: Harvest,
    *,
    metrics: Mapping[str, Any],
    documents: Sequence[Document] = (),
    n_features: int = 60,
    on_progress: Callable[[int], None] = lambda rows_done: None,
) -> tuple[PageData, FeatureMeasurements]:
    """The same of a crosscoder, with where each feature lives. Tokens are those that its last Site speaks for.

    Args:
        harvest: of the crosscoder's Sites.
        metrics: under the names that `CrosscoderEvaluation.metrics` uses, those of each Site under `by_site`.
    """
    of_whole = {name: value for name, value in metrics.items() if name != "by_site"}
    page, measured = _page(
        crosscoder.sae,
        harvest,
        encode=crosscoder.encode,
        w_dec=crosscoder.decoder()[crosscoder.sites[-1]],
        written=crosscoder.sites[-1],
        metrics=of_whole,
        documents=documents,
        n_features=n_features,
        on_progress=on_progress,
    )
    homes = Homes(
        sites=tuple(map(str, crosscoder.sites)),
        shares=crosscoder.shares().detach().cpu(),
        metrics=metrics.get("by_site", {}),
    )
    return replace(page, title="Crosscoder", homes=homes), measured


def _page(
    sae: SAE,
    harvest: Harvest,
    *,
    encode: Encode,
    w_dec: Float[Tensor, "n_features d_site"],
    written: Site,
    metrics: Mapping[str, float | int],
    documents: Sequence[Document],
    n_features: int,
    on_progress: Callable[[int], None],
) -> tuple[PageData, FeatureMeasurements]:
    rows = harvest.rows
    labels = label_tokens(rows, documents) if documents else None
    reader = _Reader(encode, sae.b_dec.device, harvest, labels, on_progress)
    measured = measure_features(reader.read(torch.arange(len(rows))))
    best = measured.concepts.scores().best() if measured.concepts is not None else None
    concept, score = best if best is not None else (None, None)
    features = interesting_features(measured.statistics, count=n_features, concept=concept, score=score)
    model = harvest.target.model
    unembed = stream_to_logits(model, w_dec.shape[1]) if is_in_stream(model, written) else None
    page = build_page_data(
        measured,
        features,
        rows=rows,
        encode_rows=reader.read,
        token_text=partial(token_texts, harvest.target.tokenizer),
        model=harvest.target.name,
        site=", ".join(map(str, harvest.sites)),
        rule=repr(sae.rule),
        metrics={name: float(value) for name, value in metrics.items()},
        concepts=labels.concepts if labels is not None else (),
        effects=None if unembed is None else logit_effects(w_dec[features].cpu(), unembed),
    )
    return page, measured


def with_effects(page: PageData, kept: KeptEffects) -> PageData:
    """The page with what each of its features does to the loss."""
    return replace(page, features=tuple(replace(one, effect=effect_of(kept, one.feature)) for one in page.features))


def sample_rows(rows: TokenRows, n_rows: int, *, seed: int = 0) -> TokenRows:
    """At most `n_rows` of the rows, drawn without order bias and kept in their order."""
    drawn = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:n_rows]
    return rows.select(drawn.sort().values)
