"""Every keyword of JSON Schema that grammars follow: a schema is refused by name, or what it yields is valid."""

import json
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer

from server.children.programs.grammar_check import _carry_out
from server.engine.engine import Engine
from server.messages.grammar_definition import definition
from server.messages.protocol import Generate, Grammar
from tests.support import interpreter
from tests.support.json_schemas import BY_KEYWORD, drawn, read
from tests.support.offline import load_engine, request, run
from tests.support.tiny import VOCAB

UNSUPPORTED = ["uniqueItems", "not", "contains", "if", "propertyNames", "dependentRequired", "unevaluatedProperties"]
VALUES = {"uniqueItems": True}


@pytest.fixture(scope="module")
def engine(shallow_dir: Path, cache_dir: Path) -> Engine:
    return load_engine(shallow_dir, cache_dir, max_batch_requests=48)


@pytest.fixture(scope="module")
def tokenizer(shallow_dir: Path) -> Tokenizer:
    return Tokenizer.from_file(str(shallow_dir / "tokenizer.json"))


def checked(schema: dict[str, Any]) -> dict[str, Any]:
    """The answer of the process that compiles on trial."""
    return _carry_out({"grammar": {"kind": "json", "text": json.dumps(schema), "size": 0, "thought": ""}, "seconds": 5})


def asked(name: str, schema: dict[str, Any], seed: int, tokenizer: Tokenizer) -> Generate:
    """At a high temperature, with a liking for ends: random weights have none."""
    bias = {tokenizer.token_to_id(end): 3.0 for end in ('"', "}", "]", "<|im_end|>")}
    sampling: dict[str, Any] = {"temperature": 1.5, "max_tokens": 100, "ignore_eos": False, "logprobs": None}
    return request(
        name, [5, 6, 7, seed % 9], grammar=Grammar("json", json.dumps(schema)), seed=seed, logit_bias=bias, **sampling
    )


def invalid(
    engine: Engine, tokenizer: Tokenizer, schemas: dict[str, dict[str, Any]], seeds: range
) -> tuple[set[str], list[Any]]:
    """Names of answers that came to their end, and those among them that are not valid."""
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
    """Of so many schemas of every keyword those that compile; all others are refused by the path of the culprit."""
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
def test_what_cannot_be_followed_is_refused_by_name(keyword: str) -> None:
    answer = checked({"type": "object", "properties": {"a": {keyword: VALUES.get(keyword, {})}}})
    assert answer["path"] == ["properties", "a", keyword]
    assert keyword in answer["error"]


HALF: dict[str, tuple[dict[str, Any], list[str]]] = {
    "names may stand twice": ({"type": "object", "minProperties": 2}, ["minProperties"]),
    "deeper": (
        {"items": {"allOf": [{"minProperties": 3, "required": ["a"]}]}},
        ["items", "allOf", "0", "minProperties"],
    ),
    "a control character": ({"properties": {"a": {"enum": ["b", "\x01"]}}}, ["properties", "a", "enum"]),
    "another": ({"const": "\x7f"}, ["const"]),
}


@pytest.mark.parametrize("name", HALF)
def test_what_would_be_followed_by_half_is_refused(name: str) -> None:
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
    ({"format": "hostname"}, ['"a.b"'], [f'"{"a." * 127}a"']),
]


@pytest.mark.parametrize(("schema", "good", "bad"), ALLOWED, ids=[json.dumps(schema) for schema, _, _ in ALLOWED])
def test_what_is_tightened(schema: dict[str, Any], good: list[str], bad: list[str], tokenizer: Tokenizer) -> None:
    known = LLTokenizer(tokenizer.to_str(), n_vocab=VOCAB, eos_token=2)
    whole = definition(Grammar("json", json.dumps({"type": ["string", "object"]} | schema)))
    for text in good + bad:
        matcher = LLMatcher(known, whole, log_level=0)
        tokens = tokenizer.encode(text).ids
        taken = matcher.try_consume_tokens(tokens)
        assert (taken == len(tokens) and matcher.is_accepting()) == (text in good), text
