"""Docstrings and comments use nouns instead of relative clauses ("what ...", "who ..."): nobody has to decode them."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.running import REPOSITORY

CLAUSE = re.compile(r"\b(what|whatever|who|whoever|whom)\b", re.IGNORECASE)


def prose(file: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of docstrings and the comments of a file, with their line numbers."""
    source = file.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                yield from enumerate(str(first.value.value).splitlines(), first.lineno)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


@pytest.mark.parametrize("folder", ["server", "adapters", "loadtest", "deploy", "examples"])
def test_no_relative_clauses_in_place_of_nouns(folder: str) -> None:
    files = sorted((REPOSITORY / folder).rglob("*.py"))
    assert files
    found = [
        f"{file.relative_to(REPOSITORY)}:{line}: {text.strip()}"
        for file in files
        for line, text in prose(file)
        if CLAUSE.search(text)
    ]
    assert not found, "say it with a noun:\n" + "\n".join(found)


def test_the_check_sees_docstrings_and_comments(tmp_path: Path) -> None:
    file = tmp_path / "example.py"
    file.write_text('"""What is left."""\n\n\ndef f():\n    return "who"  # whoever asks\n')
    assert [line for line, text in prose(file) if CLAUSE.search(text)] == [1, 5]
