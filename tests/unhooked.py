"""Tests that need a process of their own, without the hook that checks shapes."""

import os
import subprocess
import sys
from pathlib import Path


def run_cases(name: str, **environment: str) -> None:
    """Run the tests of a file beside this one; what they complain about is what fails."""
    cases = Path(__file__).with_name(name)
    plainly = ["-q", "-p", "no:cacheprovider", "-o", "addopts=--import-mode=importlib"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *plainly, cases],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        cwd=cases.parents[1],
    )
    assert done.returncode == 0, done.stdout[-3000:]
