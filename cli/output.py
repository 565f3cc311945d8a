"""What commands say: results on stdout, as text or as one JSON object; progress on stderr."""

import dataclasses
import json
import math
import numbers
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tqdm import tqdm

# without a terminal a bar would fill a log file; a line this often says that the run lives
PLAIN_LINE_EVERY_S = 30.0


def write_facts(facts: Mapping[str, Any], *, as_json: bool, text: Callable[[], str]) -> None:
    """Print the facts as one JSON object, or the text that says the same to people."""
    print(json.dumps(plain(facts), indent=2, ensure_ascii=False) if as_json else text())


def warn(message: object) -> None:
    """Print a line on stderr that a result is not quite what was asked for."""
    print(f"Warning: {message}", file=sys.stderr)


def plain(value: Any) -> Any:
    """The value in JSON's own types. NaN and infinity become null: JSON has no word for them."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    return str(value)


def columns(rows: Iterable[tuple[str, str]], *, indent: str = "  ") -> str:
    """Two columns, the first as wide as its longest cell."""
    rows = list(rows)
    width = max((len(left) for left, _ in rows), default=0)
    return "\n".join(f"{indent}{left:<{width}}  {right}".rstrip() for left, right in rows)


class Progress:
    """A bar on stderr while that is a terminal, else a plain line now and then and one at the end.

    A context manager; `to(done, note)` may be called as often as is convenient.
    """

    def __init__(self, label: str, total: int, *, unit: str = "it"):
        self.label, self.total, self.unit = label, total, unit
        self.done, self.note = 0, ""
        self.said_at = time.monotonic()
        self.bar = tqdm(desc=label, total=total, unit=f" {unit}", unit_scale=True, dynamic_ncols=True, disable=None)

    def __enter__(self) -> "Progress":
        return self

    def to(self, done: int, note: str = "") -> None:
        """Say that `done` of the total are done; `note` is a short text such as a loss."""
        if note and note != self.note:
            self.bar.set_postfix_str(note, refresh=False)
        self.bar.update(done - self.done)
        self.done, self.note = done, note or self.note
        if self.bar.disable and time.monotonic() - self.said_at > PLAIN_LINE_EVERY_S:
            self._say()

    def __exit__(self, *exception: object) -> None:
        self.bar.close()
        if self.bar.disable and self.done:
            self._say()

    def _say(self) -> None:
        self.said_at = time.monotonic()
        print(
            f"{self.label}: {self.done:,} of {self.total:,} {self.unit} {self.note}".rstrip(),
            file=sys.stderr,
            flush=True,
        )


class Stages:
    """One `Progress` after the other, a stage each; a context manager."""

    def __init__(self, unit: str):
        self._unit = unit
        self._stage, self._bar = "", None

    def __enter__(self) -> "Stages":
        return self

    def to(self, stage: object, done: int, total: int) -> None:
        """Say how far a stage is; a new one closes the one before."""
        if str(stage) != self._stage:
            self.__exit__()
            self._stage, self._bar = str(stage), Progress(str(stage), total, unit=self._unit).__enter__()
        if self._bar is not None:
            self._bar.to(done)

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.__exit__(*exception)


def read_and_written(site: object, site_out: object | None) -> str:
    """The Site, or the two Sites of a transcoder."""
    return f"{site} -> {site_out}" if site_out else str(site)
