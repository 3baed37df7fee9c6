"""FunctionGemma: `<start_function_call>call:NAME{key:<escape>text<escape>,n:2}<end_function_call>`."""

from typing import Any

from server.text.tools.calls import json_call, literal, marked
from server.text.tools.format import Frame, ToolFormat
from server.text.tools.source import Malformed, Source, Step

_MARKER, _END, _QUOTE = "<start_function_call>", "<end_function_call>", "<escape>"
_DEEPEST = 32


def _call(source: Source, marker: str) -> Step[None]:
    yield from source.space()
    if (yield from source.next()) == "{":  # how a grammar has it written
        yield from json_call(source)
    else:
        yield from source.expect("call:")
        name = yield from source.name()
        yield from source.expect("{")
        source.begin(name)
        first = True
        while not (yield from _closes(source, "}", first)):
            key, _ = yield from source.until(":")
            value = yield from _value(source, _DEEPEST)
            source.write_member(first, key.strip(), value)
            first = False
        source.close(first)
    yield from source.space()
    yield from source.follows(_END)


def _closes(source: Source, bracket: str, first: bool) -> Step[bool]:
    """Whether the bracket closes here; otherwise another member follows."""
    yield from source.space()
    if (yield from source.follows(bracket)):
        return True
    if not first:
        yield from source.expect(",")
        yield from source.space()
    return False


def _value(source: Source, depth: int) -> Step[Any]:
    if not depth:
        raise Malformed
    yield from source.space()
    if (yield from source.follows(_QUOTE)):
        text, _ = yield from source.until(_QUOTE)
        return text
    if (yield from source.follows("{")):
        members: dict[str, Any] = {}
        while not (yield from _closes(source, "}", not members)):
            key, _ = yield from source.until(":")
            members[key.strip()] = yield from _value(source, depth - 1)
        return members
    if (yield from source.follows("[")):
        items: list[Any] = []
        while not (yield from _closes(source, "]", not items)):
            items.append((yield from _value(source, depth - 1)))
        return items
    text = yield from source.value_text("", ",")
    return literal(text.strip())


GEMMA = ToolFormat(
    "gemma",
    (_MARKER,),
    marked(_call, _MARKER),
    Frame(head=f'{_MARKER}{{"name": "', middle='", "arguments": ', tail=f"}}{_END}", marker=_MARKER),
    (_MARKER, _END, _QUOTE),
)
