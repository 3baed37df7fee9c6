"""Llama 3.1 to 3.3: an answer of `{"name": ..., "parameters": {...}}`, several separated by `;`."""

from server.text.tools.calls import json_call, leading
from server.text.tools.format import Frame, ToolFormat
from server.text.tools.source import Source, Step

_TAG = "<|python_tag|>"


def _calls(source: Source) -> Step[None]:
    yield from source.read_if(_TAG)
    while True:
        yield from json_call(source, source.parameters)
        if not (yield from source.accept(";")):
            return


LLAMA3_JSON = ToolFormat(
    "llama3_json",
    (_TAG, '{"name": function name, "parameters"'),
    leading(_calls),
    Frame(
        head='{"name": "',
        middle='", "parameters": ',
        tail="}",
        separator="; ",
        free=r"([^{\s](.|\n)*)?",
    ),
    (_TAG,),
)
