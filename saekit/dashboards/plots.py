"""The curves of an SAE: density histogram, density-rank (Zipf) plot, L0 histogram; where features of a crosscoder live.

Each comes twice from the same numbers: as a plotly figure for notebooks (`density_histogram`, `zipf_plot`,
`l0_histogram`, `share_histogram`) and as a piece of SVG for the static page (`svg_...`), where plotly.js would
weigh more than everything else together. Colours of the SVG are left to the page's style sheet, by class.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saekit.density import ZipfFit

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

BINS_PER_DECADE = 10
BINS_OF_SHARE = 20
_MOST_BARS = 60
_MOST_POINTS = 160

_WIDTH, _HEIGHT = 440, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 12, 12, 42
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True, slots=True)
class Bars:
    """Counts in the intervals between neighbouring edges."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Curve:
    """Densities by rank (from 1), thinned to evenly spaced points on a logarithmic axis."""

    ranks: tuple[int, ...]
    densities: tuple[float, ...]


def density_bars(density: Float[Tensor, " n_features"]) -> Bars:
    """How many features have each log10 density; features that never fired are left out."""
    alive = density[density > 0].double().log10()
    lowest = min(math.floor(float(alive.min())), -1) if len(alive) else -1
    bins = ((alive - lowest) * BINS_PER_DECADE).long().clamp(max=-lowest * BINS_PER_DECADE - 1)
    counts = torch.bincount(bins, minlength=-lowest * BINS_PER_DECADE)
    edges = [lowest + place / BINS_PER_DECADE for place in range(len(counts) + 1)]
    return Bars(tuple(edges), tuple(counts.tolist()))


def zipf_curve(density: Float[Tensor, " n_features"]) -> Curve:
    """Sorted densities of the features that fired at all."""
    ranked = density[density > 0].double().sort(descending=True).values
    if not len(ranked):
        return Curve((), ())
    ranks = torch.logspace(0, math.log10(len(ranked)), _MOST_POINTS, dtype=torch.float64).round().long().unique()
    return Curve(tuple(ranks.tolist()), tuple(ranked[ranks.clamp(max=len(ranked)) - 1].tolist()))


