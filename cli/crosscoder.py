"""`saekit train --crosscoder`, and `saekit eval` of what it writes: one dictionary over several Sites."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .evaluate import SHOWN, metric_rows, with_bar
from .output import columns, write_facts
from .recipe import described, train_configs
from .speed import speed_line, with_progress
from .training_data import harvest_of, read_corpus, recorded

if TYPE_CHECKING:
    from saekit.activations.corpus import Corpus
    from saekit.activations.harvest import Harvest
    from saekit.activations.mask import MaskPolicy
    from saekit.activations.tokens import TokenRows
    from saekit.crosscoder import Crosscoder
    from saekit.targets import Site, Target
    from saekit.training.config import TrainConfig
    from saekit.training.saved_run import RunFile

    from .train import Train

WHOLE = "crosscoder"
OWN = "own_fraction"
ABOUT_CODES = ("l0", "dead_fraction", "underused_fraction")


def run_joint(command: "Train", target: "Target", run_file: "RunFile | None") -> int:
    """`saekit train` with --crosscoder."""
    from saekit.errors import SaekitError
    from saekit.training.crosscoder import Joined

    from .estimate import estimate
    from .opened import load_crosscoder

    if len(command.start) > 1:
        raise SaekitError(f"{len(command.start)} folders to start from, and a crosscoder is one; give its folder alone")
    start = load_crosscoder(command.start[0], command.device) if command.start else None
    config, sites = joint_config(command, target, start)
    corpus = read_corpus(command, target)
    source = harvest_of(command, target, corpus, sites)
    if run_file is None:
        whole = Joined(source, config.site, dict.fromkeys(sites, 1.0))
        facts = estimate([config], source, command.device, starts=[] if start is None else [start.sae], whole=whole)
        write_facts(facts, as_json=command.json, text=lambda: columns((k, str(v)) for k, v in facts.items()))
        return 0
    facts = train_and_evaluate_joint(command, target, corpus, config, source, start=start, run_file=run_file)
    write_facts(facts, as_json=command.json, text=lambda: joint_text(facts))
    return 0


def joint_config(command: "Train", target: "Target", start: "Crosscoder | None") -> tuple["TrainConfig", list["Site"]]:
    """The recipe of the whole, and its Sites.

    Raises:
        SaekitError: fewer than two Sites, or a flag that says nothing about a crosscoder.
    """
    from saekit.errors import SaekitError
    from saekit.targets import Site

    named = command.site or (tuple(map(str, start.sites)) if start is not None else ())
    if len(named) < 2:
        given = f"only {named[0]}" if named else "none"
        raise SaekitError(f"--crosscoder joins two or more Sites, and --site names {given}; name them all")
    for flag, given in (("--site-out", command.site_out), ("--skip", command.skip)):
        if given:
            raise SaekitError(f"{flag} is about transcoders, which write another Site; leave it or --crosscoder away")
    if command.equal_norms:
        raise SaekitError("a crosscoder scales each Site as a whole; leave --equal-norms or --crosscoder away")
    features = start.sae.n_features if command.features is None and start is not None else command.features
    configs = train_configs(replace(command, site=named, features=features), target)
    return replace(configs[0], site=Site.parse(WHOLE)), [config.site for config in configs]


def train_and_evaluate_joint(
    command: "Train",
    target: "Target",
    corpus: "Corpus",
    config: "TrainConfig",
    source: "Harvest",
    *,
    start: "Crosscoder | None",
    run_file: "RunFile",
) -> dict[str, Any]:
    """Train a crosscoder of the source's Sites, save it, evaluate it on the held-out rows."""
    from saekit.checkpoint import check_writable
    from saekit.errors import SaekitError
    from saekit.sae_config import with_metadata
    from saekit.training.crosscoder import train_crosscoder

    check_writable(command.out)
    crosscoder, speed = with_progress(
        config,
        lambda on_step: train_crosscoder(
            config,
            source,
            source.sites,
            start=start,
            model_name=command.model,
            context_size=corpus.train.context,
            device=command.device,
            run_file=run_file,
            on_step=on_step,
        ),
    )
    crosscoder.sae.cfg = with_metadata(crosscoder.sae.cfg, **recorded(command, corpus, source))
    crosscoder.save(command.out)
    run_file.path.unlink(missing_ok=True)
    try:
        metrics = evaluate_joint(crosscoder, target, corpus.held_out, source.mask)
    except SaekitError as error:
        raise SaekitError(f"the crosscoder is saved in {command.out}, but cannot be evaluated: {error}") from error
    crosscoder.sae.cfg = with_metadata(crosscoder.sae.cfg, evaluation=metrics)
    crosscoder.save(command.out)
    return facts_of(command.out, crosscoder.sites, metrics) | {"rule": described(config)} | speed


def evaluate_joint(crosscoder: "Crosscoder", target: "Target", rows: "TokenRows", mask: "MaskPolicy") -> dict[str, Any]:
    """Its metrics, with a bar on stderr."""
    from saekit.analysis.evaluate_crosscoder import evaluate_crosscoder

    evaluation = partial(evaluate_crosscoder, crosscoder, target, rows, mask=mask)
    return with_bar(len(rows), len(crosscoder.sites), evaluation).metrics()


def facts_of(folder: Path, sites: Sequence["Site"], metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What the commands print as JSON; None for each number that people look at and that there is none of."""
    missing = dict.fromkeys(name for name in SHOWN if name not in ABOUT_CODES)
    by_site = {site: {**missing, **numbers} for site, numbers in metrics["by_site"].items()}
    return {"crosscoder": str(folder), "sites": list(map(str, sites)), **metrics, "by_site": by_site}


def joint_lines(facts: Mapping[str, Any]) -> str:
    """The facts for people: what is shared, then a block per Site."""
    blocks = [columns(metric_rows({name: facts[name] for name in (*ABOUT_CODES, "l0_p5", "l0_p95")}))]
    for site, numbers in facts["by_site"].items():
        own = (OWN, f"{numbers[OWN]:<18.4f}features that write nearly only here")
        predicted = f"over {facts['tokens']:,} activations, {numbers['predicted']:,} predictions"
        blocks.append(f"{site}\n{columns([*metric_rows(numbers), own])}\n  {predicted}")
    return "\n".join(blocks)


def joint_text(facts: Mapping[str, Any]) -> str:
    """What `saekit train` says of it."""
    head = f"{facts['crosscoder']}  ({facts['rule']}, one dictionary over {len(facts['sites'])} Sites)"
    return "\n".join([head, joint_lines(facts), speed_line(facts)])
