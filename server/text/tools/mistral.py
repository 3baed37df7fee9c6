"""Mistral: `[TOOL_CALLS][{"name": ..., "arguments": {...}}]`; since 2025, `[TOOL_CALLS]name[ARGS]{...}` for each."""

from server.text.tools.calls import json_calls, marked
from server.text.tools.format import JSON_LIST, Frame, ToolFormat
from server.text.tools.source import Malformed, Source, Step

_MARKER = "[TOOL_CALLS]"


def _calls(source: Source, marker: str) -> Step[None]:
    if (yield from source.peek()) in "[{":
        yield from json_calls(source)
        return
    name = yield from source.name()
    if (yield from source.read_if("[CALL_ID]")):
        yield from source.name()
    yield from source.read_if("[ARGS]")
    if (yield from source.peek()) != "{":
        raise Malformed
    source.begin(name)
    yield from source.value(source.write)


MISTRAL = ToolFormat(
    "mistral",
    (_MARKER, "[AVAILABLE_TOOLS]"),
    marked(_calls, _MARKER),
    Frame(**JSON_LIST, begin=f"{_MARKER}[", end="]", marker=_MARKER),
    (_MARKER, "[ARGS]", "[CALL_ID]"),
    id_length=9,
)
MISTRAL_ARGS = ToolFormat(
    "mistral_args",
    ("[ARGS]",),
    MISTRAL.reader,
    Frame(head=_MARKER, middle="[ARGS]", tail="", marker=_MARKER),
    MISTRAL.markers,
    id_length=9,
)
