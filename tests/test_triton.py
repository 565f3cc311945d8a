"""The Triton kernels against the reference, under Triton's interpreter where there is no GPU."""

import importlib.util

import pytest
from unhooked import run_cases

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)


def test_the_kernels_compute_what_the_reference_defines():
    # the interpreter is chosen when a kernel is defined, and does not find kernels that the hook has wrapped
    run_cases("triton_cases.py", TRITON_INTERPRET="1")
