"""Every adaptive model from several seeds: what each reports, as mean and spread, and pictures of decisions.

    python -m benchmarks.adaptive.study [--out FOLDER] [--seeds 0 1 2] [--kinds a-vit duo-llm ...] [--arms plain ...]

A model that is in the folder is not trained again, and one that was interrupted goes on. `--arms` names some of what
the models are held against (`arms.py`); all, if it is not given. `--no-questions` leaves out what is asked of their
features. README.md beside this file says what the numbers mean.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.adaptive.arms import ARMS
from benchmarks.gate import note, tests_pass
from saekit.adaptive.kinds import KINDS, train_kind
from saekit.adaptive.picture import write_pictures
from saekit.adaptive.questions.answers import Answers
from saekit.adaptive.saved import load_adaptive
from saekit.adaptive.stages import STATE_FILE, train_stages

SHOWN = 4
# what the numbers rest on; nothing is trained while one of these is red
TESTS = ("adaptive_*", "training", "losses", "selection")


def trained(kind: str, seed: int, out: Path, *, rows: int) -> Mapping[str, Any]:
    """The facts of one model, which is trained if it is not there yet, and of text measured on so many rows."""
    folder = out / f"{kind}-{seed}"
    if not folder.is_dir():
        note(f"{kind}, seed {seed}")
        unfinished = (out / f"{kind}-{seed}.training" / STATE_FILE).exists()
        train_kind(kind, folder, seed=seed, rows=rows, resume=unfinished)
    saved = load_adaptive(folder, kind=kind)
    return saved.facts if saved.facts.get("rows", rows) == rows else KINDS[kind].measure(saved, rows)


def arm_numbers(kind: str, name: str, seed: int, out: Path, *, rows: int) -> Mapping[str, float]:
    """The numbers of one arm, which is trained if it is not there yet with so many rows of text to measure it on."""
    kept = out / f"{kind}-{name}-{seed}{f'-{rows}' if kind == 'duo-llm' else ''}.json"
    if not kept.exists():
        note(f"{kind}, held against {name}, seed {seed}")
        arm, beside = ARMS[kind][name], out / f"{kind}-{name}-{seed}.training"
        recipe = arm.recipe(seed)
        weights = train_stages(recipe, beside, resume=(beside / STATE_FILE).exists())
        partial = kept.with_suffix(".partial")
        partial.write_text(json.dumps(arm.measure(recipe, weights, rows)))
        partial.rename(kept)
        (beside / STATE_FILE).unlink(missing_ok=True)
    return json.loads(kept.read_text())


def answers(kind: str, seed: int, out: Path) -> Answers:
    """What is asked of the features of one model, which is there."""
    kept = out / f"{kind}-questions-{seed}.json"
    if not kept.exists():
        note(f"{kind}, seed {seed}: questions")
        partial = kept.with_suffix(".partial")
        asked = KINDS[kind].ask(load_adaptive(out / f"{kind}-{seed}", kind=kind))
        # what has no number for this seed (no pair to compare, say) is left to the others
        finite = {q: {name: x for name, x in found.items() if math.isfinite(x)} for q, found in asked.items()}
        partial.write_text(json.dumps(finite))
        partial.rename(kept)
    return json.loads(kept.read_text())


def numbers_of(facts: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Every number among the facts, with a name that says where it stands."""
    found: dict[str, float] = {}
    for name, value in facts.items():
        if isinstance(value, Mapping):
            found |= numbers_of(value, f"{prefix}{name}.")
        elif name == "budgets":
            for row in value:
                found |= numbers_of({k: v for k, v in row.items() if k != "budget"}, f"budget {row['budget']}.")
        elif isinstance(value, list):
            found |= numbers_of({str(number): one for number, one in enumerate(value)}, f"{prefix}{name}.")
        elif isinstance(value, int | float):
            found[f"{prefix}{name}"] = value
    return found


def table(by_seed: Sequence[Mapping[str, float]]) -> list[str]:
    """One line per number: the mean and the smallest and largest over the seeds that have it."""
    lines = ["| number | mean | least | most |", "|---|---|---|---|"]
    for name in dict.fromkeys(name for facts in by_seed for name in facts):
        values = [facts[name] for facts in by_seed if name in facts]
        lines.append(f"| {name} | {statistics.fmean(values):.3f} | {min(values):.3f} | {max(values):.3f} |")
    return lines


def study(
    kinds: Sequence[str],
    seeds: Sequence[int],
    out: Path,
    *,
    rows: int,
    arms: Sequence[str] | None = None,
    questions: bool = True,
) -> Path:
    """Train what is missing, and write `results.md` and a page of pictures per kind."""
    lines = [f"Seeds {', '.join(map(str, seeds))}."]
    for kind in kinds:
        facts = [numbers_of(trained(kind, seed, out, rows=rows)) for seed in seeds]
        lines += ["", f"## {kind}", "", *table(facts)]
        for name, arm in ARMS[kind].items():
            if arms is not None and name not in arms:
                continue
            if arm.needs and not arm.needs.exists():
                note(f"{kind} without {name}: there is no {arm.needs}")
            else:
                lines += ["", f"### {kind}, held against {name}", ""]
                lines += table([arm_numbers(kind, name, seed, out, rows=rows) for seed in seeds])
        asked = [answers(kind, seed, out) for seed in seeds] if questions else [{}]
        for question in dict.fromkeys(question for of_seed in asked for question in of_seed):
            lines += ["", f"### {kind}: {question}", "", *table([of_seed.get(question, {}) for of_seed in asked])]
        saved = load_adaptive(out / f"{kind}-{seeds[0]}")
        trace = KINDS[kind].target(saved).trace(KINDS[kind].inputs(saved)[1][:SHOWN])
        write_pictures(out / f"{kind}.html", kind, [trace.picture(number) for number in range(len(trace))])
    results = out / "results.md"
    results.write_text("\n".join(lines) + "\n")
    return results


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("adaptive-study"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--rows", type=int, default=64, help="rows of held-out text for duo-llm")
    names = sorted({name for of_kind in ARMS.values() for name in of_kind})
    parser.add_argument("--arms", nargs="*", choices=names, help="some of what they are held against; none: no names")
    parser.add_argument("--questions", action=argparse.BooleanOptionalAction, default=True, help="of their features")
    options = parser.parse_args(argv)
    if not tests_pass(TESTS):
        sys.exit(1)
    options.out.mkdir(parents=True, exist_ok=True)
    chosen = {"rows": options.rows, "arms": options.arms, "questions": options.questions}
    print(study(options.kinds, options.seeds, options.out, **chosen).read_text())


if __name__ == "__main__":
    main()
