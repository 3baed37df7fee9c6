"""Llama 3.2 and 4, and LFM: a list of Python's calls, `[get_weather(city="Rome", days=2), now()]`."""

from collections.abc import Collection

from server.text.tools.calls import json_call, leading, listed, literal, marked
from server.text.tools.format import JSON_LIST, Frame, ToolFormat
from server.text.tools.source import Source, Step


def _calls(source: Source, known: Collection[str] | None) -> Step[None]:
    yield from listed(source, lambda: python_call(source, known))


def python_call(source: Source, known: Collection[str] | None) -> Step[None]:
    """`get_weather(city="Rome", days=2)`, of a function that is `known` if these are given."""
    if (yield from source.peek()) == "{":  # the layout under a grammar
        yield from json_call(source, known)
        return
    name = yield from source.name()
    yield from source.expect("(")
    source.begin(name, known)
    first = True
    while True:
        if (yield from source.accept(")")):
            break
        key = yield from source.name()
        yield from source.expect("=")
        yield from source.space()
        value = yield from source.value_text("\"'", ",")
        source.write_member(first, key, literal(value.strip()))
        first = False
        if not (yield from source.read_if(",")):
            yield from source.expect(")")
            break
    source.close(first)


PYTHONIC = ToolFormat(
    "pythonic",
    ("[func_name1(",),
    leading(lambda source: _calls(source, source.parameters)),
    Frame(**JSON_LIST, begin="[", end="]", free=r"([^\[\s](.|\n)*)?"),
)


def _lfm(source: Source, marker: str) -> Step[None]:
    yield from _calls(source, None)
    yield from source.accept("<|tool_call_end|>")


LFM = ToolFormat(
    "lfm",
    ("<|tool_list_start|>", "<|tool_call_start|>"),
    marked(_lfm, "<|tool_call_start|>"),
    Frame(**JSON_LIST, begin="<|tool_call_start|>[", end="]<|tool_call_end|>", marker="<|tool_call_start|>"),
    ("<|tool_call_start|>", "<|tool_call_end|>"),
)
