"""One training step against the encoder product that it cannot do without: saekit's rules, and other libraries.

    python -m benchmarks.speed.run [--quick] [--gpu] [--growth] [--peers PYTHON] [--threads 1] [--rounds 3] [--out FILE]

README.md beside this file explains the columns. The tests that the numbers rest on run first, and nothing is timed
while one is red. Every contender is a process of its own, and they take turns in rounds; in each process the encoder
product takes turns with the steps. Medians over all rounds are written, and the smallest times beside them.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.gate import REPOSITORY, note, tests_pass
from benchmarks.speed import peers
from benchmarks.speed.case import Size

CPU = ("2048x512x8192x32", "4096x768x24576x32", "2048x256x65536x32")
GPU = ("8192x4096x131072x64", "32768x768x32768x32", "8192x2304x65536x64")
# how the cost grows with the dictionary
GROWTH = tuple(f"2048x256x{n_features}x32" for n_features in (4096, 8192, 16384, 32768, 65536))
QUICK = ("512x128x2048x32",)
# what the numbers rest on
TESTS = ("kernels", "threads", "screen", "triton", "selection", "losses", "descent", "training", "resume")
# beyond this the definition sorts for minutes
MOST_FOR_REFERENCE = 1 << 25
COLUMNS = (
    "size", "contender", "ms", "ms_min", "x_matmul", "x_matmul_min", "tokens_per_s", "peak_mb", "matmul_ms",
    "matmul_bf16_ms", "samples", "device", "threads", "torch", "commit", "finished",
)  # fmt: skip


def main() -> int:
    options = parse()
    if not options.untested and not tests_pass(TESTS):
        return 1
    asked = QUICK if options.quick else GPU if options.gpu else GROWTH if options.growth else CPU
    sizes = options.sizes or asked
    rows = [row for size in map(Size.parse, sizes) for row in compare(size, options)]
    print(table(rows))
    if options.out:
        write(options.out, rows)
        note(f"written to {options.out}")
    return 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small size, to see that all of it runs")
    parser.add_argument("--gpu", action="store_true", help="the sizes for a GPU, on cuda")
    parser.add_argument(
        "--growth", action="store_true", help="4,096 to 65,536 features at the same k; --only topk fits"
    )
    parser.add_argument("--sizes", nargs="+", help="tokens x d_model x features x k, as 2048x512x8192x32")
    parser.add_argument("--only", nargs="+", help="contenders whose names begin so")
    parser.add_argument("--peers", type=Path, help="the interpreter of an environment with the other libraries")
    parser.add_argument("--rounds", type=int, default=3, help="how often every contender has its turn")
    parser.add_argument("--repeats", type=int, default=5, help="steps of a turn")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--untested", action="store_true", help="skip the tests, for looks that are not kept")
    parser.add_argument("--out", type=Path, help="a CSV to write")
    return parser.parse_args()


def compare(size: Size, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per contender, and one for the product alone."""
    turns: dict[str, list[dict[str, Any]]] = {}
    for number in range(options.rounds):
        for module, contender in contenders(size, options):
            note(f"{size} round {number + 1}: {contender}")
            facts = turn(module, contender, size, options)
            if facts:
                turns.setdefault(contender, []).append(facts)
    return [row(size, contender, facts) for contender, facts in turns.items()]


def contenders(size: Size, options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    from benchmarks.speed import ours

    known = [("ours", name) for name in ours.contenders()]
    known += [("peers", name) for name in peers.contenders()] if options.peers else []
    for module, name in known:
        too_large = name.startswith("reference") and size.n_tokens * size.n_features > MOST_FOR_REFERENCE
        if not too_large and (not options.only or name.startswith(tuple(options.only))):
            yield module, name


def turn(module: str, contender: str, size: Size, options: argparse.Namespace) -> dict[str, Any] | None:
    """What a worker measured; None, with its last line of complaint, if it failed."""
    python = str(options.peers) if module == "peers" else sys.executable
    command = [python, "-W", "ignore", "-m", "benchmarks.speed.worker", contender, str(size), "--module", module]
    command += ["--repeats", str(options.repeats), "--threads", str(options.threads)]
    command += ["--device", "cuda"] if options.gpu else []
    # as the command line sets it (`cli/main.py`); for all contenders and the product alike
    environment = {"GOMP_SPINCOUNT": "10000"} | os.environ
    environment |= {"OMP_NUM_THREADS": str(options.threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    if done.returncode:
        note(f"{contender} failed: {(done.stderr.strip() or 'killed').splitlines()[-1]}")
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def row(size: Size, contender: str, turns: list[dict[str, Any]]) -> dict[str, Any]:
    steps, products, fast = ([t for facts in turns for t in facts[key]] for key in ("step", "matmul", "matmul_bf16"))
    ms = median(steps)
    return {
        "size": str(size),
        "contender": contender,
        "ms": round(ms, 1),
        "ms_min": round(min(steps), 1),
        "x_matmul": round(ms / median(products), 2),
        "x_matmul_min": round(min(steps) / min(products), 2),
        "tokens_per_s": round(1e3 * size.n_tokens / ms),
        "peak_mb": max(facts["peak_mb"] for facts in turns),
        "matmul_ms": round(median(products), 1),
        "matmul_bf16_ms": round(median(fast), 1),
        "samples": len(steps),
        **{name: turns[0][name] for name in ("device", "threads", "torch")},
        "commit": commit(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=REPOSITORY, capture_output=True, text=True)
    return done.stdout.strip()


def table(rows: list[dict[str, Any]]) -> str:
    shown = COLUMNS[:11]
    lines = [shown, *([str(row[name]) for name in shown] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(shown))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """Written beside its place and renamed."""
    beside = path.with_suffix(".part")
    with beside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter[str](file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    os.replace(beside, path)


if __name__ == "__main__":
    sys.exit(main())
