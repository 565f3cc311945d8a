"""`saekit pretrain`: make the bundled language model again, or a sibling of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from .output import Progress, columns, write_facts


@dataclass(frozen=True, kw_only=True, slots=True)
class Pretrain:
    """Train a small language model on the source of Python's standard library.

    This is how the bundled model was made, with --compile. The result is a Hugging Face folder. A run that was
    interrupted goes on with --resume; --tokens may be changed then, as long as the learning rate has
    not begun to fall.

    Example:
      saekit pretrain my-model --tokens 24000000
      saekit pretrain my-model --tokens 24000000 --resume
    """

    out: Annotated[Path, tyro.conf.Positional]
    """Folder to write."""
    tokens: int = 24_000_000
    """Length of training."""
    seed: int = 0
    resume: bool = False
    """Go on from where an earlier run in the same folder stopped."""
    compile: bool = False
    """Use torch.compile: faster, needs a C++ compiler, other last bits."""
    save_every: int = 200
    """Steps between saved states and held-out measurements."""
    json: bool = False
    """Print the facts as JSON."""
    config: Path | None = None
    """YAML file with any of these settings; flags win over it."""

    def run(self) -> int:
        from saekit.training.pretrain import PretrainConfig, pretrain

        config = PretrainConfig(tokens=self.tokens, seed=self.seed)
        facts: dict[str, Any] = {"model": str(self.out)}
        with Progress("pretraining", config.steps * config.batch_tokens, unit="tok") as progress:

            def follow(report: dict[str, Any]) -> None:
                facts.update(report)
                note = f"loss {report['loss']:.3f}" + (
                    f", held out {report['held_out']:.3f}" if "held_out" in report else ""
                )
                progress.to(report["tokens"], note)

            pretrain(
                config,
                self.out,
                resume=self.resume,
                compile_model=self.compile,
                save_every=self.save_every,
                on_report=follow,
            )
        write_facts(facts, as_json=self.json, text=lambda: columns((name, str(value)) for name, value in facts.items()))
        return 0
