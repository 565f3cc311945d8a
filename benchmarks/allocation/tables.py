"""The results as tables to read: one per data set, width and k, a line per rule, means over seeds with their spread."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.allocation.results import Panel, panel_of

Rows = Sequence[Mapping[str, str]]

# column of the results: (head of the table, factor, decimals)
SHOWN = {
    "inference_fvu": ("FVU", 1, 4),
    "batch_mode_fvu": ("FVU in batch mode", 1, 4),
    "inference_ce_recovered": ("CE recovered", 1, 4),
    "inference_l0": ("L0", 1, 1),
    "inference_l0_p5": ("p5", 1, 0),
    "inference_l0_p95": ("p95", 1, 0),
    "inference_dead_fraction": ("dead %", 100, 2),
    "inference_underused_fraction": ("under-used %", 100, 1),
    "inference_zipf_exponent": ("Zipf exponent", 1, 2),
    "inference_l0_surprisal_corr": ("L0 ~ surprisal", 1, 2),
    "inference_l0_loss_corr": ("L0 ~ loss", 1, 2),
    "inference_l0_error_corr": ("L0 ~ error", 1, 2),
    "concept_f1_mean": ("concept F1", 1, 3),
    "truth_recovered": ("found", 1, 3),
    "truth_f1": ("F1 of firing", 1, 3),
    "train_cpu_s_per_mtok": ("CPU s / M tokens", 1, 0),
    "peak_mb": ("peak MB", 1, 0),
}


def write(rows: Rows, path: Path) -> None:
    """All tables as one Markdown file."""
    path.write_text(
        "\n\n".join(["# Results of the allocation study", INTRODUCTION, overview(rows), *rates(rows), *tables(rows)])
        + "\n"
    )


INTRODUCTION = (
    "Written by `python -m benchmarks.allocation.study` from the CSV of the same name; README.md beside it explains "
    "columns and rules. Means over seeds, smallest to largest in brackets where there are several. SAEs as they serve "
    "single tokens (calibrated where the rule looks across tokens). `x0.5` behind a rule is another learning rate."
)


def overview(rows: Rows) -> str:
    """One table of everything: a column per data set, width and k, a line per rule, FVU in multiples of TopK's."""
    cells: dict[tuple[str, Panel], list[float]] = {}
    for row in rows:
        if float(row["lr_scale"]) == 1:
            cells.setdefault((row["rule"], panel_of(row)), []).append(float(row["inference_fvu"]))
    panels = [panel for rule, panel in cells if rule == "topk"]
    several = len({tokens for *_, tokens in panels}) > 1
    heads = [f"{data} {wide}x k={k}" + f" {tokens:,} tokens" * several for data, wide, k, tokens in panels]
    lines = [
        "## FVU as a multiple of TopK's, means of seeds (`*`: one seed)",
        "",
        "| rule | " + " | ".join(heads) + " |",
        "|---" * (len(panels) + 1) + "|",
    ]
    for rule in dict.fromkeys(rule for rule, _ in cells):
        shown = [_as_multiple(cells.get((rule, panel)), cells["topk", panel]) for panel in panels]
        lines.append(f"| {rule} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def rates(rows: Rows) -> Iterator[str]:
    """For each panel with several learning rates a table of them."""
    for panel in dict.fromkeys(panel_of(row) for row in rows if float(row["lr_scale"]) != 1):
        here = [row for row in rows if panel_of(row) == panel]
        scales = sorted({row["lr_scale"] for row in here}, key=float)
        yield "\n".join(
            [
                f"## Learning rates: {_heading(here[0])}",
                "",
                "FVU and share of dead features, means of seeds that all rates of a rule have; lowest FVU bold.",
                "",
                "| rule | seeds | " + " | ".join(f"x{scale}" for scale in scales) + " |",
                "|---" * (len(scales) + 2) + "|",
                *filter(None, (_line_of_rates(here, rule, scales) for rule in dict.fromkeys(r["rule"] for r in here))),
            ]
        )


def _line_of_rates(rows: Rows, rule: str, scales: Sequence[str]) -> str | None:
    """None where there is nothing to compare."""
    fvu: dict[str, dict[str, float]] = {}
    dead: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["rule"] == rule:
            fvu.setdefault(row["lr_scale"], {})[row["seed"]] = float(row["inference_fvu"])
            dead.setdefault(row["lr_scale"], {})[row["seed"]] = float(row["inference_dead_fraction"])
    seeds = set.intersection(*map(set, fvu.values()))
    if len(fvu) < 2 or not seeds:
        return None
    mean = {scale: fmean(by_seed[seed] for seed in seeds) for scale, by_seed in fvu.items()}
    best = min(mean, key=lambda scale: mean[scale])
    cells = []
    for scale in scales:
        number = "" if scale not in mean else f"{mean[scale]:.4f}"
        share = "" if scale not in mean else f", {fmean(dead[scale][seed] for seed in seeds):.1%}"
        cells.append(f"**{number}**{share}" if scale == best else f"{number}{share}")
    return f"| {rule} | {len(seeds)} | " + " | ".join(cells) + " |"


def _as_multiple(values: Sequence[float] | None, base: Sequence[float]) -> str:
    if not values:
        return ""
    star = "*" if len(values) == 1 else ""
    return f"{fmean(values) / fmean(base):.2f}{star}"


def tables(rows: Rows) -> Iterator[str]:
    """A heading and a table for each panel, in the order of the results."""
    for panel in dict.fromkeys(map(panel_of, rows)):
        here = [row for row in rows if panel_of(row) == panel]
        yield f"## {_heading(here[0])}\n\n{table(here)}"


def _heading(row: Mapping[str, str]) -> str:
    features, tokens = int(row["n_features"]), int(row["tokens"])
    return f"{row['dataset']}, {features:,} features ({row['expansion']}x), k = {row['k']}, {tokens:,} tokens"


def table(rows: Rows) -> str:
    """One line per rule and learning rate; columns that no run has are left out."""
    columns = [name for name in SHOWN if any(row[name] for row in rows)]
    lines = ["| rule | seeds | " + " | ".join(SHOWN[name][0] for name in columns) + " |"]
    lines.append("|---" * (len(columns) + 2) + "|")
    for rule, lr_scale in dict.fromkeys((row["rule"], row["lr_scale"]) for row in rows):
        same = [row for row in rows if (row["rule"], row["lr_scale"]) == (rule, lr_scale)]
        name = rule if float(lr_scale) == 1 else f"{rule} x{lr_scale}"
        cells = [over_seeds([float(row[c]) for row in same if row[c]], *SHOWN[c][1:]) for c in columns]
        lines.append(f"| {name} | {len(same)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def over_seeds(values: Sequence[float], factor: float, decimals: int) -> str:
    """The mean, with the range where it is one; empty for no values."""
    if not values:
        return ""
    shown = [f"{value * factor:.{decimals}f}" for value in (sum(values) / len(values), min(values), max(values))]
    mean, low, high = shown
    return mean if low == high else f"{mean} ({low} to {high})"


def beside_each_other(columns: Mapping[str, Sequence[Mapping[str, float]]], decimals: int) -> list[str]:
    """A Markdown table of named numbers, a column per key, each with its numbers by seed."""
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in next(iter(columns.values()))[0]:
        cells = [over_seeds([numbers[name] for numbers in seeds], 1, decimals) for seeds in columns.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines
