"""One self-contained HTML file about an SAE or a crosscoder: its metrics, its curves, a page for each featured feature.

The file asks no server for anything and works from a disk. What it shows travels as JSON inside it, and
its script only ever sets text as text: a token may hold `</script>`, quotes, control characters or half
a character, and none of them can do harm. The layout is in `page/`.
"""

import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from saekit.dashboards.page_data import FeaturePage, Homes, PageData, ShownExample
from saekit.dashboards.plots import svg_density_histogram, svg_l0_histogram, svg_share_histogram, svg_zipf_plot
from saekit.errors import FileError

PAGE_FOLDER = Path(__file__).parent / "page"
# tokens before and after the peak that are shown until the reader asks for all
SNIPPET = (16, 8)
# a feature is not called by a concept that it hardly tells
LOWEST_F1 = 0.1


@dataclass(frozen=True, slots=True)
class Metric:
    """How a metric is shown: where, under which words, and what it means in a line."""

    group: str
    label: str
    tip: str
    percent: bool = False


_CODES, _SHARE, _LOSS = "Reconstruction", "Sparsity", "Effect on the model"
METRICS: dict[str, Metric] = {
    "fvu": Metric(
        _CODES, "FVU", "fraction of variance unexplained: squared error over the activations' variance; 0 is perfect"
    ),
    "explained_variance": Metric(
        _CODES,
        "explained variance",
        "share of the activations' variance that the reconstruction explains; 1 is perfect",
    ),
    "l0": Metric(_SHARE, "L0", "mean number of active features per token, and its 5th and 95th percentile over tokens"),
    "dead_fraction": Metric(
        _SHARE, "dead", "share of the features that never fired on the tokens evaluated", percent=True
    ),
    "underused_fraction": Metric(
        _SHARE,
        "under-used",
        "share of the features that fire less than half as often as the Zipf line expects of their rank",
        percent=True,
    ),
    "own_fraction": Metric(
        _SHARE,
        "own",
        "share of the features that write nearly only here: over nine tenths of their squared decoder norm",
        percent=True,
    ),
    "ce_clean": Metric(_LOSS, "cross-entropy", "the model's own loss in nats per token, nothing changed"),
    "ce_sae": Metric(_LOSS, "… with the SAE", "the loss when the reconstruction takes the place of the activations"),
    "ce_zero": Metric(_LOSS, "… zero-ablated", "the loss when zeros take the place of the activations"),
    "ce_mean": Metric(_LOSS, "… mean-ablated", "the loss when their mean takes the place of the activations"),
    "ce_recovered": Metric(
        _LOSS,
        "recovered, of zero",
        "share of the gap between the clean and the zero-ablated loss that the SAE closes; 1 is perfect",
    ),
    "ce_recovered_mean": Metric(
        _LOSS,
        "recovered, of mean",
        "share of the gap between the clean and the mean-ablated loss that the SAE closes; 1 is perfect",
    ),
    "kl": Metric(
        _LOSS,
        "KL",
        "divergence of the next-token distribution with the SAE from the clean one, in nats per token; 0 is perfect",
    ),
}
# shown beside l0, not on lines of their own
_SPREAD = ("l0_p5", "l0_p95")


def check_writable(path: Path | str) -> None:
    """Find out before minutes of work, not after, that a page cannot be written.

    Raises:
        FileError: if there is no right to write there, or a folder.
    """
    path = Path(path)
    if path.is_dir():
        raise FileError(f"cannot write {path}: it is a folder; choose a file in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise _not_writable(path, error) from error


def _not_writable(path: Path, error: OSError) -> FileError:
    return FileError(f"cannot write {path}: {error.strerror or error}; choose a file in a folder that you may write to")


def write_page(path: Path | str, page: PageData) -> Path:
    """Write the file whole or not at all, and return where it is.

    Raises:
        FileError: if there is no space or no right to write there; what was there before stays.
    """
    return write_text(path, render_page(page))


def write_text(path: Path | str, text: str) -> Path:
    """The same of any text.

    Raises:
        FileError: as for a page.
    """
    path = Path(path)
    beside: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
        beside = Path(name)
        # half a surrogate pair in a name has no UTF-8, but it has a number
        with os.fdopen(handle, "w", encoding="utf-8", errors="xmlcharrefreplace") as file:
            file.write(text)
        beside.chmod(0o644)  # mkstemp makes it private
        beside.replace(path)
    except OSError as error:
        raise _not_writable(path, error) from error
    finally:
        if beside is not None:
            beside.unlink(missing_ok=True)
    return path


def render_page(page: PageData) -> str:
    """The text of the file."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    loader = FileSystemLoader(PAGE_FOLDER, encoding="utf-8")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.get_template("page.html")
    return template.render(
        page=page,
        lowest_f1=LOWEST_F1,
        metrics=_metric_columns(page.metrics),
        by_site=[] if page.homes is None else _site_table(page.homes),
        sites=() if page.homes is None else page.homes.sites,
        captions=_captions(page),
        plots={
            "density": Markup(svg_density_histogram(page.density)),
            "zipf": Markup(svg_zipf_plot(page.density, page.zipf)),
            "l0": Markup(svg_l0_histogram(page.l0_counts)),
            "homes": [] if page.homes is None else list(map(Markup, _home_plots(page.homes, page.density > 0))),
        },
        css=Markup((PAGE_FOLDER / "page.css").read_text(encoding="utf-8")),
        js=Markup((PAGE_FOLDER / "page.js").read_text(encoding="utf-8")),
        json=Markup(json_in_html(_as_json(page))),
    )


def json_in_html(value: Any) -> str:
    """JSON that can stand in a script element: ASCII, and without the signs that end the element."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _as_json(page: PageData) -> dict[str, Any]:
    return {
        "title": page.title,
        "n_features": page.n_features,
        "snippet": SNIPPET,
        "lowest_f1": LOWEST_F1,
        "special": page.special,
        "sites": [] if page.homes is None else list(page.homes.sites),
        "tokens": {str(token): text for token, text in page.token_text.items()},
        "features": [_feature_as_json(feature, page.homes) for feature in page.features],
    }


def _feature_as_json(feature: FeaturePage, homes: Homes | None) -> dict[str, Any]:
    plain = {name: _rounded(value) for name, value in asdict(feature).items() if name != "groups"}
    groups = [
        {"title": group.title, "examples": [_example_as_json(example) for example in group.examples]}
        for group in feature.groups
    ]
    shares = [] if homes is None else _rounded(homes.shares[feature.feature].tolist())
    return {**plain, "groups": groups, "shares": shares}


def _example_as_json(example: ShownExample) -> dict[str, Any]:
    window = example.window
    peak = window.position - window.start
    return {
        "document": window.document,
        "source": example.source,
        "start": window.start,
        "peak": peak,
        "value": _rounded(window.values[peak]),
        "alike": example.alike,
        "tokens": window.tokens,
        "values": {str(place): _rounded(value) for place, value in enumerate(window.values) if value != 0},
    }


def _rounded(value: Any) -> Any:
    """Four digits are more than a reader sees; what JSON cannot say becomes null."""
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _rounded(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(part) for part in value]
    return value


@dataclass(frozen=True, slots=True)
class _Line:
    key: str
    label: str
    tip: str
    value: str
    note: str


def _metric_columns(metrics: Mapping[str, float]) -> list[list[tuple[str, list[_Line]]]]:
    """The metrics as text, by column and group, in the order of `METRICS`; unknown ones in a group of their own."""
    groups: dict[str, list[_Line]] = {}
    known = [key for key in METRICS if key in metrics]
    for key in [*known, *(key for key in metrics if key not in METRICS and key not in _SPREAD)]:
        metric = METRICS.get(key, Metric("Other", key, ""))
        note = ""
        if key == "l0" and all(name in metrics for name in _SPREAD):
            note = "p5 {}, p95 {}".format(*(_number(metrics[name]) for name in _SPREAD))
        line = _Line(key, metric.label, metric.tip, _shown(metric, metrics[key]), note)
        groups.setdefault(metric.group, []).append(line)
    right = {name: lines for name, lines in groups.items() if name == _LOSS}
    left = {name: lines for name, lines in groups.items() if name not in right}
    return [list(column.items()) for column in (left, right) if column]


def _shown(metric: Metric, value: float) -> str:
    return _number(100 * value, 3) + " %" if metric.percent else _number(value)


def _site_table(homes: Homes) -> list[tuple[str, Metric, list[str]]]:
    """A line for each metric that any Site has: its key, what it is, and its value at each."""
    columns = [homes.metrics.get(site, {}) for site in homes.sites]
    return [
        (key, metric, [_shown(metric, column[key]) if key in column else "–" for column in columns])
        for key, metric in METRICS.items()
        if any(key in column for column in columns)
    ]


def _home_plots(homes: Homes, fired: Bool[Tensor, " n_features"]) -> list[str]:
    """One for each Site; of two the last one's, since the other's is its mirror image."""
    first = 1 if len(homes.sites) == 2 else 0
    places = range(first, len(homes.sites))
    return [svg_share_histogram(homes.shares[fired, place], homes.sites[place]) for place in places]


def _number(value: float, digits: int = 4) -> str:
    if not math.isfinite(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 10**digits else f"{value:.{digits}g}"


def _captions(page: PageData) -> dict[str, str]:
    n_dead, n_tokens = int((page.density <= 0).sum()), int(page.l0_counts.sum())
    mean = float((page.l0_counts * torch.arange(len(page.l0_counts))).sum()) / max(n_tokens, 1)
    zipf = "Every feature by how often it fires."
    if page.zipf is not None:
        zipf = f"The dashed line is a Zipf law with exponent {page.zipf.exponent:.2f}, fitted to the middle ranks."
    return {
        "density": f"How often features fire. {n_dead:,} of {page.n_features:,} never did on these tokens.",
        "zipf": zipf,
        "l0": f"{mean:.1f} features are active on a token on average.",
    }
