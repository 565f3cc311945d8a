"""`saekit convert`: an SAE of any format, written for saekit or for another tool."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from .info import rule_as_text
from .output import Progress, columns, write_facts

if TYPE_CHECKING:
    from saekit.sae import SAE


@dataclass(frozen=True, kw_only=True, slots=True)
class Convert:
    """Write an SAE in another format, if it means the same there; otherwise say why it does not.

    A Mutual- or Feature-Choice SAE is written as the JumpReLU SAE that its calibrated thresholds make of it. One
    without thresholds gets them from text, if --calibrate says how much of it to read.

    Example:
      saekit convert sae sae-for-saelens --to saelens
      saekit convert EleutherAI/sae-llama-3-8b-32x:layers.10 sae
      saekit convert uncalibrated sae-for-saelens --to saelens --calibrate 100000
    """

    sae: Annotated[Path, tyro.conf.Positional]
    """Folder or file of the SAE, its name in `saekit list`, or OWNER/NAME[@REVISION][:PATH] on the Hub."""
    out: Annotated[Path, tyro.conf.Positional]
    """Folder to write."""
    to: Literal["saekit", "saelens", "sparsify"] = "saekit"
    """Whose format."""
    input_scale: float | None = None
    """What inputs are multiplied with before encoding, if its files need that and do not say it; it is folded in."""
    calibrate: int | None = None
    """Tokens to read for the thresholds of a rule that looks across tokens; tens of thousands at least."""
    model: str | None = None
    """For --calibrate: another model than the one it was trained on."""
    text: str | None = None
    """For --calibrate: another text than the one it was trained on."""
    json: bool = False
    """Print the facts as JSON."""
    config: Path | None = None
    """YAML file with any of these settings; flags win over it."""

    def run(self) -> int:
        from saekit.errors import SaekitError
        from saekit.loading import convert, describe, load

        if self.calibrate is None and (self.model or self.text):
            raise SaekitError("--model and --text say what --calibrate reads; give --calibrate too, or leave them out")
        described = describe(self.sae)
        if self.calibrate is None:
            sae = load(self.sae, input_scale=self.input_scale)
        else:
            sae = self._calibrated(self.calibrate)
        convert(sae, self.out, to=self.to)
        facts = {
            "from": described.format,
            "to": self.to,
            "out": self.out,
            "d_in": sae.d_model,
            "n_features": sae.n_features,
            "rule": rule_as_text(sae.rule),
            "hook_name": sae.cfg.hook_name,
        }
        write_facts(facts, as_json=self.json, text=lambda: columns((name, str(value)) for name, value in facts.items()))
        return 0

    def _calibrated(self, n_tokens: int) -> "SAE":
        import torch

        from saekit.activations.harvest import Harvest
        from saekit.errors import SaekitError
        from saekit.training.calibrate import calibrate

        from .opened import open_sae

        opened = open_sae(
            self.sae,
            model=self.model,
            text=self.text,
            site=None,
            rows=None,
            device="cpu",
            input_scale=self.input_scale,
        )
        rows = opened.corpus.train
        if n_tokens < rows.context:
            raise SaekitError(
                f"--calibrate {n_tokens} is less than one row of {rows.context} tokens; thresholds take more, "
                "as in --calibrate 100000"
            )
        rows = rows.select(slice(n_tokens // rows.context))
        harvest = Harvest(target=opened.target, rows=rows, sites=(opened.site,), mask=opened.mask)
        with Progress("reading activations", len(rows), unit="rows") as progress:
            pool = []
            for batches in harvest.in_order():
                pool.append(batches[opened.site].vectors)
                progress.to(min(progress.done + harvest.batch_rows, len(rows)))
        return opened.sae.with_rule(calibrate(opened.sae, torch.cat(pool)))
