"""Branches of a `oneOf`: those that exclude each other for certain, and those that may not."""

import json
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.messages.grammar_branches import Branches
from server.messages.grammar_schema import exact

CAT = {"type": "object", "properties": {"kind": {"const": "cat"}}, "required": ["kind"]}
DOG = {"type": "object", "properties": {"kind": {"enum": ["dog", "hound"]}}}
ONLY_A = {"type": "object", "properties": {"a": {}}, "required": ["a"], "additionalProperties": False}
DEFS = {"cat": CAT, "dog": DOG, "either": {"oneOf": [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}]}}
DEFS["loop"] = {"$ref": "#/$defs/loop"}
DEFS["a/b"] = {"type": "null"}
APART: list[list[Any]] = [
    [{"type": "string"}, {"type": ["array", "null"]}, {"type": "number"}],
    [{"$ref": "#/$defs/cat"}, {"$ref": "#/$defs/dog"}],
    [{"$ref": "#/$defs/a~1b"}, {"allOf": [{"$ref": "#/$defs/dog"}], "title": "Dog"}, {"const": "dog"}],
    [{"$ref": "#/$defs/either"}, {"anyOf": [{"type": "string"}, {"type": "null"}]}],
    [{"enum": [1, "a"]}, {"enum": [2, "b"]}, {"const": True}],
    [ONLY_A, {"type": "object", "required": ["b"]}],
    [{"type": "object", "required": ["in"], "properties": {"in": CAT}}, {"type": "object", "properties": {"in": DOG}}],
    [True, False],
    [{"anyOf": [CAT, {"type": "string"}]}, {"oneOf": [DOG, {"type": "null"}]}],
]
TOGETHER: list[list[Any]] = [
    [{}, {"type": "string"}],
    [{"type": "integer"}, {"type": "number"}],
    [{"const": 1}, {"enum": [1.0]}],
    [{"const": {"a": [1]}}, {"const": {"a": [1.0]}}],
    [{"const": 1}, {"type": "number"}],
    [{"type": "object", "required": ["a"]}, {"type": "object", "required": ["b"]}],
    [{"properties": CAT["properties"]}, {"properties": DOG["properties"]}],
    [CAT, {"required": ["kind"], "properties": DOG["properties"], "type": ["object", "null"]}, CAT],
    [ONLY_A, {"type": "object", "required": ["b"]}, {"type": "object"}],
    [ONLY_A | {"patternProperties": {"b": {}}}, {"type": "object", "required": ["b"]}],
    [{"$ref": "#/$defs/loop"}, {"type": "string"}],
    [{"$ref": "#/$defs/nothing"}, {"type": "string"}],
    [{"$ref": "http://example.com/"}, {"type": "string"}],
]


@pytest.mark.parametrize("branches", APART, ids=json.dumps)
def test_branches_that_exclude_each_other_become_those_of_any(branches: list[Any]) -> None:
    assert Branches({"$defs": DEFS}).exclude_each_other(branches)
    schema = {"$defs": DEFS, "properties": {"x": {"oneOf": branches, "anyOf": [{"minLength": 1}]}}}
    made = exact(schema)["properties"]["x"]
    assert "oneOf" not in made
    assert len(made["anyOf"]) == len(branches)
    assert made["allOf"] == [{"anyOf": [{"minLength": 1}]}]


@pytest.mark.parametrize("branches", TOGETHER, ids=json.dumps)
def test_branches_that_may_overlap_are_not_told_apart(branches: list[Any]) -> None:
    assert not Branches({"$defs": DEFS}).exclude_each_other(branches)
    assert "oneOf" in exact({"$defs": DEFS, "oneOf": branches})


def test_references_are_those_of_the_document_that_they_stand_in() -> None:
    inner = {"$id": "http://example.com/", "$defs": {"cat": DOG}, "oneOf": [{"$ref": "#/$defs/cat"}, DOG]}
    schema = {"$defs": DEFS, "allOf": [inner]}
    assert "oneOf" in exact(schema)["allOf"][0]
    assert not Branches({"$defs": {"a": inner | {"type": "null"}}}).exclude_each_other([{"$ref": "#/$defs/a"}, DOG])


def test_what_takes_too_long_is_not_told() -> None:
    branches = [{"type": "object", "properties": {"a": {"const": n}}, "required": ["a"]} for n in range(1000)]
    assert not Branches({}).exclude_each_other(branches)
    assert Branches({}).exclude_each_other(branches[:50])


VALUES: st.SearchStrategy[Any] = st.sampled_from(
    [None, True, 0, 1, 0.5, "a", "b", [], {}, {"k": "a"}, {"k": 1, "l": "b"}, {"l": {"k": "a"}}]
)
SCHEMAS = st.recursive(
    st.booleans()
    | st.fixed_dictionaries({"type": st.sampled_from(["null", "string", "integer", "number", "array", "object"])})
    | st.fixed_dictionaries({"enum": st.lists(VALUES, min_size=1, max_size=3, unique_by=json.dumps)})
    | st.just({"$ref": "#/$defs/a"}),
    lambda parts: (
        st.fixed_dictionaries(
            {"properties": st.dictionaries(st.sampled_from("kl"), parts, max_size=2)},
            optional={
                "type": st.just("object"),
                "required": st.lists(st.sampled_from("kl"), unique=True),
                "additionalProperties": parts,
            },
        )
        | st.dictionaries(st.sampled_from(["anyOf", "oneOf", "allOf"]), st.lists(parts, min_size=1, max_size=2))
    ),
    max_leaves=5,
)


@given(SCHEMAS, SCHEMAS, SCHEMAS)
def test_no_value_fits_two_branches_that_are_told_apart(defined: Any, one: Any, other: Any) -> None:
    root = {"$defs": {"a": True if "$ref" in json.dumps(defined) else defined}}
    if not Branches(root).exclude_each_other([one, other]):
        return
    validators = [jsonschema_rs.validator_for(root | {"allOf": [schema]}) for schema in (one, other)]
    values: list[Any] = [None, True, 0, 1, 0.5, "a", [], {}, {"k": "a"}, {"k": 1, "l": "b"}, {"l": {"k": "a"}}]
    for value in values:
        assert not all(validator.is_valid(value) for validator in validators)


def test_references_below_a_pattern_of_names_belong_to_their_own_document() -> None:
    branches = [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}]
    inner = {"$id": "urn:inner", "oneOf": branches}
    outer = {"$defs": {"a": {"type": "string"}, "b": {"type": "integer"}}}
    for keyword in ("properties", "patternProperties"):
        made = exact(outer | {keyword: {"x": inner}})[keyword]
        assert next(iter(made.values()))["oneOf"] == branches
    assert exact(outer | {"oneOf": branches})["anyOf"] == branches
