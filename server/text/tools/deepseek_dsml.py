"""DeepSeek V3.2 and later: `<｜DSML｜invoke name="NAME">`, in it a `<｜DSML｜parameter>` for each argument, or JSON."""

import re

from server.text.tools.calls import literal, marked
from server.text.tools.format import Frame, ToolFormat
from server.text.tools.source import Malformed, Source, Step

_SIGN = "｜DSML｜"  # a single token
_ALL, _ALL_LATER, _ONE = f"<{_SIGN}function_calls>", f"<{_SIGN}tool_calls>", f"<{_SIGN}invoke"
_PARAMETER = f"<{_SIGN}parameter"
_END_ALL, _END_ONE, _END_PARAMETER = f"</{_SIGN}function_calls>", f"</{_SIGN}invoke>", f"</{_SIGN}parameter>"
_NAME = re.compile(r'name="([^"]+)"')


def _call(source: Source, marker: str) -> Step[None]:
    yield from source.space()
    if marker != _ONE:
        yield from source.expect(_ONE)
    function, _ = yield from _named(source)
    if (yield from source.peek()) == "{":
        source.begin(function)
        yield from source.value(source.write)
    else:
        yield from _parameters(source, function)
    yield from source.expect(_END_ONE)
    yield from source.space()
    for end in (_END_ALL, _END_ALL.replace("function", "tool")):
        yield from source.read_if(end)


def _named(source: Source) -> Step[tuple[str, str]]:
    """Read a tag; return its name and its text."""
    tag, _ = yield from source.until(">")
    found = _NAME.search(tag)
    if found is None:
        raise Malformed
    return found[1], tag


def _parameters(source: Source, function: str) -> Step[None]:
    first = True
    while (yield from source.read_if(_PARAMETER)):
        name, tag = yield from _named(source)
        if first:
            source.begin(function)
        value, _ = yield from source.until(_END_PARAMETER)
        source.write_member(first, name, value if 'string="true"' in tag else literal(value.strip()))
        first = False
        yield from source.space()
    if first:
        source.begin(function)
    source.close(first)


DEEPSEEK_DSML = ToolFormat(
    "deepseek_dsml",
    (_SIGN,),
    marked(_call, _ALL, _ALL_LATER, _ONE),
    Frame(
        begin=f"{_ALL}\n",
        head=f'{_ONE} name="',
        middle='">\n',
        tail=f"\n{_END_ONE}",
        separator="\n",
        end=f"\n{_END_ALL}",
        marker=_ALL,
    ),
    (_SIGN,),
)
