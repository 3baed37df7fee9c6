"""Grammars compiled on trial: what no engine could follow is refused by its place, and what explodes is ended."""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from server.children.helper import Helpers, HelperTimeout
from server.children.programs.grammar_culprit import culprit
from server.errors import InvalidRequest, Unavailable
from server.messages.protocol import INVALID_GRAMMAR, Grammar
from server.text.grammar_checker import GrammarChecker

SECONDS = 1.5


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def checker() -> AsyncIterator[GrammarChecker]:
    made = GrammarChecker(SECONDS, 128 << 20)
    yield made
    await made.close()


def of_schema(schema: Any) -> Grammar:
    return Grammar("json", json.dumps(schema))


GOOD = [
    of_schema(
        {
            "type": "object",
            "title": "T",
            "examples": [1],
            "properties": {"a": {"$ref": "#/$defs/b"}},
            "$defs": {"b": {}},
        }
    ),
    Grammar("json_object", ""),
    Grammar("regex", "a+"),
    Grammar("choice", json.dumps([f"choice {i}" for i in range(1000)])),
    Grammar("lark", 'start: "a" | <|some_token|>'),
    Grammar("lark", 'root ::= "a"'),
    Grammar(
        "structural_tag", json.dumps({"structures": [{"begin": "<f", "schema": {}, "end": ">"}], "triggers": ["<"]})
    ),
]


