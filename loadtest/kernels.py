"""Each kernel beside its library counterpart and the machine's roofline, all measured in one process.

The measuring is done where the kernels live (`python -m adapters.kernels.bench`, which prints JSON): this package
imports none of them. Here its lines are read and shown.
"""

import json
import subprocess
import sys
from typing import Any

from rich.table import Table

MODULE = "adapters.kernels.bench"


class KernelsError(Exception):
    """The benchmark did not run; the message says why."""


def measure() -> dict[str, Any]:
    """Run the benchmark. Returns `{"roofline": {...}, "lines": [{kernel, shape, rows, seconds, ...}]}`."""
    done = subprocess.run([sys.executable, "-m", MODULE], capture_output=True, text=True)
    if done.returncode:
        raise KernelsError(done.stderr[-2000:])
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


def table(measured: dict[str, Any]) -> Table:
    """The terminal's table."""
    roof = measured["roofline"]
    result = Table(
        *("kernel", "shape", "rows", "µs", "library", "library µs", "speed-up", "of bandwidth", "of fp32 peak"),
        title=f"{roof['read_gb_s']:.1f} GB/s read, {roof['fp32_gflop_s']:.0f} GFLOP/s fp32, {roof['threads']} threads",
    )
    for column in result.columns[2:]:
        column.justify = "right"
    for line in measured["lines"]:
        library = line.get("library_seconds")
        result.add_row(
            line["kernel"],
            line["shape"],
            str(line["rows"]),
            f"{1e6 * line['seconds']:.0f}",
            line.get("library", ""),
            f"{1e6 * library:.0f}" if library else "",
            f"{library / line['seconds']:.1f}x" if library else "",
            _percent(line.get("bandwidth_share")),
            _percent(line.get("flops_share")),
        )
    return result


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f}%"
