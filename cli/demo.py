"""`saekit demo`: everything once, on what is bundled."""

import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .evaluate import metric_lines
from .export import export_page
from .output import write_facts
from .recipe import train_configs
from .speed import speed_line
from .train import Train, train_and_evaluate
from .training_data import harvest_of, read_corpus, sites_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Demo:
    """Train an SAE on the bundled model, evaluate it, and write a page about its features.

    Needs no network and no arguments. What it does is `saekit train` and `saekit export` one after
    the other; it prints both commands.

    Example:
      saekit demo
      saekit demo --rule mutual --out saekit-demo-mutual
    """

    out: Path = Path("saekit-demo")
    """Folder for the SAE and the page."""
    rule: Literal["topk", "feature", "mutual"] = "topk"
    """As in `saekit train`."""
    tokens: int = 1_024_000
    """Length of training."""
    seed: int = 0
    json: bool = False
    """Print the facts as JSON."""

    def run(self) -> int:
        from saekit.sae import SAE
        from saekit.targets import Target

        from .opened import OpenedSAE

        began = time.perf_counter()
        command = Train(rule=self.rule, tokens=self.tokens, seed=self.seed, out=self.out / "sae")
        target = Target.load(command.model)
        configs = train_configs(command, target)
        corpus = read_corpus(command, target)
        source = harvest_of(command, target, corpus, sites_of(configs))
        (facts,) = train_and_evaluate(command, target, corpus, configs, source)
        opened = OpenedSAE(SAE.load(command.out), target, configs[0].site, source.mask, command.text, corpus)
        page = self.out / "features.html"
        facts |= export_page(opened, command.out, page, n_features=60, n_tokens=300_000)
        facts["seconds"] = round(time.perf_counter() - began, 1)
        facts["train_command"] = (
            f"saekit train --rule {self.rule} --tokens {self.tokens} --seed {self.seed} "
            f"--out {shlex.quote(str(command.out))}"
        )
        facts["export_command"] = f"saekit export {shlex.quote(str(command.out))} --out {shlex.quote(str(page))}"
        write_facts(facts, as_json=self.json, text=lambda: as_text(facts))
        return 0


def as_text(facts: dict[str, Any]) -> str:
    """What happened, what came out, and how to get it again."""
    return (
        f"{facts['rule']} at {facts['site']}, {facts['seconds']:.0f} s\n{metric_lines(facts)}\n{speed_line(facts)}\n\n"
        f"SAE in   {facts['sae']}\n"
        f"page in  {facts['page']}  ({facts['features_shown']} features; open it in a browser)\n\n"
        f"The same again:\n  {facts['train_command']}\n  {facts['export_command']}"
    )
