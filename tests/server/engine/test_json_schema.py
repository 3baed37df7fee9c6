"""Every keyword of JSON Schema that grammars support: a schema is refused by name, or its outputs are valid."""

import json
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer

from server.children.programs.grammar_check import _run_order
from server.engine.engine import Engine
from server.messages.grammar_definition import definition
from server.messages.protocol import Generate, Grammar
from tests.support import interpreter
from tests.support.json_schemas import BY_KEYWORD, drawn, read
from tests.support.offline import load_engine, request, run
from tests.support.tiny import VOCAB

UNSUPPORTED = ["uniqueItems", "not", "contains", "if", "propertyNames", "dependentRequired", "unevaluatedProperties"]
VALUES: dict[str, Any] = {
    "uniqueItems": True,
    "not": {"type": "string"},
    "propertyNames": {"maxLength": 3},
    "dependentRequired": {"a": ["b"]},
    "unevaluatedProperties": False,
}
OPTIONAL_FILES = {"if": {"then": {"required": ["b"]}}}


@pytest.fixture(scope="module")
def engine(shallow_dir: Path, cache_dir: Path) -> Engine:
    return load_engine(shallow_dir, cache_dir, max_batch_requests=48)


@pytest.fixture(scope="module")
def tokenizer(shallow_dir: Path) -> Tokenizer:
    return Tokenizer.from_file(str(shallow_dir / "tokenizer.json"))


def checked(schema: dict[str, Any]) -> dict[str, Any]:
    """The answer of the trial compilation."""
    return _run_order({"grammar": {"kind": "json", "text": json.dumps(schema), "size": 0, "thought": ""}, "seconds": 5})


def asked(name: str, schema: dict[str, Any], seed: int, tokenizer: Tokenizer) -> Generate:
    """A request with a high temperature and a bias for ending tokens, which random weights rarely draw."""
    bias = {tokenizer.token_to_id(end): 3.0 for end in ('"', "}", "]", "<|im_end|>")}
    sampling: dict[str, Any] = {"temperature": 1.5, "max_tokens": 100, "ignore_eos": False, "logprobs": None}
    return request(
        name, [5, 6, 7, seed % 9], grammar=Grammar("json", json.dumps(schema)), seed=seed, logit_bias=bias, **sampling
    )


def invalid(
    engine: Engine, tokenizer: Tokenizer, schemas: dict[str, dict[str, Any]], seeds: range
) -> tuple[set[str], list[Any]]:
    """Names of finished answers, and the schemas of failed and invalid ones with the error or text."""
    asking = [asked(f"{name}/{seed}", schemas[name], seed, tokenizer) for name in schemas for seed in seeds]
    finished, wrong = set(), []
    for name, answer in run(engine, asking).items():
        schema = schemas[name.rpartition("/")[0]]
        if answer.error is not None:
            wrong.append((schema, answer.error))
        elif answer.finish_reason == "stop":
            finished.add(name)
            text = tokenizer.decode(answer.tokens)
            if not jsonschema_rs.is_valid(schema, read(text), validate_formats=True):
                wrong.append((schema, text))
    return finished, wrong


def place_of(schema: Any, path: list[str]) -> Any:
    for part in path:
        schema = schema[int(part) if isinstance(schema, list) else part]
    return schema


def compiled_ones(each: int) -> dict[str, dict[str, Any]]:
    """Of this many schemas per keyword, those that compile; all others are refused with the path of the culprit."""
    found = {}
    for keyword in BY_KEYWORD:
        for number, schema in enumerate(drawn(keyword, each)):
            answer = checked(schema)
            if "size" in answer:
                found[f"{keyword}/{number}"] = schema
            else:
                assert answer["error"]
                assert answer["path"], (schema, answer)
                place_of(schema, answer["path"])
    return found


