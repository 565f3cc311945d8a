"""`saekit convert`: an SAE of any format, written for saekit or for another tool."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from .info import rule_as_text
from .output import columns, write_facts


@dataclass(frozen=True, kw_only=True, slots=True)
class Convert:
    """Write an SAE in another format, if it means the same there; otherwise say why it does not.

    A Mutual- or Feature-Choice SAE is written as the JumpReLU SAE that its calibrated thresholds make of it.

    Example:
      saekit convert sae sae-for-saelens --to saelens
      saekit convert EleutherAI-sae/layers.5 sae --to saekit
    """

    sae: Annotated[Path, tyro.conf.Positional]
    """Folder of the SAE, or the file that holds its weights."""
    out: Annotated[Path, tyro.conf.Positional]
    """Folder to write."""
    to: Literal["saekit", "saelens", "sparsify"] = "saekit"
    """Whose format."""
    input_scale: float | None = None
    """What inputs are multiplied with before encoding, if its files need that and do not say it; it is folded in."""
    json: bool = False
    """Print the facts as JSON."""
    config: Path | None = None
    """YAML file with any of these settings; flags win over it."""

    def run(self) -> int:
        from saekit.loading import convert, describe, load

        described = describe(self.sae)
        sae = load(self.sae, input_scale=self.input_scale)
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
