"""The Triton kernels against the reference, under Triton's interpreter where there is no GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

# the interpreter is chosen when a kernel is defined, so the kernels get a process in which it is
CASES = Path(__file__).with_name("triton_cases.py")


def test_the_kernels_compute_what_the_reference_defines():
    done = subprocess.run(
        # without the hook that checks shapes: the interpreter does not find kernels that it has wrapped
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "-o",
            "addopts=--import-mode=importlib",
            CASES,
        ],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        cwd=CASES.parents[1],
    )
    assert done.returncode == 0, done.stdout[-3000:]
