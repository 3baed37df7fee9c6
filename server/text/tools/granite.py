"""Granite 3: `<|tool_call|>[{"name": ..., "arguments": {...}}]`. Phi-4-mini: the same, or behind `functools`."""

from server.text.tools.calls import json_calls, marked
from server.text.tools.format import JSON_LIST, Frame, ToolFormat
from server.text.tools.source import Source, Step

_MARKER, _END = "<|tool_call|>", "<|/tool_call|>"


def _calls(source: Source, marker: str) -> Step[None]:
    yield from json_calls(source)
    yield from source.accept(_END)


GRANITE = ToolFormat(
    "granite",
    (_MARKER,),
    marked(_calls, _MARKER),
    Frame(**JSON_LIST, begin=f"{_MARKER}[", end="]", marker=_MARKER),
    (_MARKER,),
)
PHI4 = ToolFormat(
    "phi4",
    ("<|tool|>", "functools["),
    marked(_calls, _MARKER, "functools"),
    Frame(**JSON_LIST, begin=f"{_MARKER}[", end=f"]{_END}", marker=_MARKER),
    (_MARKER, _END),
)
