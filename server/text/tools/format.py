"""Formats of tool calls."""

from collections.abc import Iterable
from dataclasses import dataclass

from server.text.tools.source import Reader


@dataclass(frozen=True)
class Frame:
    """The layout of calls with JSON arguments: `begin`, calls with a `separator` between them, `end`.

    A call is `head`, the function's name, behind `number` (where there is such) the call's number, `middle`, the
    arguments, `tail`.
    """

    head: str
    middle: str
    tail: str
    begin: str = ""
    number: str = ""
    separator: str = ""
    end: str = ""
    marker: str = ""  # the beginning of `begin` + `head`, which identifies calls in free text
    free: str = ""  # without a marker: the regex of an answer without calls

    def written(self, calls: Iterable[tuple[str, str]]) -> str:
        """The calls as (name, arguments)."""
        texts = [
            f"{self.head}{name}{f'{self.number}{i}' if self.number else ''}{self.middle}{arguments}{self.tail}"
            for i, (name, arguments) in enumerate(calls)
        ]
        return self.begin + self.separator.join(texts) + self.end


# Fields of a `Frame` with calls as objects in a JSON list.
JSON_LIST = {"head": '{"name": "', "middle": '", "arguments": ', "tail": "}", "separator": ", "}


@dataclass(frozen=True)
class ToolFormat:
    """The format in which a family of models writes calls.

    Attributes:
        signs: texts, any of which in a chat template identifies the format.
        reader: of answers.
        frame: of calls enforced by a grammar; the reader reads these, too.
        markers: texts that the reader needs, so special tokens among them must be decoded.
        id_length: the only length of calls' ids that the template accepts; None: any.
        id_form: of ids by which the model is told the `{name}` of a call, and its `{number}` in the conversation.
        arguments_as_text: whether the template takes arguments as text, where others take an object.
    """

    name: str
    signs: tuple[str, ...]
    reader: Reader
    frame: Frame
    markers: tuple[str, ...] = ()
    id_length: int | None = None
    id_form: str = ""
    arguments_as_text: bool = False
