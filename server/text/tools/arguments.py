"""Arguments of calls: expected to be a JSON object, although a model without a grammar may write anything."""

import json
import math
import re
from collections.abc import Iterator
from typing import Any

from pydantic_core import from_json

INVALID = "INVALID_JSON"  # Anthropic's key for the text of invalid arguments
_DEEPEST = 100
_LONGEST_NUMBER = 4000  # digits; Python reads 4300

_SPACE = re.compile(r"[ \t\n\r]+")
_WORD = re.compile(r'[^\s,:{}\[\]"]+')
_SCALAR = re.compile(r"true|false|null|-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_WHOLE_PAIR = r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_CHARACTERS = re.compile(rf'(?:[^"\\\x00-\x1f]|\\["\\/bfnrt]|{_WHOLE_PAIR}|\\u(?![dD][89a-fA-F])[0-9a-fA-F]{{4}})+')
_PART_OF_ESCAPE = re.compile(r"\\(?:u[0-9a-fA-F]{0,4}|u[dD][89abAB][0-9a-fA-F]{2}\\(?:u[0-9a-fA-F]{0,3})?)?")


def as_object(text: str) -> dict[str, Any]:
    """Parse arguments for a prompt; truncated ones are closed where they end.

    Text that is no JSON object is put under `INVALID`, as it is.
    """
    if text.strip() in ("", "null"):
        return {}
    try:
        given = from_json(text, allow_partial=True)
        json.dumps(given, allow_nan=False)
    except ValueError:
        given = None
    return given if isinstance(given, dict) else {INVALID: text}


class _Invalid(Exception):
    pass


class ObjectText:
    """Streamed arguments, passed on as long as they are a JSON object.

    The text passed on can be closed at any time: names and commas are held back until a value follows, words until they
    are complete.
    """

    def __init__(self) -> None:
        self._all: list[str] = []
        self._passed: list[str] = []
        self._rest = ""  # arrived, and not read
        self._held = ""  # read, and not passed on
        self._open: list[str] = []  # closing brackets that are due
        self._next = "object"  # or "name or end", "name", "colon", "value", "value or end", "comma or end", "nothing"
        self._string = ""  # "name" or "value" within such a string, else empty
        self._before_string = 0  # pieces passed on before the last value that is a string
        self._valid = True

    def feed(self, text: str) -> str:
        """Add text and return the part that may be passed on."""
        self._all.append(text)
        self._rest += text
        made: list[str] = []
        if self._valid:
            try:
                for piece in self._read():
                    made.append(piece)
                    self._passed.append(piece)
            except _Invalid:
                self._valid = False
        return "".join(made)

    def end(self, *, cut: bool) -> str:
        """Return the rest to pass on: all text as a string under `INVALID` if it is no object; nothing if it is one, or
        the beginning of one in an answer that was `cut` short."""
        if self._next == "nothing" or (cut and self._valid):
            return ""
        first = len(self._passed) < 2
        closing = '"' * (self._string == "value") + "".join(reversed(self._open[1:]))
        opening = "" if self._passed else "{"
        text = json.dumps("".join(self._all), ensure_ascii=False)
        last = f'{closing}{opening}{"" if first else ", "}"{INVALID}": {text}}}'
        self._passed.append(last)
        self._open, self._next = [], "nothing"
        return last

    def object(self) -> dict[str, Any]:
        """Return the object passed on so far, without an incomplete string."""
        pieces = self._passed[: self._before_string] if self._string == "value" and self._open else self._passed
        given: dict[str, Any] = from_json("".join([*pieces, *reversed(self._open)]) or "{}")
        return given

    # --- reading

    def _read(self) -> Iterator[str]:
        while self._rest:
            if self._string:
                characters = _CHARACTERS.match(self._rest)
                if characters is not None:
                    yield from self._emit(self._take(len(characters[0])))
                elif self._rest[0] == '"':
                    yield from self._close_string()
                elif _PART_OF_ESCAPE.fullmatch(self._rest):
                    return
                else:
                    raise _Invalid
            elif (space := _SPACE.match(self._rest)) is not None:
                self._held += self._take(len(space[0]))
            elif (word := _WORD.match(self._rest)) is not None:
                if len(word[0]) == len(self._rest):
                    return  # more of it may come
                yield from self._scalar(self._take(len(word[0])))
            else:
                yield from self._mark(self._take(1))

    def _take(self, count: int) -> str:
        text, self._rest = self._rest[:count], self._rest[count:]
        return text

    def _emit(self, text: str) -> Iterator[str]:
        """Yield text of a string value; hold back that of a name."""
        if self._string == "name":
            self._held += text
        else:
            yield text

    def _value(self, text: str, then: str) -> Iterator[str]:
        if self._next not in ("value", "value or end"):
            raise _Invalid
        self._next = then
        held, self._held = self._held, ""
        yield held + text

    def _scalar(self, word: str) -> Iterator[str]:
        if not _SCALAR.fullmatch(word) or len(word) > _LONGEST_NUMBER:
            raise _Invalid
        if word[-1].isdigit() and math.isinf(float(word)):
            raise _Invalid
        yield from self._value(word, "comma or end")

    def _close_string(self) -> Iterator[str]:
        yield from self._emit(self._take(1))
        self._next = "colon" if self._string == "name" else "comma or end"
        self._string = ""

    def _mark(self, mark: str) -> Iterator[str]:
        match mark, self._next:
            case "{", "object":
                self._open.append("}")
                self._next = "name or end"
                self._held = ""
                yield mark
            case "{" | "[", _:
                yield from self._value(mark, "name or end" if mark == "{" else "value or end")
                self._open.append("}" if mark == "{" else "]")
                if len(self._open) > _DEEPEST:
                    raise _Invalid
            case '"', "name" | "name or end":
                self._held += mark
                self._string = "name"
            case '"', _:
                self._before_string = len(self._passed)
                yield from self._value(mark, "")
                self._string = "value"
            case ":", "colon":
                self._held += mark
                self._next = "value"
            case ",", "comma or end":
                self._held += mark
                self._next = "name" if self._open[-1] == "}" else "value"
            case "}" | "]", "comma or end" | "name or end" | "value or end" if self._open[-1] == mark:
                self._open.pop()
                self._next = "comma or end" if self._open else "nothing"
                held, self._held = self._held, ""
                yield held + mark
            case _:
                raise _Invalid
