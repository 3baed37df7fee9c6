"""All fields that constrain the answer, converted to grammars."""

import json
from typing import Any

import pytest

from server.errors import InvalidRequest, LorakeetError, as_error
from server.messages.protocol import Grammar
from server.openai.grammars import ConstrainedBody

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
TAGS = {"structures": [{"begin": "<f=x>", "schema": SCHEMA, "end": "</f>"}], "triggers": ["<f="]}
JSON = Grammar("json", json.dumps(SCHEMA))
CLOSED = Grammar("json", json.dumps(SCHEMA | {"additionalProperties": False}))
ANY = Grammar("json_object", "")
TAGGED = Grammar("structural_tag", json.dumps({"type": "structural_tag"} | TAGS, separators=(",", ":")))


def spaced(schema: dict[str, Any]) -> Grammar:
    return Grammar("json", json.dumps(schema | {"x-guidance": {"whitespace_pattern": " ?"}}))


UNDERSTOOD: dict[str, tuple[dict[str, Any], Grammar | None]] = {
    "nothing": ({}, None),
    "text": ({"response_format": {"type": "text"}}, None),
    "json_object": ({"response_format": {"type": "json_object"}}, ANY),
    "json_schema": ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}, JSON),
    "strict": (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": SCHEMA, "strict": True, "description": "what"},
            }
        },
        CLOSED,
    ),
    "tags": ({"response_format": {"type": "structural_tag"} | TAGS}, TAGGED),
    "structured json": ({"structured_outputs": {"json": SCHEMA}}, JSON),
    "structured json as text": ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, JSON),
    "structured json, spaced": (
        {"structured_outputs": {"json": SCHEMA, "whitespace_pattern": " ?", "regex": None}},
        spaced(SCHEMA),
    ),
    "structured regex": ({"structured_outputs": {"regex": "a+"}}, Grammar("regex", "a+")),
    "structured choice": ({"structured_outputs": {"choice": ["a", "b"]}}, Grammar("choice", '["a", "b"]')),
    "structured grammar": ({"structured_outputs": {"grammar": 'start: "a"'}}, Grammar("lark", 'start: "a"')),
    "structured json_object": ({"structured_outputs": {"json_object": True}}, ANY),
    "structured json_object, spaced": (
        {"structured_outputs": {"json_object": True, "whitespace_pattern": " ?"}},
        spaced({"type": "object"}),
    ),
    "structured tags": ({"structured_outputs": {"structural_tag": TAGS}}, TAGGED),
    "structured tags as text": ({"structured_outputs": {"structural_tag": json.dumps(TAGS)}}, TAGGED),
    "guided_json": ({"guided_json": SCHEMA}, JSON),
    "guided_json, spaced": ({"guided_json": SCHEMA, "guided_whitespace_pattern": " ?"}, spaced(SCHEMA)),
    "guided_regex": ({"guided_regex": "a+"}, Grammar("regex", "a+")),
    "guided_choice": ({"guided_choice": ["a", "b"]}, Grammar("choice", '["a", "b"]')),
    "guided_grammar": ({"guided_grammar": 'start: "a"'}, Grammar("lark", 'start: "a"')),
}


@pytest.mark.parametrize("name", UNDERSTOOD)
def test_every_way_is_one_grammar(name: str) -> None:
    body, grammar = UNDERSTOOD[name]
    asked = ConstrainedBody.validate_object(body).requested_grammar()
    assert (asked and asked[0]) == grammar
    if asked is not None:
        assert asked[1].replace(".", "_").startswith(next(iter(body))) or asked[1] in body


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown type": ({"response_format": {"type": "xml"}}, "response_format"),
    "no type": ({"response_format": {}}, "response_format"),
    "no name": (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
        "response_format.json_schema.name",
    ),
    "a schema that is none": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": True}}},
        "response_format.json_schema.schema",
    ),
    "two kinds": ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice"),
    "two fields": ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
    "no kind": ({"structured_outputs": {}}, "structured_outputs"),
    "an unknown kind": ({"structured_outputs": {"xml": "a"}}, "structured_outputs.xml"),
    "no choices": ({"guided_choice": []}, "guided_choice"),
    "broken JSON": ({"guided_json": "{"}, "guided_json"),
    "JSON that is no object": ({"guided_json": "true"}, "guided_json"),
    "JSON that is too deep": ({"structured_outputs": {"json": "[" * 100_000}}, "structured_outputs.json"),
    "a tag without its trigger": (
        {"response_format": {"type": "structural_tag"} | TAGS | {"triggers": ["<g="]}},
        "response_format.structures.0.begin",
    ),
    "tags of another form": (
        {"response_format": {"type": "structural_tag", "format": {}}},
        "response_format.structures",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_invalid_constraints_are_refused_by_name(name: str) -> None:
    body, param = REFUSED[name]
    with pytest.raises(Exception) as caught:  # noqa: PT011 - pydantic's or ours
        ConstrainedBody.validate_object(body).requested_grammar()
    error: LorakeetError = as_error(caught.value)
    assert isinstance(error, InvalidRequest)
    assert error.param == param
