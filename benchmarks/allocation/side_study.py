"""What the small studies beside the big one share: their flags, and how they end."""

import argparse
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks.allocation import study
from benchmarks.allocation.grids import FULL_TOKENS
from saekit.errors import SaekitError

Columns = Mapping[str, list[dict[str, float]]]
"""Named numbers of each seed, by the head of their column."""


def run(
    doc: str | None,
    name: str,
    measure: Callable[[argparse.Namespace], Columns],
    page: Callable[[Columns, argparse.Namespace], str],
) -> int:
    """Read the flags, measure, write the page and show it.

    Args:
        name: of the page, unless `--out` says another.
    """
    parser = argparse.ArgumentParser(description=str(doc).splitlines()[0])
    parser.add_argument("--datasets", nargs="+", choices=("stories260K", "pystd"), default=("stories260K", "pystd"))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=FULL_TOKENS)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--shared", type=Path, default=study.SHARED)
    parser.add_argument("--out", type=Path, default=study.HERE / name)
    options = parser.parse_args()
    try:
        columns = measure(options)
    except SaekitError as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    options.out.write_text(page(columns, options), encoding="utf-8")
    print(options.out.read_text(encoding="utf-8"))
    return 0


def command(name: str, options: argparse.Namespace) -> str:
    """What writes the same page again, the seeds, tokens and k that it names left out."""
    return f"python -m benchmarks.allocation.{name} --datasets {' '.join(options.datasets)}"
