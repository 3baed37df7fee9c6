"""The most expensive bodies of every operation, generated from its description: each field with too many values."""

import asyncio
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import msgspec
from starlette.applications import Starlette

from server.http.operations import Operation

ADAPTER = "mine"
_EXAMPLES: Mapping[str, Any] = {
    "model": "tiny",
    "prompt": "Hi",
    "messages": [{"role": "user", "content": "Hi"}],
    "max_tokens": 2,
    "tokens": [1],
    "file": "file-1",
    "training_file": "file-1",
    "name": "mixed",
    "mix": [{"adapter": ADAPTER}],
    "to": "checkpoint",
}


_remembered = lru_cache(2)  # the same value is used for every field, in two sizes


def _list(item: bytes) -> Callable[[int], bytes]:
    @_remembered
    def made(size: int) -> bytes:
        return b"[" + (item + b",") * (size // (len(item) + 1)) + item + b"]"

    return made


def _map(value: bytes, digits: int = 8) -> Callable[[int], bytes]:
    @_remembered
    def made(size: int) -> bytes:
        count = size // (digits + 4 + len(value))
        return b"{" + b",".join(b'"%0*d":%b' % (digits, i, value) for i in range(count)) + b"}"

    return made


# Values of about this many bytes.
SHAPES: Mapping[str, Callable[[int], bytes]] = {
    "words": lambda size: b'"' + b"ab " * (size // 3) + b'"',
    "one word": lambda size: b'"' + b"a" * size + b'"',
    "escapes": lambda size: b'"' + rb"\u00e9\"" * (size // 8) + b'"',
    "numbers": _list(b"1"),
    "empty lists": _list(b"[]"),
    "texts": _list(b'"a"'),
    "messages": _list(b'{"role":"user","content":""}'),
    "faulty messages": _list(b'{"a":1}'),
    "map": _map(b"1"),
    "map of lists": _map(b"[]"),
    "map of texts": _map(b'""'),
}


@dataclass(frozen=True)
class Case:
    """One body of one operation, in any size."""

    operation: Operation
    what: str
    body: Callable[[int], bytes]

    @property
    def path(self) -> str:
        filled = self.operation.path.replace("{name:path}", ADAPTER)
        return re.sub(r"{.*?}", "nobody", filled)

    def __str__(self) -> str:
        return f"{self.operation.method} {self.path}: {self.what}"


def cases(operations: Iterable[Operation]) -> Iterator[Case]:
    """Every field of every body with every shape, and bodies that are invalid as a whole."""
    known: set[tuple[str, str, str]] = set()
    for operation in operations:
        for kind in operation.bodies:
            needed = {
                name: _EXAMPLES.get(name, "x") for name, field in kind.model_fields.items() if field.is_required()
            }
            needed |= {name: _EXAMPLES[name] for name in ("model", "max_tokens") if name in kind.model_fields}
            yield Case(operation, f"{kind.__name__}, a key twice", _twice)
            yield Case(operation, f"{kind.__name__}, unknown fields", _map(b"1"))
            properties = kind.model_json_schema()["properties"]
            for name in kind.model_fields:
                described = json.dumps(properties[name])
                owner = next(base for base in reversed(kind.__mro__) if name in getattr(base, "model_fields", ()))
                if (owner.__name__, name, described) in known:  # shared by several bodies
                    continue
                known.add((owner.__name__, name, described))
                scalar = not any(word in described for word in ('"string"', '"array"', '"object"', "$ref"))
                for shape in ("empty lists",) if scalar else SHAPES:
                    yield Case(operation, f"{kind.__name__}.{name}, {shape}", _with(needed, name, SHAPES[shape]))


def _twice(size: int) -> bytes:
    return _map(b"1")(size)[:-1] + b',"00000001":1}'


def _with(needed: Mapping[str, Any], name: str, value: Callable[[int], bytes]) -> Callable[[int], bytes]:
    others = msgspec.json.encode({key: item for key, item in needed.items() if key != name})[:-1]
    joint = b"," if len(others) > 1 else b""
    return lambda size: others + joint + b'"' + name.encode() + b'":' + value(size) + b"}"


@dataclass
class Seen:
    """The cost of one request."""

    status: int
    answer: int  # bytes
    seconds: float  # of processor time
    gap: float  # of processor time: the longest that the event loop's own thread ran without a pause


async def ask(app: Starlette, method: str, path: str, body: bytes) -> Seen:
    """Send a request in this event loop."""
    seen = Seen(0, 0, 0.0, 0.0)
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())],
        "client": ("test", 1),
        "server": ("test", 80),
    }
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        if messages:
            return messages.pop()
        return await asyncio.Event().wait()

    async def send(message: Any) -> None:
        seen.status = message.get("status", seen.status)
        seen.answer += len(message.get("body", b""))

    async def watch() -> None:
        while True:
            before = time.thread_time()
            await asyncio.sleep(0.002)
            seen.gap = max(seen.gap, time.thread_time() - before)

    watching = asyncio.create_task(watch())
    await asyncio.sleep(0)
    before = time.process_time()
    await app(scope, receive, send)
    seen.seconds = time.process_time() - before
    await asyncio.sleep(0.002)
    watching.cancel()
    return seen