@pytest.mark.parametrize("each", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_schema_is_refused_by_its_place_or_its_answers_are_valid(
    each: int, engine: Engine, tokenizer: Tokenizer
) -> None:
    compiled = compiled_ones(each)
    if interpreter.whole_suite():
        compiled = dict(list(compiled.items())[::5])
    finished, wrong = invalid(engine, tokenizer, compiled, range(1))
    assert not wrong
    assert len(finished) > 0.8 * len(compiled)
    if not interpreter.whole_suite():
        assert {name.partition("/")[0] for name in finished} == BY_KEYWORD.keys()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_thousand_finished_answers_are_valid(engine: Engine, tokenizer: Tokenizer) -> None:
    finished, wrong = invalid(engine, tokenizer, compiled_ones(8), range(100, 111))
    assert not wrong
    assert len(finished) >= 1000


@pytest.mark.parametrize("keyword", UNSUPPORTED)
def test_unsupported_keywords_are_refused_by_name(keyword: str) -> None:
    part = {keyword: VALUES.get(keyword, {})} | OPTIONAL_FILES.get(keyword, {})
    answer = checked({"type": "object", "properties": {"a": part}})
    assert answer["path"][:2] == ["properties", "a"]
    assert answer["path"][2] in part
    assert keyword in answer["error"]


SAYING_NOTHING: list[dict[str, Any]] = [
    {"uniqueItems": False},
    {"propertyNames": {"type": "string"}},
    {"propertyNames": True},
    {"unevaluatedProperties": True},
    {"unevaluatedItems": {"description": "any"}},
    {"dependentRequired": {}},
    {"dependencies": {}},
    {"if": {"contains": {}}},
    {"not": False},
    {"then": {"not": {}}},
    {"minContains": 2},
    {"format": "password"},
    {"format": "int32"},
    {"minLength": 1.0, "maxItems": 2.0},
]


@pytest.mark.parametrize("part", SAYING_NOTHING, ids=json.dumps)
def test_keywords_without_effect_are_ignored(part: dict[str, Any]) -> None:
    assert "size" in checked({"type": "object", "properties": {"a": part}, "required": ["a"]})


@pytest.mark.parametrize("name", ["Output Format", "\N{LATIN SMALL LETTER U WITH DIAERESIS}", "a|b"])
def test_an_id_that_nothing_can_refer_to_is_passed_over(name: str) -> None:
    schema = {"properties": {"a": {"$ref": "#/definitions/a"}}, "definitions": {"a": {"type": "integer"}}}
    assert "size" in checked({"$id": name} | schema)
    assert "size" in checked({"$id": "https://example.com/a"} | schema)
    assert checked({"properties": {"a": {"$id": name}}})["path"] == ["properties", "a", "$id"]  # whose references?


@pytest.mark.parametrize("nothing", [{"not": {}}, {"not": True}, {"not": {"description": "any"}}], ids=json.dumps)
def test_a_branch_of_no_value_is_left_out(engine: Engine, tokenizer: Tokenizer, nothing: dict[str, Any]) -> None:
    either = {"anyOf": [nothing, {"type": "string", "enum": ["x", "y"]}]}
    schema = {"type": "object", "properties": {"a": either, "b": nothing}, "required": ["a"]}
    finished, wrong = invalid(engine, tokenizer, {"branch": schema}, range(4))
    assert (len(finished), wrong) == (4, [])
    assert "no text fits" in checked(nothing)["error"] or "atisfiable" in checked(nothing)["error"]


HALF: dict[str, tuple[dict[str, Any], list[str]]] = {
    "names may stand twice": ({"type": "object", "minProperties": 2}, ["minProperties"]),
    "deeper": (
        {"items": {"allOf": [{"minProperties": 3, "required": ["a"]}]}},
        ["items", "allOf", "0", "minProperties"],
    ),
    "a control character": ({"properties": {"a": {"enum": ["b", "\x01"]}}}, ["properties", "a", "enum"]),
    "another": ({"const": "\x7f"}, ["const"]),
    "a format of JSON Schema's": ({"properties": {"a": {"format": "regex"}}}, ["properties", "a", "format"]),
    "a class of Rust's": ({"pattern": "[]a]"}, ["pattern"]),
    "an anchor of Python's": ({"pattern": r"\Aa"}, ["pattern"]),
    "a word's begin": ({"pattern": r"\<a"}, ["pattern"]),
    "a character of Rust's": ({"pattern": r"\x{41}"}, ["pattern"]),
    "a possessive quantifier": ({"pattern": "a++"}, ["pattern"]),
    "names of one kind or of another": (
        {"patternProperties": {r"^\d+$": {"const": 1}}, "additionalProperties": {"const": 2}},
        ["patternProperties"],
    ),
    "a member that says that it is required": (
        {"type": "object", "properties": {"a": {"type": "string", "required": True}}},
        ["properties", "a", "required"],
    ),
}


ENDLESS: dict[str, tuple[dict[str, Any], str]] = {
    "an object in an object": (
        {"$defs": {"a": {"type": "object", "properties": {"b": {"$ref": "#/$defs/a"}}, "required": ["b"]}}},
        "#/$defs/a",
    ),
    "a list in a list": (
        {"$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}, "minItems": 1}}},
        "#/$defs/a",
    ),
    "a reference to itself": ({"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, "#/$defs/a"),
    "too many numbers": ({"type": "integer", "maximum": 79.56, "exclusiveMaximum": -53.861, "multipleOf": 67.1142}, ""),
}


@pytest.mark.parametrize("name", ENDLESS)
def test_schemas_without_a_finite_answer_are_refused(name: str) -> None:
    schema, ref = ENDLESS[name]
    answer = checked(schema | ({"$ref": ref} if ref else {}))
    assert answer["path"]
    place_of(schema, answer["path"])


@pytest.mark.parametrize("name", HALF)
def test_partly_supported_schemas_are_refused(name: str) -> None:
    schema, path = HALF[name]
    answer = checked(schema)
    assert answer["path"][: len(path)] == path
    assert path[-1] in answer["error"]


ALLOWED: list[tuple[dict[str, Any], list[str], list[str]]] = [
    ({"minProperties": 2, "required": ["a"], "additionalProperties": {"const": 1}}, ['{"a":1,"b":1}'], ['{"a":1}']),
    ({"properties": {"a": {"const": 1}}, "required": ["a"]}, ['{"a":1,"b":2}'], [r'{"a":1,"\u0061":2}']),
    ({"const": "a\\u0001"}, [r'"a\\u0001"'], []),
    ({"enum": [{"pattern": "."}]}, ['{"pattern":"."}'], []),
    ({"pattern": r"^\s[^\s]\S[^\S].$"}, ['" ab x"'], ['"\x85ab x"', '" \ufeffb x"', '" ab\u2028x"', '" ab \u2028"']),
    ({"pattern": r"^[.\]]+$"}, ['".]"'], ['"a"']),
    ({"patternProperties": {r"^\s$": {"const": 1}}, "additionalProperties": False}, ['{" ":1}'], ['{"\u1680":1}']),
    ({"format": "date"}, ['"2024-02-29"', '"2000-02-29"', '"1999-12-31"'], ['"2023-02-29"', '"1900-02-29"']),
    ({"format": "date-time"}, ['"2024-02-29T23:59:59Z"'], ['"2023-02-29T23:59:59Z"', '"2024-01-01T23:59:60Z"']),
    ({"format": "time", "allOf": [{"maxLength": 9}]}, ['"23:59:59z"'], ['"23:59:60z"', '"23:59:59+01:00"']),
    ({"format": "email"}, ['"a@b.c"'], [f'"{"a" * 65}@b"', f'"a@{"b" * 64}"']),
    ({"format": "hostname"}, ['"a.b"', '"ab-c.de"'], [f'"{"a." * 127}a"', '"xn--a.b"', '"a.ab--c"']),
    ({"pattern": r"^\d\D\w\W$"}, ['"1ab-"'], ['"٣ab-"', '"1٣b-"', '"1aé-"', '"1abé"']),
    ({"pattern": r"^[\d][^\d][\w][^\w][^\D]$"}, ['"1ab-2"'], ['"٣ab-2"', '"1٣b-2"', '"1aé-2"', '"1abé2"', '"1ab-٣"']),
    ({"pattern": r"^[[:a]$"}, ['"["', '":"', '"a"'], ['"b"']),
    ({"pattern": r"^[a&&b]$"}, ['"a"', '"&"'], ['"c"']),
    ({"pattern": r"^[+--]$"}, ['"+"', '","', '"-"'], ['"."']),
    ({"pattern": r"^[--a]$"}, ['"-"', '"/"', '"a"'], ['","', '"b"']),
    ({"pattern": r"^[^--a]$"}, ['","', '"b"'], ['"-"', '"/"', '"a"']),
    ({"pattern": r"^[a-c--]$"}, ['"b"', '"-"'], ['"."', '"_"']),
    ({"pattern": r'^[^"]*$'}, [r'"a\\\n"'], [r'"\""', r'"a\""']),
    ({"pattern": r"^[^\\]+$"}, [r'"a\"\n"'], [r'"\\"', r'"a\\"']),
    ({"pattern": r'^[^:"\\/]$'}, ['"a"', r'"\t"'], [r'"\""', r'"\\"', '"/"']),
    ({"pattern": r"^[\x00-!#-\x7f]+$"}, ['"a!"', r'"\\"'], [r'"\""']),
    ({"format": "uri", "pattern": r"^[^?]+$"}, ['"a:b"'], ['"a:?b"']),
    ({"patternProperties": {r'^[^"]$': {"const": 1}}}, [r'{"\"":2}', '{"a":1}'], ['{"a":2}']),
    (
        {"$defs": {"a": {"type": "object", "required": ["b"]}}, "oneOf": [{"$ref": "#/$defs/a"}, {"type": "string"}]},
        ['"a"', '{"b":1}'],
        ["{}"],
    ),
    # A name that matches in some engines only.
    ({"patternProperties": {r"^\w$": {"const": 1}}}, ['{"é":1}', '{"-":2}'], ['{"é":2}', '{"a":2}']),
    ({"patternProperties": {r"^\W$": {"const": 1}}}, ['{"é":1}', '{"a":2}'], ['{"é":2}', '{"-":2}']),
    ({"patternProperties": {r"^[^\d]$": {"const": 1}}}, ['{"٣":1}', '{"3":2}'], ['{"٣":2}', '{"a":2}']),
    ({"patternProperties": {r"^.$": {"const": 1}}}, ['{"\u2028":1}', r'{"\n":2}'], ['{"\u2028":2}', '{"a":2}']),
    (
        {"patternProperties": {"^x-.*": {"const": 1}}, "additionalProperties": {"const": 2}},
        ['{"x-\u2028":1}', '{"\u2028":2}'],
        ['{"x-\u2028":2}'],
    ),
    ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, ["0.1", "0.5"], ["0", "0.0"]),
    ({"type": "number", "exclusiveMaximum": -1, "minimum": -1.5}, ["-1.1"], ["-1", "-1.0"]),
    ({"type": "number", "allOf": [{"exclusiveMinimum": 3}, {"maximum": 3.01}]}, ["3.01"], ["3"]),
    ({"type": "integer", "exclusiveMinimum": 0}, ["1"], ["0"]),
    ({"type": "number", "exclusiveMinimum": 0}, ["1", "0.001"], ["0", "-1"]),
    # Bounds generated from types: 64 bits, float, double.
    ({"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}, ["0", "-5", str(2**62)], [str(2**63)]),
    ({"type": "integer", "minimum": 0, "maximum": 2**64 - 1}, ["0", str(2**62)], ["-1", str(2**64)]),
    ({"type": "integer", "exclusiveMinimum": -1e300}, ["0", "-5"], []),
    ({"type": "number", "minimum": -3.4028234663852886e38, "maximum": 3.4028234663852886e38}, ["0", "-1.5"], ["1e39"]),
    ({"type": "number", "exclusiveMaximum": 1.7976931348623157e308}, ["0", "-1.5", str(2**62)], []),
    ({"type": "number", "minimum": 5e-324, "maximum": 1}, ["0.5", "0.001"], ["0", "-1"]),
]


@pytest.mark.parametrize(("schema", "good", "bad"), ALLOWED, ids=[json.dumps(schema) for schema, _, _ in ALLOWED])
def test_schemas_allow_good_and_reject_bad_texts(
    schema: dict[str, Any], good: list[str], bad: list[str], tokenizer: Tokenizer
) -> None:
    known = LLTokenizer(tokenizer.to_str(), n_vocab=VOCAB, eos_token=2)
    whole = definition(Grammar("json", json.dumps({"type": ["string", "object"]} | schema)))
    assert [text for text in good if not jsonschema_rs.is_valid(schema, read(text), validate_formats=True)] == []
    for text in good + bad:
        matcher = LLMatcher(known, whole, log_level=0)
        tokens = tokenizer.encode(text).ids
        taken = matcher.try_consume_tokens(tokens)
        assert (taken == len(tokens) and matcher.is_accepting()) == (text in good), text
