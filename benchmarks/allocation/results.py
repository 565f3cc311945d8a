"""The table of results: a CSV with one row per finished run, rewritten as a whole and never half written."""

import csv
import fcntl
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path

from benchmarks.allocation.runs import Run
from saekit.errors import FileError

Panel = tuple[str, int, int, int]
"""Data set, width, k and length of training."""
KEY = (*(field.name for field in fields(Run)), "fingerprint")
_MODE = (
    "tokens", "predicted", "fvu", "explained_variance", "l0", "l0_p5", "l0_p95", "dead_fraction", "underused_fraction",
    "ce_clean", "ce_sae", "ce_zero", "ce_mean", "ce_recovered", "ce_recovered_mean", "kl", "zipf_exponent",
    "zipf_offset", "l0_error_corr", "l0_loss_corr", "l0_surprisal_corr", "l0_true_l0_corr",
)  # fmt: skip
_TRUTH = (
    "n_tokens", "live", "mean_max_cosine", "learned_max_cosine", "matched_cosine", "recovered", "precision", "recall",
    "f1", "split", "absorbed", "recovered_band_1", "recovered_band_2", "recovered_band_3", "recovered_band_4",
)  # fmt: skip
COLUMNS = (
    *KEY, "d_model", "n_features", "batch_tokens", "learning_rate",
    *(f"batch_mode_{name}" for name in _MODE), *(f"inference_{name}" for name in _MODE),
    "concepts", "concept_f1_mean", "concepts_told", *(f"truth_{name}" for name in _TRUTH),
    "train_cpu_s_per_mtok", "source_cpu_s_per_mtok", "start_mb", "peak_mb",
    "saekit", "commit", "torch", "python", "machine", "threads", "finished",
)  # fmt: skip


def panel_of(row: Mapping[str, str]) -> Panel:
    """What rows share that are compared in one table or plot."""
    return row["dataset"], int(row["expansion"]), int(row["k"]), int(row["tokens"])


def key_of(run: Run, fingerprint: str) -> tuple[str, ...]:
    """What makes a row the row of this run, as the CSV spells it."""
    return tuple(_cell(value) for value in (asdict(run) | {"fingerprint": fingerprint}).values())


def read(path: Path) -> list[dict[str, str]]:
    """All rows; none if there is no file yet.

    Raises:
        FileError: if the file has other columns than this version of the study.
    """
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            odd = sorted(set(reader.fieldnames or ()) ^ set(COLUMNS))
            raise FileError(
                f"{path} has other columns than this study writes ({', '.join(odd[:4]) or 'another order'}); "
                "rename it, and the study begins a new one"
            )
        return list(reader)


def current(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """The rows of each data set's newest model or truth: those of an older one are another table."""
    newest = {row["dataset"]: row["fingerprint"] for row in sorted(rows, key=lambda row: row["finished"])}
    return [row for row in rows if row["fingerprint"] == newest[row["dataset"]]]


def done(path: Path) -> set[tuple[str, ...]]:
    """Keys of the runs that need not be run again."""
    return {tuple(row[name] for name in KEY) for row in read(path)}


def append(path: Path, row: Mapping[str, object]) -> None:
    """Add a row, unless its run has one. Columns that do not apply to a run stay empty.

    Of two studies that write at once, one waits.

    Raises:
        FileError: for a column that the table does not have, so that no number is lost.
    """
    unknown = sorted(set(row) - set(COLUMNS))
    if unknown:
        raise FileError(f"{path} has no column for {', '.join(unknown)}; add it to COLUMNS and rename the old file")
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".new")
    with _alone_in(path.parent):
        if tuple(_cell(row.get(name)) for name in KEY) in done(path):  # another study was as fast
            return
        rows = [*read(path), {name: _cell(row.get(name)) for name in COLUMNS}]
        with beside.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(beside, path)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """No other study writes in this folder meanwhile."""
    opened = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)


def _cell(value: object) -> str:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)
