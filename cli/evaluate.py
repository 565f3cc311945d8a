"""`saekit eval`: how good an SAE is on held-out text."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import tyro

from .output import Progress, columns, write_facts

if TYPE_CHECKING:
    from saekit.activations.mask import MaskPolicy
    from saekit.activations.tokens import TokenRows
    from saekit.analysis.evaluate import Evaluation
    from saekit.sae import SAE
    from saekit.targets import Site, Target

Measured = TypeVar("Measured")

# the model runs four times over these; the spread of a mean over 40,000 predictions is small already
LOSS_ROWS = 160

# how each number is shown to people; the rest of the metrics is for --json
SHOWN = {
    "fvu": "fraction of variance unexplained",
    "l0": "active features per token",
    "dead_fraction": "features that never fired",
    "underused_fraction": "features far under the Zipf line",
    "ce_clean": "nats per token, model untouched",
    "ce_sae": "nats per token, SAE spliced in",
    "ce_zero": "nats per token, Site zeroed",
    "ce_mean": "nats per token, Site at its mean",
    "ce_recovered": "loss recovered against zero",
    "ce_recovered_mean": "loss recovered against mean",
    "kl": "nats from clean to spliced prediction",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Eval:
    """Evaluate a saved SAE: reconstruction, sparsity, and the loss of the model with it spliced in.

    Model, text, Site and token mask are those that it was trained with, unless told otherwise; of the
    same text the same rows are held out as in training. Of a crosscoder the loss is that of the model with
    one of its Sites reconstructed, for each in turn.

    Example:
      saekit eval sae
      saekit eval sae --text ./other.txt --json
    """

    sae: Annotated[Path, tyro.conf.Positional]
    """Folder or file of the SAE, its name in `saekit list`, or OWNER/NAME[@REVISION][:PATH] on the Hub."""
    model: str | None = None
    """Another model than the one it was trained on."""
    text: str | None = None
    """Another text than the one it was trained on; all of it is then read."""
    site: str | None = None
    """Another Site than the one it was trained at."""
    rows: int | None = None
    """Read no more rows than this of what training held out, or of another text."""
    device: str = "cpu"
    json: bool = False
    """Print all metrics as JSON."""
    config: Path | None = None
    """YAML file with any of these settings; flags win over it."""

    def run(self) -> int:
        from .opened import is_crosscoder, open_sae

        if is_crosscoder(self.sae):
            return self._run_joint()
        opened = open_sae(
            self.sae, model=self.model, text=self.text, site=self.site, rows=self.rows, device=self.device
        )
        evaluation = evaluate_with_progress(opened.sae, opened.target, opened.corpus.held_out, opened.site, opened.mask)
        facts = {"sae": str(self.sae), "site": str(opened.site), **with_missing(evaluation.metrics())}
        write_facts(facts, as_json=self.json, text=lambda: metric_lines(facts))
        return 0

    def _run_joint(self) -> int:
        from .crosscoder import evaluate_joint, facts_of, joint_lines
        from .opened import check_own_sites, open_crosscoder

        check_own_sites(self.sae, self.site)
        opened = open_crosscoder(self.sae, model=self.model, text=self.text, rows=self.rows, device=self.device)
        metrics = evaluate_joint(opened.crosscoder, opened.target, opened.corpus.held_out, opened.mask)
        facts = facts_of(self.sae, opened.crosscoder.sites, metrics)
        write_facts(facts, as_json=self.json, text=lambda: joint_lines(facts))
        return 0


def evaluate_with_progress(
    sae: "SAE", target: "Target", rows: "TokenRows", site: "Site", mask: "MaskPolicy"
) -> "Evaluation":
    """`evaluate`, with a bar on stderr."""
    from saekit.analysis.evaluate import evaluate

    return with_bar(len(rows), 1, partial(evaluate, sae, target, rows, site, mask=mask))


def with_bar(n_rows: int, n_sites: int, evaluation: "Callable[..., Measured]") -> "Measured":
    """An evaluation whose losses at each Site are of `LOSS_ROWS` rows, with a bar on stderr."""
    loss_rows = min(LOSS_ROWS, n_rows)
    with Progress("evaluating", n_rows + loss_rows * n_sites, unit="rows") as progress:
        return evaluation(loss_rows=loss_rows, on_progress=lambda rows_done: progress.to(progress.done + rows_done))


def with_missing(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics, and None for each that people look at and that there is none of here."""
    return {**dict.fromkeys(SHOWN), **metrics}


def metric_lines(metrics: Mapping[str, Any]) -> str:
    """The metrics that people look at, a line each."""
    tokens = f"over {metrics['tokens']:,} activations"
    return columns(metric_rows(metrics)) + f"\n  {tokens}, {metrics['predicted']:,} predictions"


def metric_rows(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Name and the rest of the line, of those that there are."""
    lines = []
    for name, meaning in SHOWN.items():
        if metrics.get(name) is None:
            if name.startswith("ce_recovered") and metrics.get("ce_clean") is not None:
                lines.append((name, f"{'-':<18}{meaning}: ablation does no harm here"))
            continue
        value = f"{metrics[name]:.4f}"
        if name == "l0":
            value = f"{metrics['l0']:.2f} ({metrics['l0_p5']:.0f} to {metrics['l0_p95']:.0f})"
        lines.append((name, f"{value:<18}{meaning}"))
    return lines
