"""JSON bodies: ambiguous ones are refused."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adapters.strict_json import count_items
from server.errors import InvalidRequest
from server.http.body import parse_body
from server.openai.body import Body
from tests.support.harness import Site


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"a": 1} x', "not valid JSON"),
        (b'{"a": 1, "b": 2, "a": 3}', "'a' twice"),
        (b'[{"x": {"a": 1, "a": 1}}]', "'a' twice"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "-Infinity"),
        (b'{"a": "\xff"}', "UTF-8"),
        (b'{"a": "\xed\xa0\x80"}', "UTF-8"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"\\uDFFF": 1}', "surrogate"),
        (b'{"a": ' + b"9" * 5000 + b"}", "too many digits"),
        (b"[" * 100_000, "deep"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "more than 64 levels deep"),
        (b"\xef\xbb\xbf\xef\xbb\xbf{}", "not valid JSON"),
        (b"{}\xef\xbb\xbf", "not valid JSON"),
        (b'{"a": "\x01"}', "not valid JSON"),
    ],
)
def test_bodies_that_parsers_read_differently_are_refused(raw: bytes, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        parse_body(raw)


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(_JSON, st.booleans())
def test_everything_else_is_read_as_it_is(value: Any, ascii_only: bool) -> None:
    assert parse_body(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


@pytest.mark.parametrize("raw", [b'\xef\xbb\xbf{"a": 1}', b'\xef\xbb\xbf\r\n{"a": 1}\n'])
def test_a_byte_order_mark_is_passed_over(raw: bytes) -> None:
    """.NET and PowerShell write one before the body."""
    assert parse_body(raw) == {"a": 1}


@given(st.binary(max_size=40))
def test_arbitrary_bytes_are_at_most_refused(raw: bytes) -> None:
    try:
        parse_body(raw)
    except InvalidRequest as refusal:
        assert refusal.status == 400  # noqa: PT017


def _items(value: Any) -> int:
    if not isinstance(value, list | dict):
        return 0
    inner = value.values() if isinstance(value, dict) else value
    return max(len(value) * (1 + isinstance(value, dict)), 1) + sum(map(_items, inner))


@given(_JSON, st.booleans())
def test_items_are_counted_without_parsing(value: Any, ascii_only: bool) -> None:
    raw = json.dumps([value], ensure_ascii=ascii_only).encode()
    count = _items([value])
    assert count_items(raw, count) == count
    assert count_items(raw, count - 1) > count - 1


@pytest.mark.parametrize("raw", [b"[" + b"[]," * 2_000_000 + b"1]", b"[" + b'"",' * 2_000_000 + b"1]"])
def test_too_many_items_are_refused_before_they_are_made(raw: bytes) -> None:
    before = time.thread_time()
    with pytest.raises(InvalidRequest, match="more than 1000 elements"):
        parse_body(raw, 1000)
    assert time.thread_time() - before < 0.3


def test_a_key_given_twice_is_found_in_linear_time() -> None:
    raw = b"{" + b",".join(b'"%d":1' % i for i in range(130_000)) + b',"129999":1}'
    before = time.thread_time()
    with pytest.raises(InvalidRequest, match="'129999' twice"):
        parse_body(raw)
    assert time.thread_time() - before < 3


# --- validation stops at the first fault -------------------------------------------------------------


_NOT_VALIDATION = ("json_schema_input_schema", "serialization")


def _schemas(schema: Any) -> Iterator[dict[str, Any]]:
    if isinstance(schema, dict):
        yield schema
        schema = [inner for name, inner in schema.items() if name not in _NOT_VALIDATION]
    if isinstance(schema, list):
        for inner in schema:
            yield from _schemas(inner)


def test_every_list_and_map_of_every_body_ends_at_its_first_fault(tmp_path: Path) -> None:
    with contextlib.closing(Site(tmp_path, lora_dir=tmp_path)) as site:
        kinds: set[type[Body]] = {kind for route in site.app().routes for kind in getattr(route, "bodies", ())}
    assert len(kinds) > 10
    for kind in kinds:
        for schema in _schemas(kind.__pydantic_core_schema__):
            items = schema.get("items_schema", {"type": "any"})  # any: never fails here, validated later
            if schema.get("type") == "list" and items["type"] != "any":
                assert schema.get("fail_fast"), (kind, schema)
            if schema.get("type") == "function-wrap" and schema["schema"]["type"] == "dict":
                schema["schema"]["one by one"] = True
        for schema in _schemas(kind.__pydantic_core_schema__):
            if schema.get("type") == "dict" and schema.get("values_schema", {}).get("type") != "any":
                assert schema.get("one by one"), (kind, schema)


def test_unknown_fields_are_one_fault() -> None:
    class Known(Body):
        known: int = 0

    with pytest.raises(InvalidRequest, match="x0") as refusal:
        Known.validate_object({"known": 1} | {f"x{i}": 1 for i in range(1000)})
    assert refusal.value.param == "x0"
