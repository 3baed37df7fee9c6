"""Qwen3-Coder: `<tool_call><function=NAME><parameter=KEY>value</parameter></function></tool_call>`."""

from server.text.tools.calls import json_call, marked, typed
from server.text.tools.format import ToolFormat
from server.text.tools.hermes import FRAME
from server.text.tools.source import Malformed, Source, Step

_CALL, _FUNCTION = "<tool_call>", "<function="


def _call(source: Source, marker: str) -> Step[None]:
    if marker == _CALL:
        yield from source.space()
    if (yield from source.next()) == "{":  # the layout under a grammar
        yield from json_call(source)
    else:
        if marker == _CALL:
            yield from source.expect(_FUNCTION)
        yield from _function(source)
    yield from source.accept("</tool_call>")


def _function(source: Source) -> Step[None]:
    name = yield from source.name()
    yield from source.expect(">")
    source.begin(name)
    first = True
    while True:
        if not (yield from source.accept("<parameter=")):
            break
        key, _ = yield from source.until(">")
        value, _ = yield from source.until("</parameter>")
        value = value.removeprefix("\n").removesuffix("\n")
        source.write_member(first, key.strip(), typed(source, name, key.strip(), value))
        first = False
    source.close(first)
    if not (yield from source.read_if("</function>")):
        raise Malformed


QWEN3_CODER = ToolFormat(
    "qwen3_coder", (_FUNCTION,), marked(_call, _CALL, _FUNCTION), FRAME, ("<tool_call>", "</tool_call>")
)
