"""A parser of tool calls in streamed text.

A format's reader is a generator: sequential code that yields wherever it needs more text, so that its result is
independent of the pieces.
"""

import json
import re
from collections.abc import Callable, Collection, Generator
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
NAME = r"[A-Za-z0-9_.:/-]{1,128}"  # function names
_NAME, _IN_NAME = re.compile(NAME), re.compile(r"[A-Za-z0-9_.:/-]*")
Step = Generator[None, None, T]


@dataclass(frozen=True, slots=True)
class Text:
    """Text outside of calls."""

    text: str


@dataclass(frozen=True, slots=True)
class Begin:
    """The beginning of a call of this function."""

    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """A further piece of the last call's arguments, in JSON."""

    text: str


@dataclass(frozen=True, slots=True)
class Thought:
    """A piece of the thought before the answer."""

    text: str


Event = Text | Begin | Arguments | Thought


class Malformed(Exception):  # caught by every reader
    """The text is no call of the format."""


class Source:
    """The unread text, and the events made by reading.

    Args:
        parameters: JSON Schemas of the functions' arguments, by the functions' names.
        calls_only: whether a grammar allows nothing but calls.

    Attributes:
        cut: whether the answer ended before it was complete.
        thinking: whether the next text is a thought; None while unknown.
        silent: texts that are left out everywhere.
    """

    def __init__(self, parameters: dict[str, dict[str, Any]], *, calls_only: bool = False) -> None:
        self.parameters = parameters
        self.buffer = ""
        self.ended = self.cut = False
        self.events: list[Event] = []
        self.thinking: bool | None = None
        self.silent: tuple[str, ...] = ()
        self._calls_only = calls_only
        self._attempt: str | None = None  # read since a possible beginning of a call; becomes text if it is none
        self._certain = False  # whether the next text certainly belongs to a call
        self._exhausted = False  # whether reading reached the end of the answer
        self._spaces = ""  # white space at the end of the text, dropped if a call follows
        self._called = False
        self._begins = False  # whether to drop white space before the next text

    # --- events

    def emit(self, text: str) -> None:
        """Add text outside of calls, without white space around calls and after a thought."""
        if self._calls_only and self.cut:
            return  # an incomplete marker, or character of one
        text = self._spaces + text
        if self._begins:
            text = text.lstrip()
        shown = text.rstrip()
        self._spaces = text[len(shown) :]
        if shown:
            self._begins = self._certain = False
            self.events.append(Text(shown))

    def begin(self, name: Any, known: Collection[str] | None = None) -> None:
        """Begin a call. Raises Malformed for a name that no function can have, or that is not among `known`."""
        if not isinstance(name, str) or not _NAME.fullmatch(name) or (known is not None and name not in known):
            raise Malformed
        self._spaces, self._attempt = "", None
        self._called = self._begins = self._certain = True
        self.events.append(Begin(name))

    def write(self, text: str) -> None:
        """Add text to the call's arguments."""
        if text:
            self.events.append(Arguments(text))

    def write_member(self, first: bool, key: str, value: Any) -> None:
        """Add one of the call's arguments; `close` ends them."""
        self.write(("{" if first else ", ") + f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}")

    def close(self, empty: bool) -> None:
        """End arguments added by `write_member`; `empty`: there were none."""
        self.write("{}" if empty else "}")

    def abandon_call(self) -> None:
        """Turn the text of an attempt that is no call into text; drop it if it is the truncated beginning of a call."""
        attempt, self._attempt = self._attempt, None
        if self.cut and self._exhausted and (self._certain or self._calls_only):
            self.buffer = ""
        else:
            self.emit(attempt or "")

    def finish(self) -> None:
        """End the answer: emit trailing white space, unless there were calls."""
        if self._spaces and not self._called:
            self.events.append(Text(self._spaces))

    # --- reading

    def attempt(self) -> None:
        """Start to record text that may be a call."""
        self._attempt, self._certain = "", False

    def wait_for_text(self) -> Step[bool]:
        """Wait for more text; return False at the end of the answer."""
        size = len(self.buffer)
        while not self.ended and len(self.buffer) == size:
            yield
        self._exhausted = len(self.buffer) == size
        return not self._exhausted

    def take(self, count: int) -> str:
        """Read the next characters."""
        text, self.buffer = self.buffer[:count], self.buffer[count:]
        if self._attempt is not None:
            self._attempt += text
        return text

    def text(self, *markers: str) -> Step[str | None]:
        """Read text up to and including the next marker. Return the marker; None at the end."""
        self._attempt = None
        markers += self.silent
        while True:
            found = [(at, marker) for marker in markers if (at := self.buffer.find(marker)) >= 0]
            if found:
                at, marker = min(found)
                self.emit(self.take(at))
                if marker in self.silent:
                    self.take(len(marker))
                    self._spaces, self._begins = "", True
                    continue
                self.attempt()
                self._certain = True
                return self.take(len(marker)) and marker
            held = max((_overlap(self.buffer, marker) for marker in markers), default=0)
            self.emit(self.take(len(self.buffer) - held))
            if not (yield from self.wait_for_text()):
                rest = self.take(held)
                self.emit("" if self.cut and (self._certain or self._calls_only) else rest)
                return None

    def thought(self, end: str) -> Step[None]:
        """Read a thought up to and including its end mark; drop white space around it."""
        self.thinking, self._attempt = True, None
        spaces, begun = "", False
        while True:
            at = self.buffer.find(end)
            held = 0 if self.ended else _overlap(self.buffer, end)
            text = spaces + self.take(at if at >= 0 else len(self.buffer) - held)
            text = text if begun else text.lstrip()
            shown = text.rstrip()
            spaces = text[len(shown) :]
            if shown:
                begun = True
                self.events.append(Thought(shown))
            if at >= 0:
                self.take(len(end))
                self.thinking, self._begins = False, True
                return
            if self.ended:
                return
            yield from self.wait_for_text()

    def space(self) -> Step[None]:
        """Skip white space."""
        while True:
            self.take(len(self.buffer) - len(self.buffer.lstrip()))
            if self.buffer or not (yield from self.wait_for_text()):
                return

    def read_if(self, literal: str) -> Step[bool]:
        """Read this if it comes next, and return whether it did. At a cut answer's end, also read its beginning."""
        while len(self.buffer) < len(literal) and literal.startswith(self.buffer):
            if not (yield from self.wait_for_text()):
                if self.cut:
                    self.take(len(self.buffer))
                return False
        return self.buffer.startswith(literal) and bool(self.take(len(literal)))

    def accept(self, literal: str) -> Step[bool]:
        """Skip white space, then as `read_if`."""
        yield from self.space()
        return (yield from self.read_if(literal))

    def expect(self, literal: str) -> Step[None]:
        """Skip white space, then read this. Raises Malformed if something else comes."""
        if not (yield from self.accept(literal)):
            raise Malformed

    def next(self) -> Step[str]:
        """Return the next character without reading it; empty at the end."""
        if not self.buffer:
            yield from self.wait_for_text()
        return self.buffer[:1]

    def peek(self) -> Step[str]:
        """Skip white space, then as `next`."""
        yield from self.space()
        return (yield from self.next())

    def name(self) -> Step[str]:
        """Read a function's name. Raises Malformed if there is none."""
        parts: list[str] = []
        while True:
            part = _IN_NAME.match(self.buffer)
            parts.append(self.take(part.end() if part else 0))
            if self.buffer or not (yield from self.wait_for_text()):
                if not any(parts):
                    raise Malformed
                return "".join(parts)

    def until(self, *ends: str) -> Step[tuple[str, str]]:
        """Read up to and including the first of these; return the text before it, and it."""
        start, longest = 0, max(map(len, ends))
        while True:
            found = [(at, end) for end in ends if (at := self.buffer.find(end, start)) >= 0]
            if found:
                at, end = min(found)
                text = self.take(at)
                return text, self.take(len(end))
            start = max(0, len(self.buffer) - longest + 1)
            if not (yield from self.wait_for_text()):
                raise Malformed

    def value(self, write: Callable[[str], None], quotes: str = '"', ends: str = ",:; \t\r\n") -> Step[None]:
        """Read one value in JSON or in Python's syntax, and pass its pieces to `write`.

        Args:
            quotes: characters that begin a string.
            ends: characters that end a value, besides closing brackets.
        """
        depth, at, quote, escaped, ended = 0, 0, "", False, False
        while True:
            while at < len(self.buffer) and not ended:
                c = self.buffer[at]
                if quote:
                    closes = c == quote and not escaped
                    escaped = c == "\\" and not escaped
                    quote = "" if closes else quote
                    ended = closes and not depth and quotes == '"'
                elif c in quotes:
                    quote = c
                elif c in "{[(":
                    depth += 1
                elif not depth and c in f"{ends}}}])":
                    break
                elif c in "}])":
                    depth -= 1
                    ended = not depth and quotes == '"'
                at += 1
            stopped = at < len(self.buffer)
            write(self.take(at))
            if ended or stopped:
                return
            at = 0
            if not (yield from self.wait_for_text()):
                if depth or quote:
                    raise Malformed
                return

    def value_text(self, quotes: str = '"', ends: str = ",:; \t\r\n") -> Step[str]:
        """Read one value, as `value`, and return its text."""
        parts: list[str] = []
        yield from self.value(parts.append, quotes, ends)
        return "".join(parts)

    def json(self) -> Step[Any]:
        """Read and parse one JSON value."""
        text = yield from self.value_text()
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            raise Malformed from None


def _overlap(text: str, marker: str) -> int:
    """Return the number of characters at the text's end that may be the marker's beginning."""
    return next((n for n in range(min(len(text), len(marker) - 1), 0, -1) if text.endswith(marker[:n])), 0)


Reader = Callable[[Source], Step[None]]


class Parser:
    """A parser of one answer, from pieces of text to events.

    Args:
        calls_only: whether a grammar allows nothing but calls.
    """

    def __init__(self, reader: Reader, parameters: dict[str, dict[str, Any]], *, calls_only: bool = False) -> None:
        self._source = Source(parameters, calls_only=calls_only)
        self._steps = reader(self._source)

    @property
    def thinking(self) -> bool | None:
        """Whether the next text is a thought; None while unknown."""
        return self._source.thinking

    def feed(self, text: str, *, last: bool = False, cut: bool = False) -> list[Event]:
        """Add text and return its events. `last`: the answer ends here; `cut`: because of its maximal length."""
        source = self._source
        source.buffer += text
        source.ended, source.cut = last, cut
        next(self._steps, None)
        if last:
            source.finish()
        events, source.events = source.events, []
        return events
