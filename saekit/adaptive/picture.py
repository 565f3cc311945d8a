"""Decisions as a picture: inline SVG and HTML, no script, nothing to fetch; it works in a notebook and in a file."""

import os
from collections.abc import Sequence
from html import escape
from pathlib import Path

from jaxtyping import Bool, Float, Int
from torch import Tensor

from saekit.errors import FileError

_CELL, _ROW = 14, 11
# of the options, in their order; the last of two is the one that stands out
_COLOURS = ("#b8c4d0", "#d1495b", "#edae49", "#00798c", "#6a4c93")
_DEEP, _SHALLOW = (178, 24, 43), (247, 247, 247)


def picture_of(
    *,
    options: Sequence[str],
    decision: Int[Tensor, "steps places"],
    margin: Float[Tensor, "steps places"],
    live: Bool[Tensor, "steps places"],
    texts: Sequence[str] | None,
    grid: tuple[int, int] | None,
    extra: int,
    image: Float[Tensor, "height width"] | None,
    caption: str,
) -> str:
    """One example; a grid becomes a map of depths, anything else a strip of squares per place."""
    if grid is not None:
        body = _depth_map(live.sum(0)[extra:].reshape(grid).tolist(), len(live), image)
        legend = _legend([f"{depth}" for depth in (1, len(live))], [_shade(1, len(live)), _shade(len(live), len(live))])
        caption = f"{caption}; colour: steps that a patch was worked on"
    else:
        body = _strips(options, decision, margin, live, texts)
        legend = _legend(list(options), [_COLOURS[i % len(_COLOURS)] for i in range(len(options))])
    return (
        f'<figure style="margin:0 0 1em;font:12px system-ui,sans-serif">{body}'
        f"<figcaption>{escape(caption)} {legend}</figcaption></figure>"
    )


def write_pictures(path: Path | str, title: str, pictures: Sequence[str]) -> Path:
    """One HTML file of pictures, written whole or not at all.

    Raises:
        FileError: if it cannot be written.
    """
    path = Path(path).resolve()
    beside = path.with_name(f".{path.name}.part")
    html = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<body style="margin:2em;max-width:70em"><h1 style="font:600 20px system-ui">{escape(title)}</h1>'
        f"{''.join(pictures)}</body></html>\n"
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(html, encoding="utf-8", errors="xmlcharrefreplace")
        os.replace(beside, path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise FileError(
            f"cannot write {path}: {error.strerror}; choose a file in a folder that you may write to"
        ) from error
    return path


def _depth_map(depths: list[list[int]], most: int, image: Tensor | None) -> str:
    rows, columns = len(depths), len(depths[0])
    height, width = rows * _CELL, columns * _CELL
    cells = "".join(
        f'<rect x="{x * _CELL}" y="{y * _CELL}" width="{_CELL}" height="{_CELL}" fill="{_shade(depth, most)}">'
        f"<title>row {y}, column {x}: {depth} of {most} steps</title></rect>"
        for y, line in enumerate(depths)
        for x, depth in enumerate(line)
    )
    shown = "" if image is None else _grey(image, width, height)
    return f'{shown}<svg width="{width}" height="{height}" role="img">{cells}</svg>'


def _grey(image: Float[Tensor, "height width"], width: int, height: int) -> str:
    """The picture itself beside the map, one square per pixel."""
    low, high = float(image.min()), float(image.max())
    levels = ((image - low) / max(high - low, 1e-9) * 255).round().long().tolist()
    dx, dy = width / len(levels[0]), height / len(levels)
    cells = "".join(
        f'<rect x="{x * dx:.2f}" y="{y * dy:.2f}" width="{dx:.2f}" height="{dy:.2f}" fill="rgb({v},{v},{v})"/>'
        for y, line in enumerate(levels)
        for x, v in enumerate(line)
    )
    return f'<svg width="{width}" height="{height}" style="margin-right:8px" role="img">{cells}</svg>'


def _strips(options: Sequence[str], decision: Tensor, margin: Tensor, live: Tensor, texts: Sequence[str] | None) -> str:
    """Every place as its text over a column of squares, the first step on top, wrapped like prose."""
    steps, places = decision.shape
    chosen, margins, lives = decision.tolist(), margin.tolist(), live.tolist()
    names, parts = [escape(option) for option in options], []
    for place in range(places):
        squares = "".join(
            f'<rect y="{step * _ROW}" width="10" height="{_ROW - 1}" '
            f'fill="{_COLOURS[chosen[step][place] % len(_COLOURS)] if lives[step][place] else "none"}">'
            f"<title>step {step}: {names[chosen[step][place]]}, margin {margins[step][place]:.2f}</title></rect>"
            for step in range(steps)
        )
        text = f"{place}" if texts is None else _visible(texts[place])
        parts.append(
            '<span style="display:inline-block;text-align:center;margin:0 1px 6px;vertical-align:top">'
            f'<code>{escape(text)}</code><br><svg width="10" height="{steps * _ROW}">{squares}</svg></span>'
        )
        if texts is not None and "\n" in texts[place]:
            parts.append("<br>")
    return f'<div style="line-height:1.1">{"".join(parts)}</div>'


def _visible(text: str) -> str:
    shown = text.replace("\n", "⏎").replace("\t", "→").replace(" ", "·")
    return shown if shown else "∅"


def _legend(names: Sequence[str], colours: Sequence[str]) -> str:
    return " ".join(
        f'<span style="white-space:nowrap"><svg width="10" height="10"><rect width="10" height="10" fill="{colour}"/>'
        f"</svg> {escape(name)}</span>"
        for name, colour in zip(names, colours, strict=True)
    )


def _shade(depth: int, most: int) -> str:
    part = max(depth - 1, 0) / max(most - 1, 1)
    red, green, blue = (round(a + (b - a) * part) for a, b in zip(_SHALLOW, _DEEP, strict=True))
    return f"rgb({red},{green},{blue})"
