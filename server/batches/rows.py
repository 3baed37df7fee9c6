"""Reading and checking the rows of a batch's file, and the journal of their answers."""

import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from adapters.disk import raising_storage_full, sync
from adapters.strict_json import BYTE_ORDER_MARK, JsonFault, check_characters, count_items, encode_line, parse_json
from server.batches.store import Fault
from server.errors import printable
from server.finetune.files import new_id

INPUT = "input.jsonl"  # in a batch's directory; below, files of answers by success
ANSWERS = {True: "output.jsonl", False: "errors.jsonl"}
MAX_FAULTS = 100  # reported per file
_MAX_ID = 512
_ENVELOPE = 16 * 1024  # bytes of a line beside its body: more than the longest `custom_id` needs
_ENVELOPE_ITEMS = 8  # four keys and their values
_SKIPPED = 1 << 20  # bytes read at a time to skip an over-long line


class Limits(NamedTuple):
    """Limits of a batch's file."""

    rows: int
    body_bytes: int  # of one request, the same as outside batches
    body_items: int
    body_depth: int


class Row(msgspec.Struct, frozen=True):
    """One request: its line number, the client's id for it, and its body in JSON."""

    line: int
    custom_id: str
    body: bytes


def read(path: Path) -> Iterator[Row]:
    """Yield the rows of a checked file."""
    for line, text, _ in _lines(path):
        row = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
        yield Row(line, msgspec.json.decode(row["custom_id"], type=str), bytes(row["body"]))


def check(path: Path, endpoint: str, limits: Limits) -> tuple[int, list[Fault]]:
    """Return the number of rows, and the file's faults; without faults it can be `read`."""
    faults: list[Fault] = []
    seen: set[str] = set()
    for line, text, complete in _lines(path, limits.body_bytes + _ENVELOPE):
        try:
            if not complete:
                message = f"a request has at most {limits.body_bytes} bytes (--max-body-bytes)"
                raise _Faulty("line_too_long", message)
            most = limits.body_items + _ENVELOPE_ITEMS
            if count_items(text, most) > most:
                message = f"it has more than {limits.body_items} elements of lists, keys and values (--max-body-items)"
                raise _Faulty("too_many_items", message)
            custom_id = _checked(text, endpoint, limits.body_depth + 1)
            if custom_id in seen:
                raise _Faulty("duplicate_custom_id", f"`custom_id` {printable(custom_id)} was used before", "custom_id")
        except _Faulty as fault:
            faults.append(Fault(fault.code, f"Line {line}: {fault}.", fault.param, line))
            if len(faults) == MAX_FAULTS:
                break
        else:
            seen.add(custom_id)
            if len(seen) > limits.rows:
                message = f"The file has more than {limits.rows} requests (--batch-file-requests)."
                return len(seen), [Fault("too_many_requests", message)]
    if not seen and not faults:
        faults.append(Fault("empty_file", "The file has no requests."))
    return len(seen), faults


class _Faulty(Exception):
    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.param = code, param


def _checked(text: bytes, endpoint: str, max_depth: int) -> str:
    """Return the row's `custom_id`. Raises _Faulty."""
    try:
        row: Any = parse_json(text, max_depth=max_depth)
        check_characters(text, row)
    except JsonFault as fault:
        raise _Faulty("invalid_json_line", printable(f"this {fault}")) from None
    if not isinstance(row, dict):
        raise _Faulty("invalid_json_line", "a row is an object")
    if unknown := sorted(row.keys() - {"custom_id", "method", "url", "body"}):
        raise _Faulty("unknown_field", f"unknown field {printable(unknown[0])}", unknown[0][:_MAX_ID])
    custom_id = row.get("custom_id")
    if not isinstance(custom_id, str) or not 0 < len(custom_id) <= _MAX_ID:
        raise _Faulty("invalid_custom_id", f"`custom_id` must be a string of 1 to {_MAX_ID} characters", "custom_id")
    if row.get("method") != "POST":
        raise _Faulty("invalid_method", "`method` must be `POST`", "method")
    if row.get("url") != endpoint:
        raise _Faulty("mismatched_url", f"`url` must be the batch's endpoint, `{endpoint}`", "url")
    if not isinstance(row.get("body"), dict):
        raise _Faulty("invalid_body", "`body` must be an object", "body")
    if row["body"].get("stream"):
        raise _Faulty("invalid_body", "an answer in a batch cannot be streamed", "body.stream")
    return custom_id


def _lines(path: Path, longest: int = sys.maxsize - 1) -> Iterator[tuple[int, bytes, bool]]:
    """Yield each non-blank line: its number, its bytes, and whether it is complete.

    Only the first `longest` bytes of a line are held in memory at once.
    """
    with path.open("rb") as file:
        number = 0
        while text := file.readline(longest + 1):
            number += 1
            rest = text
            complete = len(text) <= longest or text.endswith(b"\n")
            while not complete and rest and not rest.endswith(b"\n"):
                rest = file.readline(_SKIPPED)
            if number == 1:
                text = text.removeprefix(BYTE_ORDER_MARK)
            if (stripped := text.strip()) or not complete:
                yield number, stripped, complete


class Journal:
    """The answers of one batch, in the two result files. Each row occurs at most once in at most one of them.

    An answer is on disk when `add` returns; a line cut short by a crash is removed on opening.
    """

    def __init__(self, directory: Path) -> None:
        self.paths = {good: directory / name for good, name in ANSWERS.items()}
        self.counts = dict.fromkeys(self.paths, 0)
        self.done: set[str] = set()
        self._lock = threading.Lock()
        for good, path in self.paths.items():
            path.touch()
            with path.open("r+b") as file:
                complete_bytes = 0
                for text in file:
                    if text.endswith(b"\n"):
                        complete_bytes += len(text)
                        self.counts[good] += 1
                        self.done.add(_NAMED.decode(text).custom_id)
                file.truncate(complete_bytes)
            sync(path)

    def add(self, custom_id: str, response: dict[str, Any] | None, error: dict[str, str] | None) -> bool:
        """Write a row's outcome; False when it has one already. Raises StorageFull with nothing written."""
        good = response is not None and response["status_code"] < 400
        line = {"id": new_id("batch_req_"), "custom_id": custom_id, "response": response, "error": error}
        with self._lock:
            if custom_id in self.done:
                return False
            self._append(self.paths[good], encode_line(line) + b"\n")
            self.done.add(custom_id)
            self.counts[good] += 1
        return True

    def _append(self, path: Path, text: bytes) -> None:
        with raising_storage_full(), path.open("ab", buffering=0) as file:
            before = os.fstat(file.fileno()).st_size
            try:
                left = memoryview(text)
                while left:
                    left = left[file.write(left) :]
                os.fsync(file.fileno())
            except BaseException:
                file.truncate(before)
                raise


class _Named(msgspec.Struct):
    custom_id: str


_NAMED = msgspec.json.Decoder(_Named)  # made in one thread: concurrent first uses of a type crash msgspec
