"""A batch's file, checked in bounded memory."""

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from server.batches.rows import Limits, check, read

URL = "/v1/completions"
LIMITS = Limits(rows=10, body_bytes=1 << 16, body_items=100, body_depth=64)


def row(name: str, **body: Any) -> bytes:
    return json.dumps({"custom_id": name, "method": "POST", "url": URL, "body": body}).encode()


def faults(path: Path) -> list[tuple[int | None, str]]:
    return [(fault.line, fault.code) for fault in check(path, URL, LIMITS)[1]]


@pytest.mark.parametrize("end", [b"\n", b""])
def test_a_line_that_is_too_long_is_told_and_never_whole_in_memory(tmp_path: Path, end: bytes) -> None:
    path = tmp_path / "in.jsonl"
    with path.open("wb") as file:
        file.write(row("a") + b"\n")
        for filler in (b" ", b"x"):
            file.write(b'{"custom_id": "')
            for _ in range(32):
                file.write(filler * (1 << 20))
            file.write(b"\n")
        file.write(row("a") + end)
    tracemalloc.start()
    try:
        assert faults(path) == [(2, "line_too_long"), (3, "line_too_long"), (4, "duplicate_custom_id")]
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_body_of_the_largest_size_is_read_and_one_with_too_many_items_is_not(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    fits, most = row("fits", prompt="x" * (LIMITS.body_bytes - len('{"prompt": ""}'))), row("most", prompt=[1] * 98)
    path.write_bytes(b"\r\n".join([fits, most, b" " * 100, b""]))
    assert check(path, URL, LIMITS) == (2, [])
    assert [(each.line, each.custom_id) for each in read(path)] == [(1, "fits"), (2, "most")]
    path.write_bytes(row("more", prompt=[[]] * 200))
    assert faults(path) == [(1, "too_many_items")]
