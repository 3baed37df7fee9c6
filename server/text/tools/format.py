"""What a format of tool calls is."""

from collections.abc import Iterable
from dataclasses import dataclass

from server.text.tools.source import Reader


@dataclass(frozen=True)
class Frame:
    """How calls whose arguments are JSON are written: `begin`, calls with a `separator` between them, `end`.

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
    marker: str = ""  # the beginning of `begin` and `head`, by which calls in free text are known
    free: str = ""  # without a marker: the regex of an answer that has no calls

    def written(self, calls: Iterable[tuple[str, str]]) -> str:
        """Calls, as names and arguments."""
        texts = [
            f"{self.head}{name}{f'{self.number}{i}' if self.number else ''}{self.middle}{arguments}{self.tail}"
            for i, (name, arguments) in enumerate(calls)
        ]
        return self.begin + self.separator.join(texts) + self.end


# Of a `Frame` whose calls are objects in a JSON list.
JSON_LIST = {"head": '{"name": "', "middle": '", "arguments": ', "tail": "}", "separator": ", "}


@dataclass(frozen=True)
class ToolFormat:
    """How a family of models calls functions.

    Attributes:
        signs: texts by any of which a chat template is known to be of this format.
        reader: of the answer.
        frame: of calls that a grammar enforces; the reader reads these, too.
        markers: special tokens that the reader has to see.
        id_length: of the ids of calls that the template takes, if it takes no others.
        id_form: of ids by which the model is told the `{name}` of a call, and its `{number}` in the conversation.
        arguments_as_text: the template joins arguments to text, where others want an object.
    """

    name: str
    signs: tuple[str, ...]
    reader: Reader
    frame: Frame
    markers: tuple[str, ...] = ()
    id_length: int | None = None
    id_form: str = ""
    arguments_as_text: bool = False