def l0_bars(l0_counts: Int[Tensor, " sizes"]) -> Bars:
    """How many tokens have each number of active features; neighbours are joined if there are too many."""
    used = l0_counts.nonzero()[:, 0]
    if not len(used):
        return Bars((-0.5, 0.5), (0,))
    # some room on both sides, or a rule that spends the same on every token fills the plot with one bar
    first, last = max(int(used[0]) - 2, 0), int(used[-1]) + 2
    step = math.ceil((last - first + 1) / _MOST_BARS)
    sizes = torch.arange(len(l0_counts))
    counts = torch.zeros(math.ceil((last - first + 1) / step), dtype=torch.int64)
    counts.index_add_(0, (sizes[used] - first) // step, l0_counts[used].cpu())
    edges = [first - 0.5 + place * step for place in range(len(counts) + 1)]
    return Bars(tuple(edges), tuple(counts.tolist()))


def share_bars(share: Float[Tensor, " n_features"]) -> Bars:
    """How many features write each share of themselves at a Site."""
    bins = (share.double() * BINS_OF_SHARE).long().clamp(0, BINS_OF_SHARE - 1)
    counts = torch.bincount(bins, minlength=BINS_OF_SHARE)
    return Bars(tuple(place / BINS_OF_SHARE for place in range(BINS_OF_SHARE + 1)), tuple(counts.tolist()))


def density_histogram(density: Float[Tensor, " n_features"]) -> "Figure":
    """Features by log10 density, as a plotly figure."""
    bars = density_bars(density)
    n_dead = int((density <= 0).sum())
    title = f"Feature density ({n_dead:,} of {len(density):,} never fired)"
    return _bar_figure(bars, title=title, x="log10 density", y="features")


def l0_histogram(l0_counts: Int[Tensor, " sizes"]) -> "Figure":
    """Tokens by their number of active features (`FeatureStatistics.l0_counts`), as a plotly figure."""
    return _bar_figure(l0_bars(l0_counts), title="Active features per token", x="L0", y="tokens")


def share_histogram(share: Float[Tensor, " n_features"], site: str) -> "Figure":
    """Features by how much of themselves they write at a Site (a column of `Crosscoder.shares`), as a plotly figure."""
    return _bar_figure(share_bars(share), title="Where features live", x=f"share at {site}", y="features")


def zipf_plot(density: Float[Tensor, " n_features"], fit: ZipfFit | None = None) -> "Figure":
    """Density against rank on logarithmic axes, with the fitted line, as a plotly figure."""
    from plotly import graph_objects  # a second to import, and only notebooks need it

    curve = zipf_curve(density)
    figure = graph_objects.Figure()
    figure.add_scatter(x=curve.ranks, y=curve.densities, mode="markers", name="features", marker={"size": 5})
    if fit is not None:
        line = _line(curve, fit)
        name = f"Zipf line, exponent {fit.exponent:.2f}"
        figure.add_scatter(x=curve.ranks, y=line, mode="lines", name=name, line={"dash": "dash"})
    figure.update_xaxes(type="log", title="rank")
    figure.update_yaxes(type="log", title="density")
    return figure.update_layout(title="Density by rank", template="plotly_white")


def _bar_figure(bars: Bars, *, title: str, x: str, y: str) -> "Figure":
    from plotly import graph_objects  # as above

    middles = [(low + high) / 2 for low, high in _intervals(bars)]
    width = bars.edges[1] - bars.edges[0]
    figure = graph_objects.Figure(graph_objects.Bar(x=middles, y=bars.counts, width=width))
    return figure.update_layout(title=title, xaxis_title=x, yaxis_title=y, template="plotly_white", bargap=0)


def svg_density_histogram(density: Float[Tensor, " n_features"]) -> str:
    """Features by log10 density, as SVG."""
    bars = density_bars(density)
    low, high = bars.edges[0], bars.edges[-1]
    frame = _Frame(low, high, 0.0, max(*bars.counts, 1) * 1.05)
    hovers = [f"{10**a:.2g} to {10**b:.2g}" for a, b in _intervals(bars)]
    body = _svg_bars(frame, bars, [f"density {h}: {n:,} features" for h, n in zip(hovers, bars.counts, strict=True)])
    ticks = [(float(power), _power(power)) for power in _decades(low, high)]
    return frame.svg(
        body, x_ticks=ticks, y_ticks=_count_ticks(frame.top), x_title="density (share of tokens)", y_title="features"
    )


def svg_zipf_plot(density: Float[Tensor, " n_features"], fit: ZipfFit | None = None) -> str:
    """Density against rank on logarithmic axes, with the fitted line, as SVG."""
    curve = zipf_curve(density)
    if not curve.ranks:
        return _Frame(0.0, 1.0, 0.0, 1.0).svg("", x_ticks=[], y_ticks=[], x_title="rank", y_title="density")
    lowest, highest = math.log10(min(curve.densities)), math.log10(max(curve.densities))
    right = max(math.log10(curve.ranks[-1]), 0.3)
    frame = _Frame(0.0, right * 1.02, math.floor(lowest * 2) / 2, min(math.ceil(highest * 2 + 0.1) / 2, 0.1))
    body = ""
    if fit is not None:
        line = [(math.log10(r), math.log10(max(d, 1e-30))) for r, d in zip(curve.ranks, _line(curve, fit), strict=True)]
        inside = [(x, y) for x, y in line if frame.bottom <= y <= frame.top]
        points = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in inside)
        hover = f"fitted line: density = {fit.scale:.3g} × (rank + {fit.offset:.3g})^−{fit.exponent:.3f}"
        body += f'<polyline class="fit" points="{points}"><title>{hover}</title></polyline>'
    for rank, value in zip(curve.ranks, curve.densities, strict=True):
        x, y = frame.x(math.log10(rank)), frame.y(math.log10(value))
        hover = f"rank {rank:,}: density {value:.3g}"
        body += f'<circle class="point" cx="{x:.1f}" cy="{y:.1f}" r="2.4"><title>{hover}</title></circle>'
    return frame.svg(
        body,
        x_ticks=[(float(power), f"{10**power:,}") for power in _decades(0.0, right)],
        y_ticks=[(float(power), _power(power)) for power in _decades(frame.bottom, frame.top)],
        x_title="rank (densest first)",
        y_title="density",
    )


def svg_l0_histogram(l0_counts: Int[Tensor, " sizes"]) -> str:
    """Tokens by their number of active features, as SVG; the mean is marked."""
    bars = l0_bars(l0_counts)
    frame = _Frame(bars.edges[0], bars.edges[-1], 0.0, max(*bars.counts, 1) * 1.05)
    hovers = []
    for (low, high), count in zip(_intervals(bars), bars.counts, strict=True):
        first, last = math.ceil(low), math.ceil(high) - 1
        hovers.append(f"{first if first == last else f'{first} to {last}'} active: {count:,} tokens")
    body = _svg_bars(frame, bars, hovers)
    n_tokens = int(l0_counts.sum())
    if n_tokens:
        mean = float((l0_counts.cpu() * torch.arange(len(l0_counts))).sum()) / n_tokens
        x = f"{frame.x(mean):.1f}"
        body += f'<line class="mean" x1="{x}" x2="{x}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}">'
        body += f"<title>mean L0 {mean:.2f}</title></line>"
    ticks = [(t, f"{t:,.0f}") for t in _nice_ticks(bars.edges[0], bars.edges[-1], 8) if t == round(t)]
    return frame.svg(
        body, x_ticks=ticks, y_ticks=_count_ticks(frame.top), x_title="active features per token", y_title="tokens"
    )


