"""Nothing is measured while a test that the numbers rest on is red."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def tests_pass(names: Sequence[str]) -> bool:
    """Whether every `tests/test_NAME.py` passes; `*` in a name stands for anything. What is red goes to stderr.

    They run side by side, a thread each, as in `make test`. A name without a file is red too.
    """
    note("first the tests that the numbers rest on")
    files = [path for name in names for path in sorted((REPOSITORY / "tests").glob(f"test_{name}.py")) or [name]]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow and not network and not interop"]
    command += ["-n", "auto", "--dist", "loadfile", *map(str, files)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    if done.returncode:
        note(done.stdout[-4000:] + done.stderr[-1000:])
        note("the tests are red, so no number would mean anything; make them pass first")
    return done.returncode == 0


def note(what: str) -> None:
    print(what, file=sys.stderr, flush=True)
