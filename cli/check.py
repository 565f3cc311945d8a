"""`saekit check`: does an SAE do here what is said of it, and if not, what is the matter?"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from .output import Progress, columns, write_facts

if TYPE_CHECKING:
    from saekit.analysis.check import Verdict

METRICS = {"l0": "active features per token", "fvu": "variance unexplained", "ce_recovered": "loss recovered"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """Compare an SAE with what its files or the index claim of it, and name the mistake if they disagree.

    Runs some thousand tokens and measures L0, FVU and recovered loss. Where a claim does not hold, the usual
    mistakes are undone one at a time: BOS, the wrong Site, a layer off by one, normalisation, the scale of
    the inputs, b_dec, centred inputs, bfloat16. The one that explains the numbers is named. The exit code is 1
    if the claims do not hold.

    Example:
      saekit check sae
      saekit check gpt2-small-res-jb/blocks.8.hook_resid_pre gpt2 NeelNanda/pile-10k
    """

    sae: Annotated[Path, tyro.conf.Positional]
    """Folder or file of the SAE, its name in `saekit list`, or OWNER/NAME[@REVISION][:PATH] on the Hub."""
    model: Annotated[str | None, tyro.conf.Positional] = None
    """The model; the one that the SAE's files name if not given."""
    text: Annotated[str | None, tyro.conf.Positional] = None
    """The text; the one that the SAE was trained on if not given and recorded."""
    site: str | None = None
    """Another Site than the SAE's own."""
    tokens: int = 4096
    """How much text to read for each measurement."""
    device: str = "cpu"
    json: bool = False
    """Print the facts as JSON."""
    config: Path | None = None
    """YAML file with any of these settings; flags win over it."""

    def run(self) -> int:
        from saekit.analysis.check import OTHER_TEXT, SAME_TEXT, check, claims_of
        from saekit.analysis.suspects import Setting
        from saekit.errors import SaekitError
        from saekit.loading import describe

        from .opened import check_some, open_sae

        check_some("--tokens", self.tokens)
        if self.text is None and "text" not in describe(self.sae).weights.metadata:
            raise SaekitError(f"{self.sae} does not record its text; give it: saekit check {self.sae} MODEL TEXT")
        opened = open_sae(self.sae, model=self.model, text=self.text, site=self.site, rows=None, device=self.device)
        rows = opened.corpus.held_out
        rows = rows.select(slice(max(1, self.tokens // rows.context)))
        setting = Setting(sae=opened.sae, target=opened.target, site=opened.site, rows=rows, mask=opened.mask)
        with Progress("measuring", 1, unit="settings") as progress:

            def on_progress(what: str) -> None:
                progress.total = progress.bar.total = progress.done + 1
                progress.to(progress.done + 1, what)

            verdict = check(
                setting,
                claims_of(opened.sae),
                tolerance=SAME_TEXT if opened.is_own_text else OTHER_TEXT,
                on_progress=on_progress,
            )
        facts = {"sae": str(self.sae), "site": str(opened.site), **facts_of(verdict)}
        write_facts(facts, as_json=self.json, text=lambda: _as_text(facts))
        return 1 if verdict.agrees is False else 0


def facts_of(verdict: "Verdict") -> dict[str, Any]:
    """The verdict in names and numbers."""
    measured, culprit = verdict.evaluation.metrics(), verdict.culprit
    return {
        "agrees": verdict.agrees,
        "claimed": {name: getattr(verdict.claims, name) for name in METRICS},
        "measured": {name: measured.get(name) for name in METRICS},
        "culprit": None if culprit is None else culprit.suspect.kind,
        "says": None if culprit is None else culprit.suspect.says,
        "then": None if culprit is None else {name: culprit.evaluation.metrics().get(name) for name in METRICS},
        "tried": [
            {"kind": one.suspect.kind, "says": one.suspect.says, "l0": one.evaluation.l0, "fvu": one.evaluation.fvu}
            for one in verdict.tried
        ],
        "tokens": measured["tokens"],
    }


def _as_text(facts: dict[str, Any]) -> str:
    def number(value: float | None) -> str:
        return "-" if value is None else f"{value:.4g}"

    rows = [("", f"{'claimed':>10} {'measured':>10}" + (f" {'then':>10}" if facts["then"] else ""))]
    for name, meaning in METRICS.items():
        values = [facts["claimed"][name], facts["measured"][name], *([facts["then"][name]] if facts["then"] else [])]
        rows.append((name, " ".join(f"{number(value):>10}" for value in values) + f"   {meaning}"))
    if facts["agrees"]:
        verdict = "It does what is claimed of it."
        if facts["claimed"]["ce_recovered"] is not None and facts["measured"]["ce_recovered"] is None:
            verdict += " Recovered loss was not compared: ablation does no harm here."
    elif facts["agrees"] is None:
        verdict = "Nothing is claimed of it; the numbers are plausible."
    elif facts["says"]:
        verdict = f"Does not hold as it is used. {facts['culprit']}: {facts['says']}."
    else:
        kinds = ", ".join(dict.fromkeys(one["kind"] for one in facts["tried"]))
        verdict = f"Does not hold, and none of the usual mistakes explains it ({kinds}): another text, or another SAE?"
    return f"{columns(rows)}\n\n{verdict}"
