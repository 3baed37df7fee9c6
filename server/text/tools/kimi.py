"""Kimi K2: `<|tool_call_begin|>functions.NAME:0<|tool_call_argument_begin|>{...}<|tool_call_end|>`, in a section."""

import re

from server.text.tools.calls import marked
from server.text.tools.format import Frame, ToolFormat
from server.text.tools.source import Malformed, Source, Step

_ALL, _END_ALL = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
_ONE, _SEPARATOR, _END_ONE = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
_ID = re.compile(r"(?:functions\.)?([^:]+(?::.*[^0-9:].*)?)(?::[0-9]+)?", re.DOTALL)


def _call(source: Source, marker: str) -> Step[None]:
    if marker == _ALL:
        yield from source.expect(_ONE)
    id_, _ = yield from source.until(_SEPARATOR)
    named = _ID.fullmatch(id_.strip())
    if named is None or (yield from source.peek()) != "{":
        raise Malformed
    source.begin(named[1])
    yield from source.value(source.write)
    yield from source.accept(_END_ONE)
    yield from source.accept(_END_ALL)


KIMI = ToolFormat(
    "kimi",
    (_ALL, "<|im_system|>tool_declare"),
    marked(_call, _ALL, _ONE),
    Frame(
        begin=_ALL, head=f"{_ONE}functions.", number=":", middle=_SEPARATOR, tail=_END_ONE, end=_END_ALL, marker=_ALL
    ),
    (_ALL, _END_ALL, _ONE, _SEPARATOR, _END_ONE),
    id_form="functions.{name}:{number}",
)
