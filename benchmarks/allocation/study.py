"""The allocation study: which rule spends a budget of matches best, under which conditions.

    python -m benchmarks.allocation.study [--quick] [--datasets ...] [--rules ...] [--list]

README.md beside this file explains every column. A run whose row exists is skipped, so the study can be
stopped at any time and started again.
"""

import argparse
import multiprocessing
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from pathlib import Path

from benchmarks.allocation import datasets, grids, measure, plots, results, runs, tables
from benchmarks.gate import REPOSITORY, note, tests_pass
from saekit.errors import SaekitError
from saekit.training.stop import StopRequested, StopSignals

HERE = Path(__file__).parent
SHARED = REPOSITORY.parent / "shared" / "data"
PEER_PYTHON = REPOSITORY / ".venv-interop" / "bin" / "python"
# what the numbers rest on; the study refuses to run while one of these is red
TESTS = (
    "selection", "kernels", "sae", "losses", "density", "objectives", "training", "phases", "calibrate", "evaluate",
    "concepts", "synthetic", "recovery", "allocation_study",
)  # fmt: skip


def main() -> int:
    options = parse()
    out = options.out or HERE / ("quick.csv" if options.quick else "results.csv")
    wanted = list(grids.quick()) if options.quick else list(listed(options))
    try:
        pending = list(to_do(wanted, results.done(out), options))
        note(f"{len(pending)} of {len(wanted)} runs to do, results in {out}")
        if options.list:
            print("\n".join(map(str, pending)))
            return 0
        if pending and not tests_pass(TESTS):
            return 1
        with StopSignals(), tempfile.TemporaryDirectory(prefix="activations-") as folder:
            failed = sum(
                not finish(run, number, len(pending), out, options, Path(folder))
                for number, run in enumerate(pending, 1)
            )
        rows = results.current(results.read(out))
        plots.write_all(rows, out.with_suffix(""))
        tables.write(rows, out.with_suffix(".md"))
    except SaekitError as error:
        note(f"Error: {error}")
        return 1
    except StopRequested as stop:
        note(f"stopped; what was finished is in {out}, and the same command goes on from there")
        return 128 + stop.signal
    if failed:
        note(f"{failed} runs failed and have no row; they are tried again next time")
    return 1 if failed else 0


def finish(run: runs.Run, number: int, of: int, out: Path, options: argparse.Namespace, recordings: Path) -> bool:
    """Do a run and add its row. One that diverges or is killed must not stop hours of others; it is False."""
    note(f"[{number}/{of}] {run}")
    try:
        row = in_own_process(run, options.shared, options.peer_python, recordings)
    except SaekitError as error:
        note(f"failed: {error}")
        return False
    except BrokenProcessPool:
        note("failed: its process was killed; was there too little memory?")
        return False
    results.append(out, row)
    return True


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="ten minutes, to see that all works")
    grid = parser.add_argument_group(
        "a grid of your own", "any of these; the others are as in the table. Without any: the table and all beside it"
    )
    grid.add_argument("--datasets", nargs="+", choices=grids.DATASETS)
    grid.add_argument("--rules", nargs="+", choices=list(runs.RULES))
    grid.add_argument("--expansions", nargs="+", type=int, help="features per dimension")
    grid.add_argument("--ks", nargs="+", type=int, help="mean active features per token")
    grid.add_argument("--seeds", nargs="+", type=int)
    grid.add_argument("--tokens", type=int, help="length of each training")
    grid.add_argument("--lr-scales", nargs="+", type=float, help="multiples of the learning rate")
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder that holds stories260K and its text")
    parser.add_argument(
        "--peer-python", type=Path, default=PEER_PYTHON, help="interpreter that has dictionary_learning (make interop)"
    )
    parser.add_argument(
        "--out", type=Path, help="CSV to add to; results.csv or quick.csv beside this file if not given"
    )
    parser.add_argument("--list", action="store_true", help="only say what would be run")
    return parser.parse_args()


def listed(options: argparse.Namespace) -> Iterator[runs.Run]:
    names = ("datasets", "rules", "expansions", "ks", "seeds", "tokens", "lr_scales")
    grid = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return grids.full(**grid) if grid else iter(grids.everything())


def to_do(wanted: list[runs.Run], done: set[tuple[str, ...]], options: argparse.Namespace) -> Iterator[runs.Run]:
    """Runs without a row. One that cannot be run is named, with the reason, and left out."""

    @cache
    def dataset(name: str) -> datasets.Dataset | SaekitError:
        try:
            return datasets.open_dataset(name, shared=options.shared)
        except SaekitError as error:
            note(f"without {name}: {error}")
            return error

    peers_run = options.peer_python.exists()
    if not peers_run and any(run.rule in runs.BY_PEER for run in wanted):
        note(f"without {', '.join(runs.BY_PEER)}: there is no {options.peer_python}; `make interop` builds it")
    for run in wanted:
        if run.rule in runs.BY_PEER and not peers_run:
            continue
        found = dataset(run.dataset)
        if isinstance(found, SaekitError) or results.key_of(run, found.fingerprint) in done:
            continue
        try:
            measure.config_of(run, found)
        except SaekitError as error:
            note(f"without {run}: {error}")
            continue
        yield run


def in_own_process(run: runs.Run, shared: Path, peer_python: Path, recordings: Path) -> dict[str, object]:
    """A fresh process for every run: its peak memory is its own, and nothing is left over from the last."""
    keep_only(recordings, f"{run.dataset}-")
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as pool:
        done = pool.submit(measure.measure, run, shared=shared, peer_python=peer_python, recordings=recordings)
        try:
            return done.result()
        except StopRequested:
            for child in multiprocessing.active_children():  # the pool would wait for it, for minutes
                child.terminate()
            raise


def keep_only(recordings: Path, beginning: str) -> None:
    """Drop the activations of data sets that are done with, a gigabyte each; runs of one data set follow each other."""
    for path in recordings.iterdir():
        if not path.name.startswith(beginning):
            path.unlink()


if __name__ == "__main__":
    sys.exit(main())
