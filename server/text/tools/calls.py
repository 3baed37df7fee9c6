"""Parts shared by formats: calls in JSON, calls behind a marker, arguments as text with types from a schema."""

import ast
import json
from collections.abc import Callable, Collection
from typing import Any

from server.text.tools.source import Malformed, Reader, Source, Step


def marked(read: Callable[[Source, str], Step[None]], *markers: str) -> Reader:
    """Return a reader of text, and of calls behind any of these markers, which is passed to `read`."""

    def reader(source: Source) -> Step[None]:
        while (marker := (yield from source.text(*markers))) is not None:
            try:
                yield from read(source, marker)
            except (Malformed, RecursionError):
                source.abandon_call()

    return reader


def leading(read: Reader) -> Reader:
    """Return a reader of calls at the beginning of the answer; all else is text."""

    def reader(source: Source) -> Step[None]:
        source.attempt()
        try:
            yield from source.space()
            yield from read(source)
        except (Malformed, RecursionError):
            pass
        source.abandon_call()
        yield from source.text()

    return reader


def json_call(source: Source, known: Collection[str] | None = None) -> Step[None]:
    """Read `{"name": ..., "arguments": {...}}`, in any order. Also accept `parameters`, and JSON in a string.

    Cohere's `tool_name` is a name.
    """
    name, early, written = None, None, False
    yield from source.expect("{")
    while True:
        if (yield from source.accept("}")):
            break
        key = yield from source.json()
        yield from source.expect(":")
        is_object = (yield from source.peek()) == "{"
        if key == "function" and is_object:
            yield from json_call(source, known)
            name, written = "", True
        elif key in ("name", "function", "tool_name") and name is None:
            name = yield from source.json()
            source.begin(name, known)
            if early is not None:
                source.write(early)
                written = True
        elif key in ("arguments", "parameters") and is_object and name and not written:
            written = True
            yield from source.value(source.write)
        elif key in ("arguments", "parameters") and not written and early is None:
            text = yield from source.value_text()
            early = text if is_object else _object_in(text)
            if name:
                source.write(early)
                written = True
        else:
            yield from source.value_text()
        if not (yield from source.accept(",")):
            yield from source.expect("}")
            break
    if name is None:
        raise Malformed
    if not written:
        source.write("{}")


def _object_in(text: str) -> str:
    """Return the arguments in a JSON string; `{}` for other values."""
    try:
        inner = json.loads(text)
        if isinstance(inner, str) and isinstance(json.loads(inner), dict):
            return inner
    except (ValueError, RecursionError):
        pass
    return "{}"


def listed(source: Source, read: Callable[[], Step[None]]) -> Step[None]:
    """Read a list in brackets, each item with `read`."""
    yield from source.expect("[")
    while True:
        yield from read()
        if not (yield from source.accept(",")):
            yield from source.expect("]")
            return


def json_calls(source: Source) -> Step[None]:
    """Read one JSON call, or a list of them."""
    if (yield from source.peek()) == "[":
        yield from listed(source, lambda: json_call(source))
    else:
        yield from json_call(source)


def literal(text: str) -> Any:
    """Parse a value in JSON or in Python's syntax; return other text as it is."""
    for read in (json.loads, ast.literal_eval):
        try:
            value = read(text)
            json.dumps(value, allow_nan=False)
            return value
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            continue
    return text


def typed(source: Source, function: str, key: str, text: str) -> Any:
    """Convert an argument in bare text to the type in the function's schema."""
    schema = source.parameters.get(function, {}).get("properties", {}).get(key)
    types = _types(schema)
    if "null" in types and text.strip().lower() in ("null", "none"):
        return None
    return text if "string" in types else literal(text.strip()) if types else _loose(text)


def _loose(text: str) -> Any:
    """Parse an argument without a type: as a value other than a string if possible, else as text."""
    value = literal(text.strip())
    return text if isinstance(value, str) else value


def _types(schema: Any) -> set[str]:
    if not isinstance(schema, dict):
        return set()
    named = schema.get("type", [])
    types = {named} if isinstance(named, str) else {each for each in named if isinstance(each, str)}
    for part in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
        types |= _types(part)
    if not types and any(isinstance(each, str) for each in schema.get("enum", ())):
        types = {"string"}
    return types
