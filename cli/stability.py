"""`saekit stability`: which features do several SAEs of one Site share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from .output import Progress, columns, read_and_written, write_facts

if TYPE_CHECKING:
    from saekit.analysis.stability import Stability as Measured
    from saekit.sae import SAE
    from saekit.targets import Site

    from .opened import OpenedCrosscoder, OpenedSAE

# how each number is shown to people
SHOWN = {
    "mean_max_cosine": "largest cosine with any feature of another SAE, mean",
    "matched_cosine": "cosine of what partners write, matched one-to-one",
    "encoder_cosine": "cosine of what the same partners read",
    "shared_70": "share of features whose partner writes the same, cosine 0.7 or more",
    "shared_90": "the same from 0.9 on",
    "encoder_70": "share whose partner reads the same, cosine 0.7 or more",
    "both_70": "share whose partner writes and reads the same",
    "everywhere_70": "share of the first SAE's features that every other has",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Stability:
    """Compare SAEs of one Site, trained with other seeds say: which features do they share?

    Features are paired one-to-one by the cosines of their decoder rows. Those that fire nowhere on the
    held-out text of the first SAE are left out; the others are also reported by how often they fire.

    Example:
      saekit stability sae-seed0 sae-seed1 sae-seed2
      saekit stability sae-seed0 sae-seed1 --rows 0 --json
    """

    saes: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Folders or files of the SAEs, their names in `saekit list`, or OWNER/NAME[@REVISION][:PATH] on the Hub."""
    rows: int = 40
    """Held-out rows to read for which features fire; 0 compares all features and needs no model."""
    model: str | None = None
    """Another model than the one the first SAE was trained on."""
    text: str | None = None
    """Another text than the one the first SAE was trained on."""
    device: str = "cpu"
    json: bool = False
    """Print the facts as JSON."""
    config: Path | None = None
    """YAML file with any of these settings; flags win over it."""

    def run(self) -> int:
        from saekit.analysis.stability import measure_stability
        from saekit.crosscoder import joined_sites
        from saekit.errors import SaekitError
        from saekit.loading import load

        if self.rows < 0:
            raise SaekitError(f"rows={self.rows}: give the number of rows to read, or 0 to compare all features")
        if self.rows == 0 and (self.model or self.text):
            raise SaekitError("--model and --text say what to read, and --rows 0 reads nothing; leave one of them out")
        saes = [load(folder, device=self.device) for folder in self.saes]
        check_one_site(self.saes, saes)
        densities = None
        if self.rows > 0:
            from .opened import open_crosscoder, open_sae

            what = {"model": self.model, "text": self.text, "rows": self.rows, "device": self.device}
            if joined_sites(saes[0].cfg.metadata):
                joint = open_crosscoder(self.saes[0], **what)
                densities = densities_of(saes, joint, joint.crosscoder.widths)
            else:
                opened = open_sae(self.saes[0], site=None, **what)
                densities = densities_of(saes, opened, {opened.site: opened.sae.d_model})
        facts = as_facts(self.saes, measure_stability(saes, densities=densities))
        write_facts(facts, as_json=self.json, text=lambda: as_text(facts))
        return 0


def check_one_site(folders: Sequence[Path], saes: Sequence["SAE"]) -> None:
    """Refuse what cannot be compared, before any model is loaded.

    Raises:
        SaekitError: for fewer than two SAEs, or SAEs of different models, Sites or widths.
    """
    from saekit.crosscoder import joined_sites
    from saekit.errors import SaekitError

    if len(saes) < 2:
        raise SaekitError(f"stability compares SAEs with each other; got {len(saes)}, give at least 2 folders")
    places = [
        (
            sae.cfg.model_name,
            " + ".join(joined_sites(sae.cfg.metadata)) or read_and_written(sae.cfg.hook_name, sae.cfg.hook_name_out),
            sae.d_model,
        )
        for sae in saes
    ]
    for folder, place in zip(folders, places, strict=True):
        if place != places[0]:
            theirs, wanted = (f"{site} of {model} ({width} dimensions)" for model, site, width in (place, places[0]))
            raise SaekitError(f"{folder} reads {theirs}, {folders[0]} {wanted}; compare SAEs of one Site")


def densities_of(
    saes: Sequence["SAE"], opened: "OpenedSAE | OpenedCrosscoder", widths: Mapping["Site", int]
) -> list[Any]:
    """How often each feature of each SAE fires on the rows, the model read once.

    Args:
        widths: of the Sites whose vectors, end to end, the SAEs read.
    """
    import torch

    from saekit.activations.harvest import Harvest
    from saekit.crosscoder import join

    rows = opened.corpus.held_out
    harvest = Harvest(target=opened.target, rows=rows, sites=tuple(widths), mask=opened.mask)
    counts = [torch.zeros(sae.n_features, dtype=torch.float64) for sae in saes]
    n_tokens = 0
    with Progress("reading features", len(rows), unit="rows") as progress, torch.no_grad():
        for batches in harvest.in_order():
            vectors = join({site: batches[site].vectors for site in widths}, widths)
            n_tokens += len(vectors)
            for count, sae in zip(counts, saes, strict=True):
                count += sae.encode(vectors.to(sae.b_dec.device)).feature_counts().cpu()
            progress.to(min(progress.done + harvest.batch_rows, len(rows)))
    return [count / max(1, n_tokens) for count in counts]


def as_facts(folders: Sequence[Path], measured: "Measured") -> dict[str, Any]:
    """All numbers, under the names that `saekit.analysis.stability` defines."""
    pairs = [
        {
            "first": str(folders[pair.first]),
            "second": str(folders[pair.second]),
            "matched_cosine": pair.matched_cosine,
            "shared_70": pair.shared_70,
            "shared_90": pair.shared_90,
            "both_70": pair.both_70,
        }
        for pair in measured.pairs
    ]
    return {
        "saes": [str(folder) for folder in folders],
        "compared_features": measured.live,
        **measured.summary(),
        "pairs": pairs,
        "bands": measured.bands,
    }


def as_text(facts: Mapping[str, Any]) -> str:
    """The facts for people."""
    lines = [(name, f"{facts[name]:<10.4f}{meaning}") for name, meaning in SHOWN.items()]
    for band in facts["bands"]:
        shares = f"{band.shared_70:.4f}  of {band.n_features:,} features"
        lines.append((f"shared_70, density 1e{band.exponent} up", shares))
    live = ", ".join(f"{n:,}" for n in facts["compared_features"])
    return columns(lines) + f"\n  over {facts['n_pairs']} pairs of SAEs with {live} features"
