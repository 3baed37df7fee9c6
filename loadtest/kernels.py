"""Each kernel compared with its library counterpart and the machine's roofline, all measured in one process.

Measured by `python -m adapters.kernels.bench`, which prints JSON, since this package does not import the kernels.
"""

import json
import subprocess
import sys
from typing import Any

from rich.table import Table

MODULE = "adapters.kernels.bench"


class KernelsError(Exception):
    """A failed benchmark; the message has the reason."""


def measure() -> dict[str, Any]:
    """Run the benchmark. Returns `{"roofline": {...}, "lines": [{kernel, shape, rows, seconds, ...}]}`."""
    return _run()


def roofline() -> dict[str, Any]:
    """Measure the machine's limits: `{"read_gb_s", "fp32_gflop_s", "threads", "instruction_set"}`."""
    found: dict[str, Any] = _run("--roofline")["roofline"]
    return found


def _run(*arguments: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-m", MODULE, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise KernelsError(done.stderr[-2000:])
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


def table(measured: dict[str, Any]) -> Table:
    """Return the result as a table for the terminal."""
    roof = measured["roofline"]
    libraries = dict.fromkeys(f"{line['kernel'].split(',')[0]}: {line['library']}" for line in measured["lines"])
    result = Table(
        *("kernel", "rows", "µs", "library", "speed-up", "bandwidth", "fp32 peak"),
        title=f"{roof['read_gb_s']:.1f} GB/s read, {roof['fp32_gflop_s']:.0f} GFLOP/s fp32, {roof['threads']} threads",
        caption="Library: " + "; ".join(libraries),
    )
    for column in result.columns[1:]:
        column.justify, column.no_wrap = "right", True
    for line in measured["lines"]:
        result.add_row(
            f"{line['kernel']}, {line['shape']}",
            str(line["rows"]),
            f"{1e6 * line['seconds']:.0f}",
            f"{1e6 * line['library_seconds']:.0f}",
            f"{line['library_seconds'] / line['seconds']:.1f}x",
            f"{100 * line['bandwidth_share']:.0f}%",
            f"{100 * line['flops_share']:.0f}%",
        )
    return result
