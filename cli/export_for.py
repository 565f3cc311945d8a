"""What `saekit export --to` writes for other tools: Neuronpedia's features, delphi's cache."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .output import Progress

if TYPE_CHECKING:
    from .opened import OpenedSAE


def export_neuronpedia(opened: "OpenedSAE", out: Path, *, n_features: int, n_tokens: int) -> dict[str, Any]:
    """Features as one batch of Neuronpedia's JSON, and what is in it."""
    from saekit.dashboards.neuronpedia import batch, write_batch
    from saekit.dashboards.page_of_sae import page_of_sae
    from saekit.dashboards.static_page import check_writable

    check_writable(out / "batch-0.json")
    harvest = _harvest(opened, n_tokens)
    with Progress("reading features", len(harvest.rows), unit="rows") as progress:
        page, _ = page_of_sae(
            opened.sae,
            harvest,
            metrics={},
            n_features=n_features,
            on_progress=lambda done: progress.to(min(progress.done + done, len(harvest.rows))),
        )
    layer = re.search(r"\.([0-9]+)(?:\.|:|$)", str(opened.site))
    contents = batch(
        page,
        layer=int(layer[1]) if layer else None,
        sae_set=f"saekit-{opened.sae.n_features}",
        n_prompts=len(harvest.rows),
        context=harvest.rows.context,
        dataset=opened.text,
    )
    return {"file": str(write_batch(out, contents)), "features": len(page.features), "tokens": page.n_tokens}


def export_delphi(opened: "OpenedSAE", out: Path, *, n_tokens: int) -> dict[str, Any]:
    """Codes as delphi's cache, and how many there are."""
    from saekit.analysis.delphi_cache import write_delphi_cache

    harvest = _harvest(opened, n_tokens)
    with Progress("encoding", len(harvest.rows), unit="rows") as progress:
        entries = write_delphi_cache(
            out,
            opened.sae,
            harvest,
            text=opened.text,
            on_progress=lambda done: progress.to(min(progress.done + done, len(harvest.rows))),
        )
    return {"folder": str(out), "entries": entries, "tokens": harvest.rows.ids.numel()}


def _harvest(opened: "OpenedSAE", n_tokens: int) -> Any:
    from saekit.activations.harvest import Harvest
    from saekit.dashboards.page_of_sae import sample_rows

    rows = sample_rows(opened.corpus.train, max(1, n_tokens // opened.corpus.train.context))
    return Harvest(target=opened.target, rows=rows, sites=(opened.site,), mask=opened.mask)
