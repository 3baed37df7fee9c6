"""Rewrites the README's performance section from the newest committed result; nobody types figures by hand."""

import json
from pathlib import Path
from typing import Any

from loadtest import claims

BEGIN = "<!-- performance: written by `python -m loadtest readme`; do not edit -->"
END = "<!-- /performance -->"


class ReadmeError(Exception):
    """The section cannot be written; the message says why."""


def results_folder() -> Path:
    """Where results of real runs are kept."""
    return Path(__file__).parent / "results"


def newest(folder: Path) -> Path:
    """The newest comparison in a folder of results (file names begin with their date)."""
    for file in sorted(folder.glob("*.json"), reverse=True):
        if json.loads(file.read_text("utf-8")).get("kind") == "compare":
            return file
    raise ReadmeError(f"no comparison in {folder}")


def section(result: dict[str, Any], name: str) -> str:
    """The section's Markdown for one result file."""
    machine = result["machine"]
    versions = ", ".join(f"{package} {version}" for package, version in machine["packages"].items())
    where = (
        f"Measured {machine['date'][:10]} on {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB "
        f"({', '.join(machine['vector_extensions'])}) at commit `{machine['commit']}` with `{machine['command']}`; "
        f"{versions}. Raw figures: `loadtest/results/{name}`."
    )
    return f"{where}\n\n{claims.markdown(result)}"


def rewrite(readme: Path, result_file: Path) -> bool:
    """Replace the marked block of `readme`; returns whether anything changed. Raises `ReadmeError`."""
    text = readme.read_text("utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(END) < text.index(BEGIN):
        raise ReadmeError(f"{readme} needs one block between {BEGIN} and {END}")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    block = section(json.loads(result_file.read_text("utf-8")), result_file.name)
    new = f"{before}{BEGIN}\n\n{block}\n{END}{after}"
    readme.write_text(new, "utf-8")
    return new != text
