"""`saekit effects`: what every feature of an SAE does for the model's predictions."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from .output import Stages, columns, write_facts

if TYPE_CHECKING:
    from saekit.patching.effects_file import KeptEffects

SHOWN_FEATURES = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Effects:
    """Measure the causal effect of every feature over a text, and check some of them exactly.

    The effect of a feature is by how many nats the loss of a row rises when the feature is zeroed in it, per token
    on which it is active. It is attributed, from gradients and the curvature of the loss, for all features at
    once, with 95 % intervals over rows and with a control: random directions, as often active and as long. Some
    features are then zeroed for real, and the report says how well the two agree. What was found is kept in the
    SAE's folder as effects.safetensors, where `saekit export` finds it.

    Example:
      saekit effects sae
      saekit effects sae --rows 2000 --check-features 100 --json
      saekit effects sae --rows 2000 --check-features 100 --resume
    """

    sae: Annotated[Path, tyro.conf.Positional]
    """Folder of the SAE; what is measured is kept in it."""
    model: Annotated[str | None, tyro.conf.Positional] = None
    """Another model than the one it was trained on."""
    text: Annotated[str | None, tyro.conf.Positional] = None
    """Another text than the one it was trained on."""
    site: str | None = None
    """Another Site than the one it was trained at."""
    rows: int | None = None
    """Read no more rows than this of what training held out, or of another text."""
    batch_rows: int = 16
    """Rows per forward pass; what is random depends on it, but no effect in the mean."""
    draws: int = 4
    """Continuations drawn per row for the curvature of the loss; 0 for gradients alone, which say little about a
    trained model."""
    check_features: int = 32
    """How many features to zero for real."""
    check_rows: int = 16
    """On how many rows."""
    seed: int = 0
    """Of the draws, the control and the choice of features to check."""
    resume: bool = False
    """Go on from where an earlier run with the same settings stopped."""
    device: str = "cpu"
    json: bool = False
    """Print the facts as JSON."""
    config: Path | None = None
    """YAML file with any of these settings; flags win over it."""

    def run(self) -> int:
        from saekit.errors import SaekitError
        from saekit.patching.corpus_effects import EffectSettings
        from saekit.patching.effects_file import keep_effects
        from saekit.patching.effects_run import EffectsRun, forget_unfinished, measure_effects
        from saekit.selection import check_serves_prompts

        from .opened import open_sae

        settings = EffectSettings(draws=self.draws, batch_rows=self.batch_rows, seed=self.seed)
        opened = open_sae(
            self.sae, model=self.model, text=self.text, site=self.site, rows=self.rows, device=self.device
        )
        check_serves_prompts(opened.sae.rule)
        if not self.sae.is_dir():
            raise SaekitError(
                f"{self.sae} is not a folder, and what is measured is kept in the SAE's folder; "
                f"`saekit convert {self.sae} my-sae` makes one"
            )
        run = EffectsRun(
            target=opened.target,
            sae=opened.sae,
            site=opened.site,
            rows=opened.corpus.held_out,
            mask=opened.mask,
            settings=settings,
            facts={"model": opened.target.name, "text": opened.text},
            check_features=self.check_features,
            check_rows=self.check_rows,
            unfinished=self.sae / "effects.unfinished.safetensors",
            resume=self.resume,
        )
        with Stages("rows") as bars:
            kept = measure_effects(run, on_progress=bars.to)
        path = keep_effects(self.sae, opened.sae, kept)
        forget_unfinished(run)
        facts = {"sae": str(self.sae), **facts_of(kept), "file": str(path)}
        write_facts(facts, as_json=self.json, text=lambda: as_text(kept, facts))
        return 0


def facts_of(kept: "KeptEffects") -> dict[str, Any]:
    """The numbers of the report."""
    effects, check = kept.effects, kept.check
    active = effects.active > 0
    order = effects.low.masked_fill(~active, -float("inf")).argsort(descending=True, stable=True)
    control = effects.random[active].quantile(0.975)
    return {
        **kept.facts,
        "active_features": int(active.sum()),
        "surely_help": int((active & (effects.low > 0)).sum()),
        "surely_harm": int((active & (effects.high < 0)).sum()),
        "above_control": float((effects.effect[active] > control).double().mean()),
        "median_effect": float(effects.effect[active].median()),
        "median_control": float(effects.random[active].median()),
        "check_rank_correlation": check.rank_correlation,
        "check_slope": check.slope,
        "checked": len(check.feature),
        "strongest": [
            {"feature": f, **{n: float(getattr(effects, n)[f]) for n in ("effect", "low", "high", "random")}}
            for f in order[:SHOWN_FEATURES].tolist()
        ],
    }


def as_text(kept: "KeptEffects", facts: dict[str, Any]) -> str:
    """The report for people."""
    lines = [
        ("text", f"{facts['text']}, {facts['rows']:,} rows; {facts['active_features']:,} features active"),
        ("effect", f"{facts['median_effect']:+.2g} nats per active token (median over features)"),
        ("control", f"{facts['median_control']:+.2g} for random directions, as often active and as long"),
        ("", f"{facts['above_control']:.0%} of the features are above 97.5 % of the control's"),
        ("certain", f"{facts['surely_help']:,} help, {facts['surely_harm']:,} harm: their 95 % intervals leave out 0"),
        ("check", f"rank correlation {facts['check_rank_correlation']:.2f} with the exact effect"),
        ("", f"exact effect = {facts['check_slope']:.2f} x attributed, over {facts['checked']} features"),
    ]
    strongest = [
        (f"#{one['feature']}", f"{one['effect']:+.3g} ({one['low']:+.3g} to {one['high']:+.3g})")
        for one in facts["strongest"]
    ]
    heading = "most certain to help, in nats per active token"
    return f"{columns(lines)}\n\n  {heading}\n{columns(strongest)}\n\n  {facts['file']}"
