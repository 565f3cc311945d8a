"""Plots of the results, one HTML file each: points are runs, so that the spread over seeds is seen."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from plotly import graph_objects
from plotly.subplots import make_subplots

from benchmarks.allocation.results import panel_of

# file name: (column, what it is, logarithmic)
SHOWN = {
    "fvu": ("inference_fvu", "fraction of variance unexplained", True),
    "ce_recovered": ("inference_ce_recovered", "loss recovered against zero", False),
    "dead": ("inference_dead_fraction", "features that never fired", False),
    "surprisal": ("inference_l0_surprisal_corr", "rank correlation of L0 with surprisal", False),
    "recovered": ("truth_recovered", "true features found", False),
    "seconds": ("train_cpu_s_per_mtok", "processor seconds per million tokens, without the model", True),
}


def write_all(rows: Sequence[Mapping[str, str]], folder: Path) -> list[Path]:
    """A plot of each column that any run has, into `folder`; the files written."""
    written = []
    for name, (column, label, logarithmic) in SHOWN.items():
        known = [row for row in rows if row[column]]
        if known:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{name}.html"
            figure = figure_of(known, column, label, logarithmic=logarithmic)
            figure.write_html(path, include_plotlyjs="directory")  # one copy beside them, so that they open offline
            written.append(path)
    return written


def figure_of(rows: Sequence[Mapping[str, str]], column: str, label: str, *, logarithmic: bool) -> graph_objects.Figure:
    """One panel per data set, width, k and length of training; a line per rule. Rings are other learning rates."""
    panels = sorted(set(map(panel_of, rows)))
    rules = list(dict.fromkeys(row["rule"] for row in rows))
    titles = [f"{dataset}, {expansion}x, k={k}, {tokens:,} tokens" for dataset, expansion, k, tokens in panels]
    figure = make_subplots(rows=len(panels), cols=1, subplot_titles=titles, vertical_spacing=0.18 / len(panels))
    for place, panel in enumerate(panels, start=1):
        here = [row for row in rows if panel_of(row) == panel]
        scatter = graph_objects.Scatter(
            x=[float(row[column]) for row in here],
            y=[row["rule"] for row in here],
            text=[f"seed {row['seed']}, learning rate x{row['lr_scale']}" for row in here],
            mode="markers",
            marker={
                "size": 9,
                "opacity": 0.7,
                "symbol": ["circle" if float(row["lr_scale"]) == 1 else "circle-open" for row in here],
            },
            showlegend=False,
        )
        figure.add_trace(scatter, row=place, col=1)
        figure.update_yaxes(categoryorder="array", categoryarray=rules[::-1], row=place, col=1)
        figure.update_xaxes(type="log" if logarithmic else "linear", row=place, col=1)
    height = 100 + len(panels) * (80 + 24 * len(rules))
    return figure.update_layout(height=height, title=label, template="plotly_white")
