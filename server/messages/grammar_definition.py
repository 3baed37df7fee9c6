"""Grammars as llguidance's definitions, made by the same rules for the check before admission and for the engine."""

import json
from typing import TYPE_CHECKING, cast

from llguidance import LLMatcher, LLParserLimits, StructTag

from server.messages.gbnf import as_lark
from server.messages.grammar_pattern import portable
from server.messages.grammar_schema import EXACT, exact
from server.messages.protocol import Grammar

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions  # in its stubs only

# Limits of compiling, and of each token's step (14 ms in the lexer at most). Each state takes 2 kB per sequence.
LIMITS = LLParserLimits(max_lexer_states=50_000, verbose_errors=False)
# JSON is written without white space, so that more tokens are forced; a schema's own `x-guidance` can override this.
_COMPACT: "JsonCompileOptions" = {"whitespace_flexible": False}
_EXACT = cast("JsonCompileOptions", EXACT)
_SPACED = {"whitespace_pattern": r"[ \t\n\r]{0,40}"}  # bounded: some models emit spaces forever


def definition(grammar: Grammar) -> str:
    """Return the grammar as llguidance's definition. Raises ValueError when the text does not match its kind."""
    answer = _of_answer(grammar)
    if not grammar.thought:
        return answer
    is_lark = grammar.kind in ("choice", "lark", "structural_tag")
    parts = {"lark_grammar": answer} if is_lark else json.loads(answer)["grammars"][0]
    return json.dumps({"grammars": [{"lark_grammar": grammar.thought}, parts | {"name": "answer"}]})


def _of_answer(grammar: Grammar) -> str:
    text = grammar.text
    match grammar.kind:
        case "json":
            return LLMatcher.grammar_from_json_schema(exact(json.loads(text)), _COMPACT, _EXACT)
        case "json_object":
            return LLMatcher.grammar_from_json_schema({"type": "object", "x-guidance": _SPACED})
        case "regex":
            return LLMatcher.grammar_from_regex(portable(text))
        case "choice":
            return LLMatcher.grammar_from_lark(
                "start: " + " | ".join(json.dumps(choice) for choice in json.loads(text))
            )
        case "lark":
            return LLMatcher.grammar_from_lark(as_lark(text))
        case "structural_tag":
            return LLMatcher.grammar_from_lark(StructTag.to_grammar(_tags(text), assume_special=False))


def _tags(text: str) -> list[StructTag]:
    given = json.loads(text)
    tags = []
    for structure in given["structures"]:
        triggers = [trigger for trigger in given["triggers"] if structure["begin"].startswith(trigger)]
        if not triggers:
            raise ValueError(f"no trigger begins {json.dumps(structure['begin'])}")
        tag = StructTag(
            trigger=max(triggers, key=len),
            begin=structure["begin"],
            grammar={"x-guidance": _COMPACT | EXACT} | exact(structure["schema"]),
            end=structure["end"],
        )
        tags.append(tag)
    return tags