@pytest.mark.parametrize("grammar", GOOD)
async def test_a_good_one_gets_its_size_and_is_known_from_then_on(
    grammar: Grammar, checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = await checker.check(grammar, "x")
    assert (checked.kind, checked.text) == (grammar.kind, grammar.text)
    assert 0 < checked.size < 64 << 20
    monkeypatch.setattr(checker._helpers, "ask", None)
    assert await checker.check(grammar, "x") == checked


DEEP = {"type": "object", "properties": {"a": {"type": "array", "items": {"$ref": "#/$defs/b"}}}}
REFUSED: dict[str, tuple[Any, str]] = {
    "uniqueItems": ({"type": "array", "uniqueItems": True}, "/uniqueItems"),
    "deep in it": (DEEP | {"$defs": {"b": {"anyOf": [{}, {"not": {"const": 1}}]}}}, "/$defs/b/anyOf/1/not"),
    "a regex": ({"properties": {"x": {"type": "string", "pattern": "(?=a)"}}}, "/properties/x/pattern"),
    "a format": ({"items": {"type": "string", "format": "regex"}}, "/items/format"),
    "a reference abroad": ({"properties": {"x": {"$ref": "http://example.com/"}}}, "/properties/x/$ref"),
    "a reference to nothing": ({"properties": {"x": {"$ref": "#/$defs/y"}}}, "/properties/x/$ref"),
    "branches that overlap": ({"oneOf": [{"type": "string"}, {"maxLength": 2}]}, "/oneOf"),
    "in a definition, of many": (
        {
            "properties": {"a": {"$ref": "#/$defs/a"}, "z": {"$ref": "#/$defs/z"}},
            "$defs": {
                "a": {"items": {"oneOf": [{"type": "string"}, {"$ref": "#/$defs/b"}]}},
                "b": {"type": "object", "properties": {"uniqueItems": {"$ref": "#/$defs/c"}}},
                "c": {"oneOf": [{"type": "integer"}, {"$ref": "#/$defs/d"}]},
                "d": {"oneOf": [{"type": "string"}, {"const": "oneOf"}]},
                "z": {"type": "string"},
            },
        },
        "/$defs/d/oneOf",
    ),
    "behind a reference": (
        {
            "properties": {"a": {"$ref": "#/definitions/a"}},
            "definitions": {"a": {"items": {"uniqueItems": True, "items": {"$ref": "#/definitions/b"}}}, "b": {}},
        },
        "/definitions/a/items/uniqueItems",
    ),
    "a keyword that some may have": (
        {
            "properties": {"a": {"format": "email"}, "b": {"$ref": "#/$defs/b"}},
            "$defs": {"a": {"minProperties": 1}, "b": {"items": {"format": "regex"}}, "c": {"format": "regex"}},
        },
        "/$defs/b/items/format",
    ),
    "a wrong type": ({"type": "strin"}, "/type"),
    "nothing fits": (
        {"type": "object", "properties": {"x": False}, "required": ["x"]},
        "/required/0",
    ),
    "leniency": ({"uniqueItems": True, "x-guidance": {"lenient": True}}, "/uniqueItems"),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_a_schema_is_refused_by_keyword_and_path(name: str, checker: GrammarChecker) -> None:
    schema, path = REFUSED[name]
    with pytest.raises(InvalidRequest) as caught:
        await checker.check(of_schema(schema), "guided_json")
    assert f"`{path}`" in caught.value.message
    assert caught.value.param == "guided_json" + path.replace("/", ".")
    assert caught.value.code == INVALID_GRAMMAR


@pytest.mark.parametrize(
    "grammar",
    [Grammar("regex", "(a"), Grammar("regex", r"(a)\1"), Grammar("lark", "start: b")],
)
async def test_other_kinds_are_refused_by_field(grammar: Grammar, checker: GrammarChecker) -> None:
    with pytest.raises(InvalidRequest) as caught:
        await checker.check(grammar, "guided_regex")
    assert caught.value.param == "guided_regex"


def chain(length: int) -> dict[str, Any]:
    links = {f"a{i}": {"properties": {"x": {"$ref": f"#/$defs/a{i + 1}"}}} for i in range(length)}
    return {"$ref": "#/$defs/a0", "$defs": links | {f"a{length}": {}}}


HOSTILE: dict[str, tuple[Grammar, str]] = {
    "a cycle of references": (
        of_schema({"$ref": "#/$defs/a", "$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}, {"type": "object"}]}}}),
        "/$defs/a",
    ),
    "a chain of references": (of_schema(chain(20_000)), "/$defs"),
    "a million alternatives": (
        of_schema({"properties": {"x": {"enum": [f"v{i}" for i in range(10**6)]}}}),
        "/properties/x/enum",
    ),
    "a million choices": (Grammar("choice", json.dumps([f"v{i}" for i in range(10**6)])), ""),
    "branches of branches": (
        of_schema(
            {
                "$ref": "#/$defs/a0",
                "$defs": {f"a{i}": {"anyOf": 3 * [{"allOf": 2 * [{"$ref": f"#/$defs/a{i + 1}"}]}]} for i in range(40)}
                | {"a40": {}},
            }
        ),
        "",
    ),
    "patterns that must all hold": (
        of_schema({"allOf": [{"type": "string", "pattern": f".*{c}.*"} for c in "abcdefghijklmnopqrstuvwxyz"]}),
        "/allOf",
    ),
    "nested groups": (Grammar("regex", "(" * 60_000 + "a" + ")" * 60_000), ""),
    "a pattern of nested groups": (
        of_schema({"type": "string", "pattern": "(" * 60_000 + "a" + ")" * 60_000}),
        "/pattern",
    ),
    "nested schemas": (Grammar("json", '{"items":' * 60_000 + "{}" + "}" * 60_000), ""),
    "rules that call rules": (
        Grammar("lark", "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(60_000)) + 'r60000: "a"'),
        "",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
async def test_hostile_ones_are_refused_in_time(name: str, checker: GrammarChecker) -> None:
    grammar, path = HOSTILE[name]
    began = time.monotonic()
    with pytest.raises(InvalidRequest) as caught:
        await checker.check(grammar, "response_format")
    assert time.monotonic() - began < 4 * SECONDS + 30
    assert path in caught.value.message
    assert len(caught.value.message) < 1000
    await checker.check(Grammar("regex", "b"), "x")
    again = time.monotonic()
    with pytest.raises(InvalidRequest):
        await checker.check(grammar, "response_format")
    assert time.monotonic() - again < SECONDS, "a refusal is remembered"


async def test_the_culprit_is_the_first_part_that_breaks_a_schema() -> None:
    def is_refused(schema: Any) -> bool:
        return "bad" in json.dumps(schema)

    assert culprit({"a": [{"x": 1}, {"b": "bad", "c": "bad"}], "d": {"e": "bad"}}, is_refused) == ["a", "1", "b"]
    assert culprit({"$defs": {"e": "bad"}, "z": {"bad": {}}}, is_refused) == ["z", "bad"]
    assert culprit("bad", is_refused) == []


async def test_a_busy_machine_refuses_nothing_for_good(
    checker: GrammarChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def late(*_: object) -> None:
        raise HelperTimeout("takes too long")

    with monkeypatch.context() as busy:
        busy.setattr(Helpers, "ask", late)
        with pytest.raises(Unavailable) as caught:
            await checker.check(Grammar("regex", "a{3}"), "structured_outputs")
    assert "Retry-After" in caught.value.headers
    assert (await checker.check(Grammar("regex", "a{3}"), "structured_outputs")).size > 0


async def test_a_child_that_sleeps_is_late_and_one_that_works_is_at_its_limit() -> None:
    outcomes = []
    for work, seconds in (("import time; time.sleep(30)", 0.5), ("while True: pass", 60)):
        code = f"from server.children.forked import _fork_and_run\ndef work(_):\n    {work}\n"
        code += f"print(_fork_and_run(work, {seconds}, 1, 64 << 20, b'{{}}').decode())"
        ended = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", code], capture_output=True, check=True)
        outcomes.append(next(iter(json.loads(ended.stdout))))
    assert outcomes == ["late", "limit"]
