"""Interpreted products do not depend on the environment's BLAS: a row's bits are the same under any setting."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    "environment",
    [
        pytest.param({"OPENBLAS_NUM_THREADS": "1"}, id="one thread", marks=pytest.mark.slow),
        pytest.param({"OPENBLAS_CORETYPE": "Haswell", "OPENBLAS_NUM_THREADS": "2"}, id="Haswell, two threads"),
    ],
)
def test_rows_keep_their_bits_under_any_blas_setting(environment: dict[str, str]) -> None:
    test = "tests/adapters/kernels/test_triton.py::test_rows_do_not_depend_on_the_batch_when_tiles_are_fixed"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
    run = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "1 passed" in run.stdout
