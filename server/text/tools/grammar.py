"""The grammar of answers with tool calls: llguidance's Lark, with a JSON Schema for each function's arguments."""

import json
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from server.messages.grammar_schema import EXACT, exact
from server.text.tools.format import Frame

# JSON in the spacing that models were trained on; unsupported keywords of a schema are errors.
_AS_WRITTEN = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "} | EXACT


def as_lark(text: str, tokens: Mapping[str, int]) -> str:
    """Return a text as part of a rule, with its tokens by id."""
    pattern = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)"
    parts = re.split(f"({pattern})", text)
    return " ".join(f"<[{tokens[p]}]>" if p in tokens else json.dumps(p, ensure_ascii=False) for p in parts if p)


def _parted(marker: str, tokens: Mapping[str, int]) -> tuple[str, str, str]:
    """Split a marker at its first token: text before it, the token, text after it."""
    found = [(marker.find(token), token) for token in tokens if token in marker]
    return marker.partition(min(found)[1]) if found else (marker, "", "")


def calls_grammar(
    frame: Frame,
    functions: Sequence[tuple[str, Mapping[str, Any]]],
    tokens: Mapping[str, int],
    *,
    required: bool,
    several: bool,
    answer: Mapping[str, Any] | None,
) -> str:
    """Return the Lark grammar of an answer.

    Args:
        functions: names, and schemas of their arguments.
        tokens: added tokens by text, such as special ones, which tokenising matches first.
        required: whether at least one call is required; otherwise free text may precede or replace it.
        several: whether several calls are allowed.
        answer: the schema of an answer without calls, for formats with a marker; None: free text.
    """

    written = partial(as_lark, tokens=tokens)
    opening = frame.begin + frame.head
    rules = []
    if required or answer is not None:
        first = written(opening)
        other = "" if required else "answer"
    elif frame.marker:
        first = f"opening {written(opening.removeprefix(frame.marker))}"
        before, token, after = _parted(frame.marker, tokens)
        rules.append(
            f"opening: BEFORE <[{tokens[token]}]> {written(after)}\nBEFORE: /(.|\\n)*{re.escape(before)}/"
            if token
            else f"opening[lazy]: TEXT {json.dumps(frame.marker, ensure_ascii=False)}"
        )
        rules.append(r"TEXT: /(.|\n)*/")
        other = "text"
        rules.append("text: TEXT")
    else:
        first, other = written(opening), "text"
        rules.append(f"text: TEXT\nTEXT: /{frame.free}/")
    if answer is not None:
        rules.append(f"answer: {_json(answer)}")
    more = f"({written(frame.separator + frame.head)} call)*" if several else ""
    rules.append(f"calls: {first} call {more} {written(frame.end)}")
    rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(functions))))
    number = f"{written(frame.number)} /[0-9]{{1,4}}/ " if frame.number else ""
    for i, (name, schema) in enumerate(functions):
        rules.append(f"call_{i}: {written(name)} {number}{written(frame.middle)} arguments_{i} {written(frame.tail)}")
        rules.append(f"arguments_{i}: {_json(schema)}")
    start = "start: calls" + (f" | {other}" if other else "")
    return "\n".join(["%llguidance {}", start, *rules]) + "\n"


def _json(schema: Mapping[str, Any]) -> str:
    return "%json " + json.dumps({"x-guidance": _AS_WRITTEN} | exact(schema))