def svg_share_histogram(share: Float[Tensor, " n_features"], site: str) -> str:
    """Features by how much of themselves they write at a Site, as SVG."""
    bars = share_bars(share)
    frame = _Frame(0.0, 1.04, 0.0, max(*bars.counts, 1) * 1.05)  # room for the last tick's words
    hovers = [
        f"{100 * low:.0f} to {100 * high:.0f} %: {n:,} features"
        for (low, high), n in zip(_intervals(bars), bars.counts, strict=True)
    ]
    ticks = [(tick, f"{100 * tick:.0f} %") for tick in (0.0, 0.25, 0.5, 0.75, 1.0)]
    return frame.svg(
        _svg_bars(frame, bars, hovers),
        x_ticks=ticks,
        y_ticks=_count_ticks(frame.top),
        x_title=f"share at {site}",
        y_title="features",
    )


@dataclass(frozen=True, slots=True)
class _Frame:
    """The window of data that a plot shows, and where its points lie on the paper."""

    left: float
    right: float
    bottom: float
    top: float

    def x(self, value: float) -> float:
        share = (value - self.left) / ((self.right - self.left) or 1.0)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.bottom) / ((self.top - self.bottom) or 1.0)
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    def svg(
        self,
        body: str,
        *,
        x_ticks: Sequence[tuple[float, str]],
        y_ticks: Sequence[tuple[float, str]],
        x_title: str,
        y_title: str,
    ) -> str:
        """The plot: grid, contents, axis, words."""
        base, middle = _HEIGHT - _BOTTOM, (_TOP + _HEIGHT - _BOTTOM) / 2
        label = escape(f"{y_title} by {x_title}")
        parts = [f'<svg class="plot" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">']
        for value, text in y_ticks:
            y = f"{self.y(value):.1f}"
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
            parts.append(f'<text class="y" x="{_LEFT - 7}" y="{y}" dy="0.32em">{escape(text)}</text>')
        for value, text in x_ticks:
            x = f"{self.x(value):.1f}"
            parts.append(f'<line class="tick" x1="{x}" x2="{x}" y1="{base}" y2="{base + 4}"/>')
            parts.append(f'<text class="x" x="{x}" y="{base + 17}">{escape(text)}</text>')
        parts.append(body)
        parts.append(f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{base}" y2="{base}"/>')
        parts.append(f'<text class="x" x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 6}">{escape(x_title)}</text>')
        turn = f'transform="rotate(-90 12 {middle})"'
        parts.append(f'<text class="x" x="12" y="{middle}" {turn}>{escape(y_title)}</text>')
        return "".join([*parts, "</svg>"])


def _svg_bars(frame: _Frame, bars: Bars, hovers: Sequence[str]) -> str:
    parts = []
    for (low, high), count, hover in zip(_intervals(bars), bars.counts, hovers, strict=True):
        if not count:
            continue
        x, width = frame.x(low), frame.x(high) - frame.x(low)
        # a bar of one among thousands must stay visible
        height = max(frame.y(0.0) - frame.y(float(count)), 1.5)
        top = frame.y(0.0) - height
        box = f'x="{x + 0.5:.1f}" width="{max(width - 1, 0.8):.1f}" y="{top:.1f}" height="{height:.1f}"'
        parts.append(f'<rect class="bar" {box}><title>{escape(hover)}</title></rect>')
    return "".join(parts)


def _intervals(bars: Bars) -> list[tuple[float, float]]:
    return list(zip(bars.edges[:-1], bars.edges[1:], strict=True))


def _line(curve: Curve, fit: ZipfFit) -> list[float]:
    expected = fit.expected(curve.ranks[-1]) if curve.ranks else torch.zeros(0)
    return [float(expected[rank - 1]) for rank in curve.ranks]


def _decades(low: float, high: float) -> range:
    return range(math.ceil(low - 1e-9), math.floor(high + 1e-9) + 1)


def _power(power: int) -> str:
    return "1" if power == 0 else "10" + str(power).translate(_SUPERSCRIPTS)


def _count_ticks(top: float) -> list[tuple[float, str]]:
    return [(tick, _short(tick)) for tick in _nice_ticks(0.0, top, 5) if tick == round(tick)]


def _short(count: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if count >= size:
            unit = 1e3 if letter == "k" else size
            return f"{count / unit:g}{letter}"
    return f"{count:,.0f}"


def _nice_ticks(low: float, high: float, at_most: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten inside `[low, high]`."""
    rough = max(high - low, 1e-9) / at_most
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * times for times in (1, 2, 5, 10) if unit * times >= rough)
    return [step * place for place in range(math.ceil(low / step), math.floor(high / step) + 1)]
