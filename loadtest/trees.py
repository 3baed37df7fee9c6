"""This checkout compared with another one, in alternating rounds: decode speed and start-up."""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from loadtest import cases
from loadtest.compare import compare
from loadtest.peers.base import Kit
from loadtest.peers.lorakeet import Lorakeet

CASES = ("one", "eight")
MIN_DECODE = 0.98  # of the other checkout's tokens/s
MAX_START = 1.05  # times the other checkout's seconds; starts vary by a few percent
_MAIN = "from server.cli import main; main()"


class Tree(Lorakeet):
    """The server of the checkout in `folder`, in this environment's interpreter."""

    folder: Path

    def missing_reason(self) -> str | None:
        return None if (self.folder / "server").is_dir() else f"{self.folder} is no checkout"

    def command(self, kit: Kit, port: int) -> tuple[list[str], dict[str, str]]:
        [_, *arguments], environment = super().command(kit, port)
        # Without PYTHONSAFEPATH, the working directory precedes PYTHONPATH, and both sides would run its code.
        ours = {"PYTHONPATH": str(self.folder), "PYTHONSAFEPATH": "1"}
        return [sys.executable, "-c", _MAIN, *arguments], environment | ours

    async def extras(self) -> dict[str, Any]:
        return {}


class This(Tree):
    """The checkout of this load test."""

    name = "this"
    folder = Path(__file__).parent.parent


def other(folder: Path) -> type[Tree]:
    """Make the side of another checkout."""
    return type("Other", (Tree,), {"name": "other", "folder": folder.resolve()})


async def measure(kit: Kit, folder: Path, *, rounds: int, starts: int, report: Callable[[str], None]) -> dict[str, Any]:
    """Measure decode speed in `rounds` rounds of one and of eight requests, and `starts` starts of each checkout."""
    sides: tuple[type[Tree], ...] = (This, other(folder))
    names = tuple(side.name for side in sides)
    chosen = [dataclasses.replace(case, sides=names) for case in cases.select(CASES)]
    result = await compare(
        [side() for side in sides], chosen, kit, rounds=rounds, cell_seconds=float("inf"), report=report
    )
    decode = {case: {name: cell.decode for name, cell in row.items()} for case, row in result.cells.items()}
    seconds = await _starts(kit, sides, starts, report)
    measured: dict[str, Any] = {"decode": decode, "start_seconds": seconds, "missing": result.missing}
    return measured | {"verdicts": verdicts(decode, seconds)}


async def _starts(
    kit: Kit, sides: Sequence[type[Tree]], starts: int, report: Callable[[str], None]
) -> dict[str, list[float]]:
    """Return the seconds from command to readiness of alternating starts."""
    seconds: dict[str, list[float]] = {side.name: [] for side in sides}
    for index in range(starts):
        for kind in sides if index % 2 else sides[::-1]:
            side = kind(upload=False)
            began = time.monotonic()
            try:
                await side.start(kit)
                seconds[kind.name].append(time.monotonic() - began)
            finally:
                await side.stop()
            report(f"start {index + 1}/{starts}  {kind.name}: {seconds[kind.name][-1]:.1f} s")
    return seconds


def verdicts(decode: dict[str, dict[str, list[float]]], seconds: dict[str, list[float]]) -> list[dict[str, Any]]:
    """Return verdicts on the medians of the ratios of adjacent rounds, this checkout to the other."""
    lines: list[dict[str, Any]] = []
    for case, rates in decode.items():
        ratio = _ratio(rates["this"], rates["other"])
        claim = f"{case}: decode at least {MIN_DECODE} x the other checkout's"
        lines.append({"claim": claim, "value": f"{ratio:.3f}", "holds": ratio >= MIN_DECODE})
    if seconds["this"]:
        ratio = _ratio(seconds["this"], seconds["other"])
        claim = f"start-up at most {MAX_START} x the other checkout's"
        lines.append({"claim": claim, "value": f"{ratio:.3f}", "holds": ratio <= MAX_START})
    return lines


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def table(measured: dict[str, Any]) -> Table:
    """Return the medians and spread of each checkout as a table for the terminal."""
    shown = Table("", "this", "other")
    for case, rates in measured["decode"].items():
        shown.add_row(f"{case}, tokens/s", *(_spread(rates[name]) for name in ("this", "other")))
    if measured["start_seconds"]["this"]:
        shown.add_row("start-up, s", *(_spread(measured["start_seconds"][name]) for name in ("this", "other")))
    return shown


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f}-{max(values):.1f})"
