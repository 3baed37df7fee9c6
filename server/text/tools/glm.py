"""GLM-4.5 and later: `<tool_call>NAME<arg_key>k</arg_key><arg_value>v</arg_value></tool_call>`."""

from server.text.tools.calls import json_call, marked, typed
from server.text.tools.format import ToolFormat
from server.text.tools.hermes import FRAME
from server.text.tools.source import Source, Step

_TAGS = ("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")


def _call(source: Source, marker: str) -> Step[None]:
    if (yield from source.peek()) == "{":  # the layout under a grammar
        yield from json_call(source)
        yield from source.accept("</tool_call>")
    else:
        yield from _named(source)


def _named(source: Source) -> Step[None]:
    name = yield from source.name()
    more = yield from source.accept("<arg_key>")
    if not more:
        yield from source.expect("</tool_call>")
    source.begin(name)
    first = True
    while more:
        key, _ = yield from source.until("</arg_key>")
        yield from source.expect("<arg_value>")
        value, _ = yield from source.until("</arg_value>")
        source.write_member(first, key.strip(), typed(source, name, key.strip(), value))
        first = False
        more = yield from source.accept("<arg_key>")
    source.close(first)
    yield from source.read_if("</tool_call>")


GLM = ToolFormat("glm", ("<arg_key>",), marked(_call, "<tool_call>"), FRAME, _TAGS)
