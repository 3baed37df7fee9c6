"""A JSON list of calls between two tags, as in several families, or at the beginning of the answer."""

from server.text.tools.calls import json_call, json_calls, leading, listed, marked
from server.text.tools.format import JSON_LIST, Frame, ToolFormat
from server.text.tools.source import Source, Step


def _format(name: str, begin: str, end: str, call: dict[str, str] = JSON_LIST) -> ToolFormat:
    def calls(source: Source, marker: str) -> Step[None]:
        yield from json_calls(source)
        while (yield from source.peek()) == "{":  # MiniMax M1 writes one call per line
            yield from json_call(source)
        yield from source.accept(end)

    frame = Frame(**call, begin=f"{begin}[", end=f"]{end}", marker=begin)
    return ToolFormat(name, (begin,), marked(calls, begin), frame, (begin, end))


TOOL_CALLS = _format("tool_calls", "<tool_calls>", "</tool_calls>")  # Hunyuan, Apriel, Jamba, MiniMax M1
NEMOTRON = _format("nemotron", "<TOOLCALL>", "</TOOLCALL>")
COHERE = _format(
    "cohere",
    "<|START_ACTION|>",
    "<|END_ACTION|>",
    {"head": '{"tool_name": "', "middle": '", "parameters": ', "tail": "}", "separator": ", "},
)
XLAM = ToolFormat(
    "xlam",
    ('[{"name": "tool_call_name"',),
    leading(lambda source: listed(source, lambda: json_call(source, source.parameters))),
    Frame(**JSON_LIST, begin="[", end="]", free=r"([^\[\s](.|\n)*)?"),
)
