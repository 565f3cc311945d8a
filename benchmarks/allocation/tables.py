"""The results as tables to read: one per data set, width and k, a line per rule, means over seeds with their spread."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean

Rows = Sequence[Mapping[str, str]]
Panel = tuple[str, str, str, str]

# column of the results: (head of the table, factor, decimals)
SHOWN = {
    "inference_fvu": ("FVU", 1, 4),
    "inference_ce_recovered": ("CE recovered", 1, 4),
    "inference_l0": ("L0", 1, 1),
    "inference_l0_p5": ("p5", 1, 0),
    "inference_l0_p95": ("p95", 1, 0),
    "inference_dead_fraction": ("dead %", 100, 2),
    "inference_underused_fraction": ("under-used %", 100, 1),
    "inference_l0_surprisal_corr": ("L0 ~ surprisal", 1, 2),
    "inference_l0_error_corr": ("L0 ~ error", 1, 2),
    "concept_f1_mean": ("concept F1", 1, 3),
    "truth_recovered": ("found", 1, 3),
    "truth_f1": ("F1 of firing", 1, 3),
    "train_cpu_s_per_mtok": ("CPU s / M tokens", 1, 0),
}


def write(rows: Rows, path: Path) -> None:
    """All tables as one Markdown file."""
    path.write_text(
        "\n\n".join(["# Results of the allocation study", INTRODUCTION, overview(rows), *tables(rows)]) + "\n"
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
            cells.setdefault((row["rule"], _panel(row)), []).append(float(row["inference_fvu"]))
    panels = [panel for rule, panel in cells if rule == "topk"]
    lines = [
        "## FVU as a multiple of TopK's, means of seeds (`*`: one seed)",
        "",
        "| rule | " + " | ".join(f"{dataset} {expansion}x k={k}" for dataset, expansion, k, _ in panels) + " |",
        "|---" * (len(panels) + 1) + "|",
    ]
    for rule in dict.fromkeys(rule for rule, _ in cells):
        shown = [_as_multiple(cells.get((rule, panel)), cells["topk", panel]) for panel in panels]
        lines.append(f"| {rule} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _panel(row: Mapping[str, str]) -> Panel:
    """What rows share that are compared: data set, width, k and length of training."""
    return row["dataset"], row["expansion"], row["k"], row["tokens"]


def _as_multiple(values: Sequence[float] | None, base: Sequence[float]) -> str:
    if not values:
        return ""
    star = "*" if len(values) == 1 else ""
    return f"{fmean(values) / fmean(base):.2f}{star}"


def tables(rows: Rows) -> Iterator[str]:
    """A heading and a table for each panel, in the order of the results."""
    for panel in dict.fromkeys(map(_panel, rows)):
        here = [row for row in rows if _panel(row) == panel]
        dataset, expansion, k, tokens = panel
        heading = (
            f"## {dataset}, {int(here[0]['n_features']):,} features ({expansion}x), k = {k}, {int(tokens):,} tokens"
        )
        yield f"{heading}\n\n{table(here)}"


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
