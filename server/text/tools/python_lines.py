"""Python calls, one per line, between two tags: MiniCPM 3 (in a fenced block) and OLMo 3."""

from server.text.tools.calls import listed, marked
from server.text.tools.format import JSON_LIST, Frame, ToolFormat
from server.text.tools.pythonic import python_call
from server.text.tools.source import Source, Step


def _format(name: str, signs: tuple[str, ...], begin: str, end: str, fences: tuple[str, str]) -> ToolFormat:
    def calls(source: Source, marker: str) -> Step[None]:
        yield from source.accept(fences[0])
        if (yield from source.peek()) == "[":  # the layout under a grammar
            yield from listed(source, lambda: python_call(source, None))
        else:
            yield from python_call(source, None)
            while (yield from source.peek()) not in ("", "`", "<"):
                yield from python_call(source, None)
        yield from source.accept(fences[1])
        yield from source.accept(end)

    opening, closing = (f"{fence}\n" if fence else "" for fence in fences)
    frame = Frame(**JSON_LIST, begin=f"{begin}\n{opening}[", end=f"]\n{closing}{end}", marker=begin)
    return ToolFormat(name, signs, marked(calls, begin), frame, (begin, end))


_BEGIN = "<|tool_call_start|>"
MINICPM = _format(
    "minicpm",
    ("<|thought_start|>", f"{_BEGIN}\n```python", f"{_BEGIN}\\n```python"),
    _BEGIN,
    "<|tool_call_end|>",
    ("```python", "```"),
)
OLMO3 = _format("olmo3", ("<function_calls>",), "<function_calls>", "</function_calls>", ("", ""))
