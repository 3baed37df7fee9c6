"""Lists on standard output: aligned columns on a terminal, plain rows in a pipe, JSON with --json."""

import json
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

AsJson = Annotated[bool, typer.Option("--json", help="Print the API's JSON.")]

_UNBOUNDED = 10_000  # columns: wider than any list


def show_json(value: Any) -> None:
    """Print a value from the API."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def show_rows(headings: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[str] = ()) -> None:
    """Print one line for each row, neither truncated nor wrapped on a narrow terminal, so that it can be copied.

    Args:
        right: headings of columns of numbers.
    """
    if not Console().is_terminal:
        for row in (headings, *rows):
            print("\t".join(row))
        return
    table = Table(box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, no_wrap=True, justify="right" if heading in right else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=_UNBOUNDED, markup=False, highlight=False).print(table, soft_wrap=True)
