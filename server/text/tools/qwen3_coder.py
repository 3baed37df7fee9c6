"""Qwen3-Coder: `<tool_call><function=NAME><parameter=KEY>value</parameter></function></tool_call>`; Seed-OSS alike."""

from dataclasses import replace

from server.text.tools.calls import json_call, marked, typed
from server.text.tools.format import ToolFormat
from server.text.tools.hermes import FRAME
from server.text.tools.source import Malformed, Source, Step

_FUNCTION = "<function="


def _format(name: str, signs: tuple[str, ...], begin: str, end: str) -> ToolFormat:
    def call(source: Source, marker: str) -> Step[None]:
        if marker == begin:
            yield from source.space()
        if (yield from source.next()) == "{":  # the layout under a grammar
            yield from json_call(source)
        else:
            if marker == begin:
                yield from source.expect(_FUNCTION)
            yield from _function(source)
        yield from source.accept(end)

    frame = replace(FRAME, head=f'{begin}\n{{"name": "', tail=f"}}\n{end}", marker=begin)
    return ToolFormat(name, signs, marked(call, begin, _FUNCTION), frame, (begin, end))


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


QWEN3_CODER = _format("qwen3_coder", (_FUNCTION,), "<tool_call>", "</tool_call>")
SEED = _format("seed", ("<seed:tool_call>",), "<seed:tool_call>", "</seed:tool_call>")
