"""The Triton kernels compiled to machine code for an H100, without the GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SHARED = 227 << 10  # shared memory of one program on an H100, in bytes
KERNELS = {
    *("_linear", "_grouped", "_shrink", "_expand", "_attend", "_combine", "_write", "_rms_norm", "_silu_mul", "_rope"),
    *("_convolve", "_recur"),
}


@pytest.mark.slow
def test_every_kernel_compiles_for_a_gpu(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("TRITON", "LORAKEET_"))}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "tests.support.compiling"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kernel["kernel"] for kernel in found} == KERNELS
    assert all(kernel["shared"] <= SHARED for kernel in found)
