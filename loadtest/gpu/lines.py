"""Promises and their verdicts: the lines of a GPU result, and its files."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HEADERS = ("line", "what", "promised", "measured", "verdict")


@dataclass(frozen=True)
class Line:
    """One promise with its verdict."""

    name: str  # the promise's letter
    what: str
    promised: str
    measured: str
    held: bool | None  # None: not measured

    @property
    def verdict(self) -> str:
        return {True: "holds", False: "FAILS", None: "not measured"}[self.held]

    @property
    def text(self) -> str:
        """The line for a terminal."""
        return f"{self.verdict:>12}  {self.name}  {self.what}: {self.measured} ({self.promised})"


def at_least(name: str, what: str, value: float, limit: float, unit: str = "x", note: str = "") -> Line:
    """Make a line for a figure with a lower bound. NaN fails."""
    return Line(name, what, f">= {limit:g}{unit}", f"{value:.2f}{unit}{note and f' ({note})'}", value >= limit)


def at_most(name: str, what: str, value: float, limit: float, unit: str = "x", note: str = "") -> Line:
    """Make a line for a figure with an upper bound. NaN fails."""
    return Line(name, what, f"<= {limit:.3g}{unit}", f"{value:.3g}{unit}{note and f' ({note})'}", value <= limit)


@dataclass(frozen=True)
class Part:
    """The result of one part of the command, and its device."""

    name: str
    machine: dict[str, Any]
    lines: list[Line]
    raw: dict[str, Any]


def write_results(prefix: Path, parts: Sequence[Part]) -> None:
    """Write `prefix.json` and `prefix.md`; other parts in these files stay as they are."""
    file = prefix.with_suffix(".json")
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    for part in parts:
        lines = [asdict(line) | {"verdict": line.verdict} for line in part.lines]
        results[part.name] = {"machine": part.machine, "lines": lines, **part.raw}
    prefix.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=1) + "\n")
    prefix.with_suffix(".md").write_text(page(results))


def page(results: dict[str, Any]) -> str:
    """Return a result as Markdown."""
    rows: list[Sequence[str]] = [HEADERS, ("---",) * len(HEADERS)]
    parts_by_circumstances: dict[str, list[str]] = {}  # circumstances -> the parts measured in them
    for name, part in results.items():
        rows += [[line[header] for header in ("name", *HEADERS[1:])] for line in part["lines"]]
        parts_by_circumstances.setdefault(_circumstances(part["machine"]), []).append(name)
    table = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)
    sources = "\n".join(f"- {', '.join(names)}: {text}" for text, names in parts_by_circumstances.items())
    return f"# On one GPU\n\n{table}\n\n{sources}\n"


def _circumstances(machine: dict[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    return (
        f"{machine['gpu']}, CUDA {machine['cuda']}; Python {machine['python']}, {packages}; "
        f"{machine['date'][:10]}, commit {machine['commit']}, `{machine['command']}`"
    )
