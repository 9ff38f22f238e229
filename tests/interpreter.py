"""Kernels on a CPU: a test file runs itself in a process of its own, under Triton's interpreter."""

import importlib.util
import os
import subprocess
import sys

import numpy
import pytest


def needs_interpreter(test):
    """Skip where there is no Triton, or where its interpreter does not work: it turns one-element arrays into numbers, which numpy 2.4 refuses."""
    new = tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4)
    why = (
        "triton is not installed"
        if importlib.util.find_spec("triton") is None
        else "Triton's interpreter needs numpy below 2.4"
        if new
        else ""
    )
    return pytest.mark.skipif(bool(why), reason=why)(test)


def run_under_interpreter(file: str) -> None:
    """Run `python file`; what it prints is the failure's message."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, file], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
