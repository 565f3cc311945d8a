"""How good is a crosscoder: what its one code costs, and what that is worth at each of its Sites.

Definitions are those of `saekit.analysis.evaluate`. What is about codes is said once. What is about
reconstruction and loss is said of each Site, with the reconstruction of that Site alone in the forward pass, made
from the codes of the untouched activations of all Sites. One number more, over features that fired:

    own_fraction         features that write nearly only here: over nine tenths of their squared decoder norm
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit.activations.harvest import Harvest
from saekit.activations.mask import MaskPolicy, on_grid
from saekit.activations.tokens import TokenRows
from saekit.analysis.evaluate import check_observed
from saekit.analysis.language_losses import NO_LOSSES, language_losses, loss_batch_rows
from saekit.analysis.sums import Unexplained, Usage
from saekit.codes import SparseCodes
from saekit.crosscoder import Crosscoder
from saekit.density import ZipfFit
from saekit.errors import DataError, SaekitError
from saekit.targets import Site, Target

OWN = 0.9


@dataclass(frozen=True, kw_only=True, slots=True)
class SiteEvaluation:
    """Metrics of one Site; definitions in the module's docstring."""

    fvu: float
    explained_variance: float
    own_fraction: float
    predicted: int
    ce_clean: float | None
    ce_sae: float | None
    ce_zero: float | None
    ce_mean: float | None
    ce_recovered: float | None
    ce_recovered_mean: float | None
    kl: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class CrosscoderEvaluation:
    """Metrics of a crosscoder.

    Attributes:
        tokens: tokens read, each with one vector at every Site.
        density: `(n_features,)` share of tokens on which each feature fired.
        l0_counts: `(most + 1,)` tokens with 0, 1, 2, ... active features.
    """

    tokens: int
    l0: float
    l0_p5: float
    l0_p95: float
    dead_fraction: float
    underused_fraction: float
    by_site: dict[Site, SiteEvaluation]
    density: Float[Tensor, " n_features"]
    l0_counts: Int[Tensor, " most"]
    zipf: ZipfFit

    def metrics(self) -> dict[str, Any]:
        """The numbers alone, those that exist; of Sites under `by_site` and their text."""
        skipped = {"density", "l0_counts", "zipf", "by_site"}
        names = (field.name for field in fields(self) if field.name not in skipped)
        numbers = {name: getattr(self, name) for name in names}
        by_site = {
            str(site): {name: value for name, value in asdict(found).items() if value is not None}
            for site, found in self.by_site.items()
        }
        return numbers | {"zipf_exponent": self.zipf.exponent, "zipf_offset": self.zipf.offset, "by_site": by_site}


@torch.no_grad()
def evaluate_crosscoder(
    crosscoder: Crosscoder,
    target: Target,
    rows: TokenRows,
    *,
    mask: MaskPolicy = MaskPolicy(),
    batch_rows: int = 16,
    loss_rows: int | None = None,
    on_progress: Callable[[int], None] = lambda rows_done: None,
) -> CrosscoderEvaluation:
    """Measure a crosscoder on `rows`, which training should not have seen.

    Args:
        loss_rows: measure cross-entropies on this many rows, the first ones; all if None, none if 0.
        on_progress: called with the number of rows done since the last call; `len(rows)` in all, and `loss_rows` more
            for each Site.

    Raises:
        DataError: if there are no rows, or every token is masked.
        ShapeError: if a Site has another width than the crosscoder knows, or the mask keeps other tokens there.
        SaekitError: if a Site stands for every call of its module, which has several vectors for each token.
    """
    if len(rows) == 0:
        raise DataError("there are no rows to evaluate on; give at least one")
    if every := [str(site) for site in crosscoder.sites if site.call is None]:
        raise SaekitError(
            f"{', '.join(every)} stands for every call, and one vector for each token is needed; name a call of it, "
            "as in layers.2@1"
        )
    harvest = Harvest(target=target, rows=rows, sites=crosscoder.sites, mask=mask, batch_rows=batch_rows)
    usage = Usage(crosscoder.sae.n_features)
    unexplained = {site: Unexplained(width) for site, width in crosscoder.widths.items()}
    for part in torch.arange(len(rows)).split(batch_rows):
        seen = _Read.of(crosscoder, harvest, part)
        usage.observe(seen.codes)
        for site, sums in unexplained.items():
            sums.observe(seen.vectors[site], seen.reconstructed[site])
        on_progress(len(part))
    check_observed(usage)
    losses = dict.fromkeys(crosscoder.sites, NO_LOSSES)
    if loss_rows is None or loss_rows > 0:
        harvest = replace(harvest, rows=rows.select(slice(loss_rows)))
        losses = _losses(crosscoder, harvest, {site: sums.mean for site, sums in unexplained.items()}, on_progress)
    own = _own_fractions(crosscoder, fired=usage.counts > 0)
    by_site = {
        site: SiteEvaluation(fvu=sums.fvu, explained_variance=1 - sums.fvu, own_fraction=own[site], **losses[site])
        for site, sums in unexplained.items()
    }
    return CrosscoderEvaluation(by_site=by_site, **usage.metrics())


def _own_fractions(crosscoder: Crosscoder, *, fired: Bool[Tensor, " n_features"]) -> dict[Site, float]:
    own = crosscoder.shares().cpu()[fired] > OWN
    return dict(zip(crosscoder.sites, own.double().mean(0).tolist(), strict=True))


@dataclass(frozen=True, slots=True)
class _Read:
    """Some rows as a crosscoder reads and writes them; vectors on its device.

    Attributes:
        row, position: of each token, the row counted from the first of those read.
    """

    codes: SparseCodes
    vectors: dict[Site, Tensor]
    reconstructed: dict[Site, Tensor]
    row: Int[Tensor, " n"]
    position: Int[Tensor, " n"]

    @classmethod
    def of(cls, crosscoder: Crosscoder, harvest: Harvest, rows: Int[Tensor, " chosen"]) -> "_Read":
        """Rows that follow each other, in one forward pass."""
        (batches,) = harvest.in_order(rows)
        vectors = {site: batch.vectors.to(crosscoder.sae.b_dec.device) for site, batch in batches.items()}
        first = batches[crosscoder.sites[0]]
        for batch in batches.values():
            first.check_same_tokens(batch)
        codes = crosscoder.encode(vectors)
        return cls(codes, vectors, crosscoder.decode(codes), first.document - rows[0], first.position)


def _losses(
    crosscoder: Crosscoder, harvest: Harvest, means: Mapping[Site, Tensor], on_progress: Callable[[int], None]
) -> dict[Site, dict[str, Any]]:
    target, rows = harvest.target, harvest.rows
    looks_across_tokens = crosscoder.sae.rule.looks_across_tokens

    def spliced(chosen: Int[Tensor, " chosen"]) -> dict[Site, Callable[[], Tensor]]:
        read, ids = _Read.of(crosscoder, harvest, chosen), rows.ids[chosen]

        def put(site: Site, x: Tensor) -> Tensor:
            changed = on_grid(x, ids, site).clone()
            changed[read.row, read.position] = read.reconstructed[site].to(x)
            return changed.reshape(x.shape)

        return {site: partial(target.run, ids, edits={site: partial(put, site)}) for site in means}

    return language_losses(
        target,
        rows,
        means,
        spliced,
        batch_rows=loss_batch_rows(target, rows, harvest.batch_rows, looks_across_tokens=looks_across_tokens),
        on_progress=on_progress,
    )
