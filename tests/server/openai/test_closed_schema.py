"""Objects that have the members which a schema names, and no others."""

from typing import Any

import jsonschema_rs
import pytest

from server.openai.closed_schema import closed

ANY = {"type": "string"}
CLOSED = {"additionalProperties": False}


def named(*names: str, **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": dict.fromkeys(names, ANY), **more}


CLOSES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "an object": (named("a"), named("a") | CLOSED),
    "one without members": (named(), named() | CLOSED),
    "objects in it": (
        named("a") | {"properties": {"a": named("b"), "c": {"type": "array", "items": named("d")}}},
        named("a")
        | {"properties": {"a": named("b") | CLOSED, "c": {"type": "array", "items": named("d") | CLOSED}}}
        | CLOSED,
    ),
    "definitions": (
        {"properties": {"a": {"$ref": "#/$defs/A", "description": "what"}}, "$defs": {"A": named("b")}},
        {"properties": {"a": {"$ref": "#/$defs/A", "description": "what"}}, "$defs": {"A": named("b") | CLOSED}}
        | CLOSED,
    ),
    "alternatives": (
        {"properties": {"a": {"anyOf": [named("b"), {"type": "null"}]}}},
        {"properties": {"a": {"anyOf": [named("b") | CLOSED, {"type": "null"}]}}} | CLOSED,
    ),
    "allOf of one, as older pydantic refers": (
        {"properties": {"a": {"allOf": [{"$ref": "#/$defs/A"}], "title": "A"}}, "$defs": {"A": named("b")}},
        {"properties": {"a": {"allOf": [{"$ref": "#/$defs/A"}], "title": "A"}}, "$defs": {"A": named("b") | CLOSED}}
        | CLOSED,
    ),
    "members by the names of keywords": (
        {"properties": {"allOf": ANY, "properties": named("not")}},
        {"properties": {"allOf": ANY, "properties": named("not") | CLOSED}} | CLOSED,
    ),
    "the outermost object of what is joined": (
        {"properties": {"a": {"allOf": [named("b"), named("c")]}}},
        {"properties": {"a": {"allOf": [named("b"), named("c")]}}} | CLOSED,
    ),
}
STAYS: dict[str, dict[str, Any]] = {
    "any object": {"type": "object"},
    "an object in it without members": named("a", **CLOSED) | {"properties": {"a": named()}},
    "one that says what others are": named("a", additionalProperties=ANY),
    "one that says that there are others": named("a", additionalProperties=True),
    "one that says so in another way": named("a", unevaluatedProperties=ANY),
    "patterns of names": named("a", patternProperties={"^x": ANY}),
    "a member that is required and not described": named("a", required=["a", "b"]),
    "more members than are described": named("a", minProperties=2),
    "joined parts": {"allOf": [named("a"), named("b")]},
    "a part beside the whole": named("a", anyOf=[named("b"), named("c")]),
    "a reference beside the whole": named("a") | {"$ref": "#/$defs/A", "$defs": {"A": named("b")}},
    "one of several": {"oneOf": [named("a", required=["a"]), named("b")]},
    "a condition": named("a") | {"if": named("b"), "then": named("c")},
    "the whole as a part": named("a") | {"properties": {"a": {"allOf": [{"$ref": "#"}, named("b")]}}},
    "data that looks like a schema": {"const": named("a"), "default": named("a")},
}


@pytest.mark.parametrize("name", CLOSES)
def test_what_is_named_is_all_there_is(name: str) -> None:
    schema, expected = CLOSES[name]
    assert closed(schema) == expected


@pytest.mark.parametrize("name", STAYS)
def test_what_may_have_other_members_stays_open(name: str) -> None:
    assert closed(STAYS[name]) == STAYS[name]


@pytest.mark.parametrize(
    "instance",
    [
        {},
        {"a": "x"},
        {"a": "x", "b": "y"},
        {"b": "y"},
        {"c": 1},
        {"a": {"b": "y"}},
        {"a": {"b": "y", "c": "z"}},
        {"a": None},
    ],
)
def test_nothing_matches_that_did_not_match_before(instance: dict[str, Any]) -> None:
    for schema in [schema for schema, _ in CLOSES.values()] + list(STAYS.values()):
        if jsonschema_rs.is_valid(closed(schema), instance):
            assert jsonschema_rs.is_valid(schema, instance)
