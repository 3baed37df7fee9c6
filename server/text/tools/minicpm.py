"""MiniCPM 3: Python's calls on lines of their own, in a fenced block between `<|tool_call_start|>` and its end."""

from server.text.tools.calls import listed, marked
from server.text.tools.format import JSON_LIST, Frame, ToolFormat
from server.text.tools.pythonic import python_call
from server.text.tools.source import Source, Step

_MARKER, _END, _FENCE = "<|tool_call_start|>", "<|tool_call_end|>", "```"


def _calls(source: Source, marker: str) -> Step[None]:
    yield from source.accept(f"{_FENCE}python")
    if (yield from source.peek()) == "[":  # how a grammar has them written
        yield from listed(source, lambda: python_call(source, None))
    else:
        yield from python_call(source, None)
        while (yield from source.peek()) not in ("", _FENCE[0], _END[0]):
            yield from python_call(source, None)
    yield from source.accept(_FENCE)
    yield from source.accept(_END)


MINICPM = ToolFormat(
    "minicpm",
    ("<|thought_start|>", f"{_MARKER}\n{_FENCE}python", f"{_MARKER}\\n{_FENCE}python"),
    marked(_calls, _MARKER),
    Frame(**JSON_LIST, begin=f"{_MARKER}\n{_FENCE}python\n[", end=f"]\n{_FENCE}\n{_END}", marker=_MARKER),
    (_MARKER, _END),
)
