"""FunctionGemma: `<start_function_call>call:NAME{key:<escape>text<escape>,n:2}<end_function_call>`; Gemma 4 alike."""

from typing import Any

from server.text.tools.calls import json_call, literal, marked
from server.text.tools.format import Frame, ToolFormat
from server.text.tools.source import Malformed, Source, Step

_DEEPEST = 32


def _format(name: str, marker: str, end: str, quote: str) -> ToolFormat:
    def call(source: Source, marker: str) -> Step[None]:
        if (yield from source.peek()) == "{":  # the layout under a grammar
            yield from json_call(source)
        else:
            yield from source.expect("call:")
            function = yield from source.name()
            yield from source.expect("{")
            source.begin(function)
            first = True
            while not (yield from _closes(source, "}", first)):
                key, _ = yield from source.until(":")
                value = yield from _value(source, quote, _DEEPEST)
                source.write_member(first, key.strip(), value)
                first = False
            source.close(first)
        yield from source.accept(end)

    frame = Frame(head=f'{marker}{{"name": "', middle='", "arguments": ', tail=f"}}{end}", marker=marker)
    return ToolFormat(name, (marker,), marked(call, marker), frame, (marker, end, quote))


def _closes(source: Source, bracket: str, first: bool) -> Step[bool]:
    """Read the bracket, or a comma before another member; return whether it was the bracket."""
    if (yield from source.accept(bracket)):
        return True
    if not first:
        yield from source.expect(",")
        yield from source.space()
    return False


def _value(source: Source, quote: str, depth: int) -> Step[Any]:
    if not depth:
        raise Malformed
    if (yield from source.accept(quote)):
        text, _ = yield from source.until(quote)
        return text
    if (yield from source.read_if("{")):
        members: dict[str, Any] = {}
        while not (yield from _closes(source, "}", not members)):
            key, _ = yield from source.until(":")
            members[key.strip()] = yield from _value(source, quote, depth - 1)
        return members
    if (yield from source.read_if("[")):
        items: list[Any] = []
        while not (yield from _closes(source, "]", not items)):
            items.append((yield from _value(source, quote, depth - 1)))
        return items
    text = yield from source.value_text("", ",")
    return literal(text.strip())


GEMMA = _format("gemma", "<start_function_call>", "<end_function_call>", "<escape>")
GEMMA4 = _format("gemma4", "<|tool_call>", "<tool_call|>", '<|"|>')
