"""Grammars of calls: each format's own frame, with and without special tokens."""

import json
from functools import cache
from typing import Any

import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken, Tokenizer

from server.messages.grammar_definition import definition
from server.messages.protocol import Grammar
from server.text.tools.grammar import calls_grammar
from server.text.tools.table import FORMATS
from tests.support.tiny import _tokenizer

WEATHER: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "unit": {"enum": ["C", "F"]}},
    "required": ["city"],
    "additionalProperties": False,
}
NOTHING: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
FUNCTIONS = [("get_weather", WEATHER), ("now", NOTHING)]


@cache
def tokenizer_of(name: str, kind: str) -> Tokenizer:
    """The tiny one, with the format's markers as tokens: special, added or none."""
    tokenizer = Tokenizer.from_str(_tokenizer().backend_tokenizer.to_str())
    if kind != "text":
        special = kind == "special"
        tokenizer.add_tokens([AddedToken(marker, special=special) for marker in FORMATS[name].markers])
    return tokenizer


def follows(name: str, kind: str, text: str, answer: Any = None, *, required: bool, several: bool) -> bool:
    """Whether the grammar takes the text as a whole answer."""
    tokenizer = tokenizer_of(name, kind)
    tokens = {token.content: id_ for id_, token in tokenizer.get_added_tokens_decoder().items()}
    tokens = {marker: tokens[marker] for marker in FORMATS[name].markers if marker in tokens}
    lark = calls_grammar(FORMATS[name].frame, FUNCTIONS, tokens, required=required, several=several, answer=answer)
    matcher = LLMatcher(LLTokenizer(tokenizer.to_str(), eos_token=2), definition(Grammar("lark", lark)), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


def written(name: str, *calls: tuple[str, Any]) -> str:
    """As the format has it."""
    return FORMATS[name].frame.written((function, json.dumps(value)) for function, value in calls)


ONE = ("get_weather", {"city": 'R}"o', "unit": "C"})
TWO: tuple[tuple[str, Any], ...] = (ONE, ("now", {}))
WRONG: list[tuple[str, Any]] = [
    ("get_weather", {"unit": "C"}),
    ("get_weather", {"city": 5}),
    ("get_weather", {"city": "Rome", "days": 1}),
    ("now", {"city": "Rome"}),
    ("later", {}),
]


@pytest.mark.parametrize("kind", ["text", "added", "special"])
@pytest.mark.parametrize("name", FORMATS)
def test_calls_and_nothing_else(name: str, kind: str) -> None:
    assert follows(name, kind, written(name, ONE), required=True, several=True)
    assert follows(name, kind, written(name, *TWO), required=True, several=True)
    assert follows(name, kind, written(name, ONE), required=True, several=False)
    assert not follows(name, kind, written(name, *TWO), required=True, several=False)
    assert not follows(name, kind, "I would rather not.", required=True, several=True)
    for wrong in WRONG:
        assert not follows(name, kind, written(name, wrong), required=True, several=True), wrong


@pytest.mark.parametrize("kind", ["text", "added", "special"])
@pytest.mark.parametrize("name", FORMATS)
def test_free_text_until_a_call(name: str, kind: str) -> None:
    before = "I look: {\n" if FORMATS[name].frame.marker else ""
    for text in ("", "It is < 5 degrees.\n", before, before + written(name, ONE), before + written(name, *TWO)):
        assert follows(name, kind, text, required=False, several=True), text
    assert not follows(name, kind, before + written(name, *TWO), required=False, several=False)
    for wrong in WRONG:
        assert not follows(name, kind, before + written(name, wrong), required=False, several=True), wrong


@pytest.mark.parametrize("name", [name for name in FORMATS if FORMATS[name].frame.marker])
def test_a_call_or_an_answer_of_a_schema(name: str) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    for text, allowed in (('{"ok": true}', True), ('{"ok": 1}', False), ("yes", False), (written(name, ONE), True)):
        assert follows(name, "special", text, schema, required=False, several=True) == allowed, text
