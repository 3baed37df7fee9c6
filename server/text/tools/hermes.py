"""Hermes, Qwen and many others: `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`."""

from server.text.tools.calls import json_call, marked
from server.text.tools.format import Frame, ToolFormat
from server.text.tools.source import Source, Step

FRAME = Frame(
    head='<tool_call>\n{"name": "',
    middle='", "arguments": ',
    tail="}\n</tool_call>",
    separator="\n",
    marker="<tool_call>",
)


def _call(source: Source, marker: str) -> Step[None]:
    yield from json_call(source)
    yield from source.accept("</tool_call>")


HERMES = ToolFormat("hermes", ("<tool_call>",), marked(_call, "<tool_call>"), FRAME, ("<tool_call>", "</tool_call>"))
