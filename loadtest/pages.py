"""Rewriting of the tables of figures in README.md and docs/performance.md from the newest committed comparison."""

import json
from pathlib import Path
from typing import Any

from loadtest import claims

BEGIN = "<!-- performance: written by `python -m loadtest docs`; do not edit -->"
END = "<!-- /performance -->"


class PageError(Exception):
    """Tables that cannot be written; the message has the reason."""


def results_folder() -> Path:
    """Return the folder of committed results."""
    return Path(__file__).parent / "results"


def newest(folder: Path) -> Path:
    """Return the newest comparison in a folder of results (file names start with the date). Raises `PageError`."""
    for file in sorted(folder.glob("*.json"), reverse=True):
        if json.loads(file.read_text("utf-8")).get("kind") == "compare":
            return file
    raise PageError(f"no comparison in {folder}")


def section(result: dict[str, Any], name: str) -> str:
    """Return all figures of one result file, in Markdown."""
    machine = result["machine"]
    versions = ", ".join(f"{package} {version}" for package, version in machine["packages"].items())
    where = (
        f"Measured {machine['date'][:10]} on {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB "
        f"({', '.join(machine['vector_extensions'])}) at commit `{machine['commit']}` with `{machine['command']}`; "
        f"{versions}. Raw figures: `loadtest/results/{name}`."
    )
    return f"{where}\n\n{claims.markdown(result)}"


def summary(result: dict[str, Any]) -> str:
    """Return the README's small table: our speed, each peer's best, and their ratios."""
    machine = result["machine"]
    where = f"{machine['date'][:10]}, {machine['cpu']}, {machine['cores']} cores, commit `{machine['commit']}`"
    return f"{claims.summary(result)}\n\nTokens/s, medians of interleaved rounds; {where}.\n"


def rewrite(page: Path, block: str) -> bool:
    """Replace the marked block of `page`; return whether anything changed. Raises `PageError`."""
    text = page.read_text("utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        raise PageError(f"{page} needs one block between {BEGIN} and {END}")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    new = f"{before}{BEGIN}\n\n{block}\n{END}{after}"
    page.write_text(new, "utf-8")
    return new != text


def rewrite_all(root: Path, result_file: Path) -> list[Path]:
    """Rewrite both pages of the checkout at `root`; return the changed ones. Raises `PageError`."""
    result = json.loads(result_file.read_text("utf-8"))
    blocks = {"README.md": summary(result), "docs/performance.md": section(result, result_file.name)}
    return [root / page for page, block in blocks.items() if rewrite(root / page, block)]
