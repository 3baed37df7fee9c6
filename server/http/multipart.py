"""Streaming reader of multipart/form-data bodies: large parts go to disk, never whole into memory.

The event loop only receives; a thread parses and writes.

The caller gives the names and size limits of the parts; a missing, repeated, unknown or too large part is an error
that names it.
"""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from adapters.background import run_in
from server.errors import InvalidRequest, RequestTooLarge

_FRAMING_BYTES = 64 * 1024  # boundaries and part headers in total
_HEADER_LINE_BYTES = 4 * 1024
_HEADERS_PER_PART = 8
_GATHERED_BYTES = 128 * 1024  # collected from the network before a call of the thread


@dataclass(frozen=True)
class Part:
    """Expectations of one part. Its content is written to `path`, or returned if there is none."""

    max_bytes: int
    path: Path | None = None
    required: bool = True
    on_filename: Callable[[str], None] | None = None  # called with the client's name of the file
    on_beginning: Callable[[bytes], None] | None = None  # called with the first bytes as they arrive


async def read_parts(request: Request, parts: Mapping[str, Part], thread: ThreadPoolExecutor) -> dict[str, bytes]:
    """Read the whole body; return the in-memory parts by name, in order of arrival.

    Raises InvalidRequest (400, `param` names the part), RequestTooLarge (413), OSError when a file cannot be written,
    starlette's ClientDisconnect. Files may then be left half-written: `path`s must be in a private directory.
    """
    limit = sum(part.max_bytes for part in parts.values()) + _FRAMING_BYTES
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > limit:
        raise RequestTooLarge(f"The body has {declared} bytes; at most {limit} are accepted.")
    with ExitStack() as stack:
        form = _Form(_boundary(request), parts, stack)
        gathered: list[bytes] = []
        total = waiting = 0
        async for chunk in request.stream():
            gathered.append(chunk)
            total, waiting = total + len(chunk), waiting + len(chunk)
            if total > limit:
                raise RequestTooLarge(f"The body exceeds {limit} bytes.")
            if waiting >= _GATHERED_BYTES:
                await run_in(thread, partial(form.parse, gathered))
                gathered, waiting = [], 0
        return await run_in(thread, partial(form.finish, gathered))


def _boundary(request: Request) -> bytes:
    content_type, options = parse_options_header(request.headers.get("content-type"))
    boundary = options.get(b"boundary", b"")
    if content_type != b"multipart/form-data" or not boundary:
        raise InvalidRequest("Content-Type must be multipart/form-data with a boundary.", param="Content-Type")
    return boundary


@dataclass
class _OpenPart:
    """A part whose headers have been read."""

    name: str
    part: Part
    file: BinaryIO | None
    content: bytearray = field(default_factory=bytearray)  # of a part without a file
    size: int = 0


class _Form:
    """The parser's callbacks and their state."""

    def __init__(self, boundary: bytes, parts: Mapping[str, Part], stack: ExitStack) -> None:
        self._parts = parts
        self._stack = stack
        self._seen: dict[str, _OpenPart] = {}
        self._current: _OpenPart | None = None
        self._header = (bytearray(), bytearray())
        self._disposition = b""
        self._complete = False
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._part_begin,
                    "on_header_begin": self._header_begin,
                    "on_header_field": lambda data, start, end: self._header[0].extend(data[start:end]),
                    "on_header_value": lambda data, start, end: self._header[1].extend(data[start:end]),
                    "on_header_end": self._header_end,
                    "on_headers_finished": self._headers_finished,
                    "on_part_data": self._part_data,
                    "on_end": self._end,
                },
                max_header_count=_HEADERS_PER_PART,
                max_header_size=_HEADER_LINE_BYTES,
            )
        except FormParserError as error:
            raise InvalidRequest(f"Malformed multipart body: {error}", param="Content-Type") from None

    def parse(self, chunks: Iterable[bytes]) -> None:
        """Parse these chunks, and write the parts that belong in files."""
        try:
            for chunk in chunks:
                self._parser.write(chunk)
        except FormParserError as error:
            raise InvalidRequest(f"Malformed multipart body: {error}") from None

    def finish(self, chunks: Iterable[bytes]) -> dict[str, bytes]:
        """Parse the last chunks; return the parts without a file."""
        self.parse(chunks)
        for seen in self._seen.values():
            if seen.file is not None:
                seen.file.flush()
        if not self._complete:
            raise InvalidRequest("The multipart body ends before its closing boundary.")
        for name, part in self._parts.items():
            if part.required and name not in self._seen:
                raise InvalidRequest(f"The part '{name}' is missing.", param=name)
        return {name: bytes(seen.content) for name, seen in self._seen.items() if seen.file is None}

    def _part_begin(self) -> None:
        self._disposition = b""
        self._current = None

    def _header_begin(self) -> None:
        self._header = (bytearray(), bytearray())

    def _header_end(self) -> None:
        if self._header[0].lower() == b"content-disposition":
            self._disposition = bytes(self._header[1])

    def _headers_finished(self) -> None:
        disposition, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"").decode("utf-8", "replace")
        if disposition != b"form-data" or not name:
            raise InvalidRequest("Every part needs a Content-Disposition of form-data with a name.")
        if name not in self._parts:
            raise InvalidRequest(f"Unknown part '{name[:64]}'; expected: {', '.join(self._parts)}.", param=name[:64])
        if name in self._seen:
            raise InvalidRequest(f"The part '{name}' appears twice.", param=name)
        part = self._parts[name]
        if part.on_filename is not None:
            part.on_filename(options.get(b"filename", b"").decode("utf-8", "replace"))
        file = self._stack.enter_context(part.path.open("xb")) if part.path else None
        self._current = self._seen[name] = _OpenPart(name, part, file)

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        assert self._current is not None  # part data only follows a part's headers
        if not self._current.size and self._current.part.on_beginning is not None:
            self._current.part.on_beginning(data[start:end])
        self._current.size += end - start
        if self._current.size > self._current.part.max_bytes:
            limit = self._current.part.max_bytes
            raise RequestTooLarge(f"The part '{self._current.name}' exceeds {limit} bytes.", param=self._current.name)
        if self._current.file is None:
            self._current.content += data[start:end]
        else:
            self._current.file.write(memoryview(data)[start:end])

    def _end(self) -> None:
        self._complete = True
