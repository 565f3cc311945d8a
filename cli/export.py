"""`saekit export`: a page about an SAE's features, in one file."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from .export_for import export_delphi, export_neuronpedia
from .output import Progress, columns, warn, write_facts

if TYPE_CHECKING:
    from saekit.patching.effects_file import KeptEffects

    from .opened import OpenedCrosscoder, OpenedSAE


@dataclass(frozen=True, kw_only=True, slots=True)
class Export:
    """Write a page about a saved SAE or crosscoder: how often features fire, the most interesting ones with examples.

    One HTML file that needs nothing else, for looking at and for sending to somebody. Features of an
    SAE on Python source are scored against the concepts of the language. Effects on the model's loss are shown if
    `saekit effects` has measured them on the same text. Of a crosscoder each feature's page says at which Sites it
    lives.

    Example:
      saekit export sae --out features.html
      saekit export sae --features 120 --tokens 1000000
      saekit export sae --to neuronpedia --features 2048
    """

    sae: Annotated[Path, tyro.conf.Positional]
    """Folder or file of the SAE, its name in `saekit list`, or OWNER/NAME[@REVISION][:PATH] on the Hub."""
    out: Path | None = None
    """File or folder to write; features.html, neuronpedia or delphi-cache if not given."""
    to: Literal["page", "neuronpedia", "delphi"] = "page"
    """A page, features in the JSON that Neuronpedia imports, or all codes as delphi's cache."""
    features: int = 60
    """How many features get a page. Unless that is all that fire, those active on fewer than 10 tokens or on more than
    a fifth of them are left out."""
    tokens: int = 300_000
    """How much text to read for statistics and examples."""
    model: str | None = None
    """Another model than the one it was trained on."""
    text: str | None = None
    """Another text than the one it was trained on."""
    site: str | None = None
    """Another Site than the one it was trained at."""
    device: str = "cpu"
    json: bool = False
    """Print the facts as JSON."""
    config: Path | None = None
    """YAML file with any of these settings; flags win over it."""

    def run(self) -> int:
        from saekit.selection import check_serves_prompts

        from .opened import check_some, is_crosscoder, open_sae

        check_some("--features", self.features)
        check_some("--tokens", self.tokens)
        if is_crosscoder(self.sae):
            return self._run_joint()
        opened = open_sae(self.sae, model=self.model, text=self.text, site=self.site, rows=None, device=self.device)
        check_serves_prompts(opened.sae.rule)
        match self.to:
            case "neuronpedia":
                out = self.out or Path("neuronpedia")
                facts = export_neuronpedia(opened, out, n_features=self.features, n_tokens=self.tokens)
            case "delphi":
                facts = export_delphi(opened, self.out or Path("delphi-cache"), n_tokens=self.tokens)
            case _:
                facts = self._page_of(opened)
        self._write(facts)
        return 0

    def _run_joint(self) -> int:
        from saekit.errors import SaekitError
        from saekit.selection import check_serves_prompts

        from .opened import check_own_sites, open_crosscoder

        check_own_sites(self.sae, self.site)
        if self.to != "page":
            raise SaekitError(f"{self.sae} is a crosscoder, and {self.to} takes SAEs of one Site; leave --to out")
        opened = open_crosscoder(self.sae, model=self.model, text=self.text, rows=None, device=self.device)
        check_serves_prompts(opened.crosscoder.sae.rule)
        self._write(self._page_of(opened))
        return 0

    def _page_of(self, opened: "OpenedSAE | OpenedCrosscoder") -> dict[str, Any]:
        out = self.out or Path("features.html")
        return export_page(opened, self.sae, out, n_features=self.features, n_tokens=self.tokens)

    def _write(self, facts: dict[str, Any]) -> None:
        write_facts(facts, as_json=self.json, text=lambda: columns((name, str(value)) for name, value in facts.items()))


def export_page(
    opened: "OpenedSAE | OpenedCrosscoder", folder: Path, out: Path, *, n_features: int, n_tokens: int
) -> dict[str, Any]:
    """Read the text that the SAE was trained on (or the one given), write the page, and say what is in it.

    Metrics of training and effects that `saekit effects` has kept in the folder are shown if they are of the same
    model, Site and text.
    """
    from saekit.activations.harvest import Harvest
    from saekit.dashboards.page_of_sae import page_of_crosscoder, page_of_sae, sample_rows
    from saekit.dashboards.static_page import check_writable, write_page

    from .opened import OpenedCrosscoder

    check_writable(out)
    if isinstance(opened, OpenedCrosscoder):
        sae, sites = opened.crosscoder.sae, opened.crosscoder.sites
        page_of = partial(page_of_crosscoder, opened.crosscoder)
    else:
        sae, sites = opened.sae, (opened.site,)
        page_of = partial(page_of_sae, sae, kept=_effects_of(folder, opened))
    rows = sample_rows(opened.corpus.train, max(1, n_tokens // opened.corpus.train.context))
    harvest = Harvest(target=opened.target, rows=rows, sites=sites, mask=opened.mask)
    documents = opened.corpus.train_documents
    is_python = all(document.name.endswith(".py") for document in documents)
    with Progress("reading features", len(rows), unit="rows") as progress:
        page, measured = page_of(
            harvest,
            metrics=sae.cfg.metadata.get("evaluation", {}) if opened.is_as_trained else {},
            documents=documents if is_python else (),
            n_features=n_features,
            on_progress=lambda done: progress.to(min(progress.done + done, len(rows))),
        )
        write_page(out, page)
    statistics = measured.statistics
    return {
        "page": str(out),
        "features_shown": len(page.features),
        "effects_shown": sum(feature.effect is not None for feature in page.features),
        "page_tokens": statistics.n_tokens,
        "page_never_fired": int((statistics.active == 0).sum()),
        "megabytes": round(out.stat().st_size / 1e6, 2),
    }


def _effects_of(folder: Path, opened: "OpenedSAE") -> "KeptEffects | None":
    """What the folder has kept, if it is of this model, Site and text; otherwise a line says what it is of."""
    from saekit.patching.effects_file import kept_effects

    kept = kept_effects(folder, opened.sae)
    if kept is None:
        return None
    own = {"model": opened.target.name, "site": str(opened.site), "text": opened.text}
    other = [what for what in own if kept.facts.get(what) != own[what]]
    if not other:
        return kept
    warn(
        "; ".join(f"{what} {own[what]}, not {kept.facts.get(what)}" for what in other)
        + f": the effects kept in {folder} are left out; `saekit effects` measures them anew"
    )
    return None
