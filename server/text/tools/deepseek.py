"""DeepSeek: V3 and R1 with `function`, the name and fenced JSON, V3.1 with the name and JSON alone."""

from server.text.tools.calls import marked
from server.text.tools.format import Frame, ToolFormat
from server.text.tools.source import Malformed, Source, Step


def _token(name: str) -> str:
    return f"<｜{name.replace(' ', '▁')}｜>"  # the model's own characters


_ALL, _END_ALL = _token("tool calls begin"), _token("tool calls end")
_ONE, _SEPARATOR, _END_ONE = _token("tool call begin"), _token("tool sep"), _token("tool call end")


def _call(source: Source, marker: str) -> Step[None]:
    if marker == _ALL:
        yield from source.space()
        return
    name, _ = yield from source.until(_SEPARATOR)
    if name.strip() == "function":
        name, _ = yield from source.until("\n")
        yield from source.expect("```json")
    if (yield from source.peek()) != "{":
        raise Malformed
    source.begin(name.strip())
    yield from source.value(source.write)
    yield from source.accept("```")
    yield from source.accept(_END_ONE)
    yield from source.accept(_END_ALL)


DEEPSEEK = ToolFormat(
    "deepseek",
    (_ONE,),
    marked(_call, _ALL, _ONE),
    Frame(begin=_ALL, head=_ONE, middle=_SEPARATOR, tail=_END_ONE, end=_END_ALL, marker=_ALL),
    (_ALL, _END_ALL, _ONE, _SEPARATOR, _END_ONE),
    arguments_as_text=True,
)
