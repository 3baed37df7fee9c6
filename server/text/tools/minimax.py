"""MiniMax M2: `<minimax:tool_call><invoke name="NAME"><parameter name="KEY">value</parameter></invoke>`.

M3: a mark before each tag, and arguments in tags of their own names.
"""

import re
from typing import Any

from server.text.tools.calls import marked, typed
from server.text.tools.format import Frame, ToolFormat
from server.text.tools.source import Malformed, Source, Step

_NAME = re.compile(r'\s*name="([^"]+)"')
_MARK = "]<]minimax[>["  # a single token
_ALL, _ALL_M3 = "<minimax:tool_call>", f"{_MARK}<tool_call>"
_MEMBER = re.compile(rf"{re.escape(_MARK)}<([^<>/]+)>(.*?){re.escape(_MARK)}</\1>", re.DOTALL)


def _calls(source: Source, marker: str) -> Step[None]:
    """Read all calls of a block, or a single one without a block."""
    mark = _MARK if marker.startswith(_MARK) else ""
    yield from source.space()
    if not marker.endswith("<invoke"):
        yield from source.expect(f"{mark}<invoke")
    yield from _call(source, mark)
    yield from source.accept(f"{mark}</tool_call>" if mark else "</minimax:tool_call>")


def _call(source: Source, mark: str) -> Step[None]:
    function = yield from _named(source)
    is_json = (yield from source.peek()) == "{"  # the layout under a grammar
    source.begin(function)
    if is_json:
        yield from source.value(source.write)
        yield from source.expect(f"{mark}</invoke>")
        return
    first = True
    while not (yield from source.accept(f"{mark}</invoke>")):
        yield from _member(source, mark, function, first)
        first = False
    source.close(first)


def _member(source: Source, mark: str, function: str, first: bool) -> Step[None]:
    if mark:
        yield from source.expect(f"{mark}<")
        key, _ = yield from source.until(">")
        text, _ = yield from source.until(f"{mark}</{key}>")
    else:
        yield from source.expect("<parameter")
        key = yield from _named(source)
        text, _ = yield from source.until("</parameter>")
    source.write_member(first, key, _value(source, function, key, text))


def _value(source: Source, function: str, key: str, text: str) -> Any:
    """Convert an argument; M3 may write it in tags, too."""
    members = _MEMBER.findall(text)
    if not members:
        return typed(source, function, key, text)
    values = [_value(source, function, "", part) for _, part in members]
    names = [name for name, _ in members]
    return values if set(names) == {"item"} else dict(zip(names, values, strict=True))


def _named(source: Source) -> Step[str]:
    """Read the rest of a tag; return its name."""
    tag, _ = yield from source.until(">")
    found = _NAME.fullmatch(tag)
    if found is None:
        raise Malformed
    return found[1]


MINIMAX = ToolFormat(
    "minimax",
    (_ALL,),
    marked(_calls, _ALL, "<invoke"),
    Frame(
        begin=f"{_ALL}\n",
        head='<invoke name="',
        middle='">\n',
        tail="\n</invoke>",
        separator="\n",
        end="\n</minimax:tool_call>",
        marker=_ALL,
    ),
    (_ALL, "</minimax:tool_call>"),
)
MINIMAX_M3 = ToolFormat(
    "minimax_m3",
    (_MARK,),
    marked(_calls, _ALL_M3, f"{_MARK}<invoke"),
    Frame(
        begin=f"{_ALL_M3}\n",
        head=f'{_MARK}<invoke name="',
        middle='">',
        tail=f"{_MARK}</invoke>",
        separator="\n",
        end=f"\n{_MARK}</tool_call>",
        marker=_ALL_M3,
    ),
    (_MARK, "<tool_call>", "</tool_call>"),
)
