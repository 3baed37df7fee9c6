"""gpt-oss: `<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{...}<|call|>`, behind the thought."""

import re

from server.text.tools.calls import marked
from server.text.tools.format import Frame, ToolFormat
from server.text.tools.source import Malformed, Source, Step

_TURN, _COMMENTARY, _MESSAGE = "<|start|>assistant", "<|channel|>commentary", "<|message|>"
_TO = " to=functions."
_NAME = re.compile(r"to=functions\.([\w.:/-]+)")


def _call(source: Source, marker: str) -> Step[None]:
    header, _ = yield from source.until(_MESSAGE)
    found = _NAME.search(marker + header)
    if found is None:  # text beside calls
        source.attempt()
        text, _ = yield from source.until("<|end|>")
        source.emit(text)
        return
    if (yield from source.peek()) != "{":
        raise Malformed
    source.begin(found[1])
    yield from source.value(source.write)
    yield from source.accept("<|call|>")


HARMONY = ToolFormat(
    "harmony",
    ("<|channel|>commentary",),
    marked(_call, f"{_TURN}{_COMMENTARY}", f"{_TURN}{_TO}", _COMMENTARY, _TO),
    Frame(
        head=f"{_COMMENTARY}{_TO}",
        middle=" <|constrain|>json<|message|>",
        tail="<|call|>",
        separator=_TURN,
        marker=f"{_COMMENTARY}{_TO}",
    ),
    ("<|start|>", "<|channel|>", "<|constrain|>", _MESSAGE, "<|call|>", "<|end|>"),
)
