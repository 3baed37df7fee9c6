"""From an engine's token ids to what a client sees of one sequence: text, logprobs, the reason it ended.

The engine knows ids only. Here they become text, stop strings are found, and the list of logprobs is cut where the text
is. No I/O and no HTTP.
"""

from collections import deque
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from server.messages.protocol import Output, TokenLogprob
from server.text.reasoning import ThoughtTokens
from server.text.streaming import Detokenizer, StopStrings


@dataclass(frozen=True, slots=True)
class Entry:
    """One token's logprobs and where its text starts, in characters of this sequence's text."""

    offset: int
    logprob: TokenLogprob


@dataclass(frozen=True, slots=True)
class Piece:
    """What one output adds to a sequence."""

    text: str
    entries: list[Entry] = field(default_factory=list)  # empty unless logprobs were asked for
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: int | str | None = None  # the stop token or stop string that the client named
    prompt_logprobs: Sequence[TokenLogprob | None] = ()  # the whole prompt's, on the first piece of its sample 0
    tokens: Sequence[int] = ()  # its ids, if they were asked for; text that is held back comes later than these

    def __bool__(self) -> bool:
        """Whether there is anything to send."""
        return bool(self.text or self.entries or self.finish_reason or self.prompt_logprobs or self.tokens)


class Assembler:
    """One sequence's text in the making.

    Args:
        decode: token ids -> text.
        prompt: the prompt's ids, the left context of the first new token.
        silent: ids that `decode` passes over.
        stops: stop strings, of the answer; of the thought, too, if one of them has the mark that ends it.
        hidden: special tokens, id -> text, that `decode` writes and stop strings see, but the client does not.
        include_stop: whether what stopped it, string or token, is part of the text.
        min_tokens: a stop string that ends within so many tokens does not count.
        stop_token_ids: those the client named, for `stop_reason`.
        thought: tells it from the answer, and counts its tokens.
    """

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        prompt: Sequence[int],
        *,
        silent: Container[int] = (),
        stops: Sequence[str] = (),
        hidden: Mapping[int, str] | None = None,
        include_stop: bool = False,
        min_tokens: int = 0,
        stop_token_ids: Sequence[int] = (),
        thought: ThoughtTokens | None = None,
    ) -> None:
        self._detokenizer = Detokenizer(decode, prompt, silent)
        self._stops = StopStrings(stops, include=include_stop)
        self._hidden = hidden or {}
        self._hidden_spans: deque[tuple[int, int]] = deque()  # of decoded characters that are not out yet
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._stop_token_ids = stop_token_ids
        self._thought = thought
        self._apart = thought is not None and not any(thought.end in stop for stop in stops)
        self._decoded = 0  # characters decoded so far
        self._emitted = 0  # of those, given away
        self._pending: list[Entry] = []  # entries of text that is held back
        self.tokens = 0  # used so far, those behind a stop string not counted

    @property
    def thought_tokens(self) -> int:
        """How many of the tokens belong to the thought."""
        return 0 if self._thought is None else self._thought.count

    def add(self, output: Output) -> Piece:
        """What this output adds. A piece with a `finish_reason` is the last: the engine may be told to stop."""
        text = ""
        for i, token in enumerate(output.tokens):
            self.tokens += 1
            if token == output.stop_token and i == len(output.tokens) - 1 and not self._include_stop:
                break  # it ends the text without being part of it
            if output.logprobs:
                self._pending.append(Entry(self._decoded, output.logprobs[i]))
            decoded = self._detokenizer.add(token)
            parts = self._parts(decoded)
            if token in self._hidden:
                end = self._decoded + len(decoded)
                self._hidden_spans.append((end - len(self._hidden[token]), end))
            self._decoded += len(decoded)
            fragment, stop = self._feed(*parts)
            text += fragment
            if stop is not None:
                return self._cut(text, stop)
        if output.finish_reason is None:
            return self._piece(text)
        decoded = self._detokenizer.flush()
        self._decoded += len(decoded)
        fragment, stop = self._feed(*self._parts(decoded, last=True))
        text += fragment
        if stop is not None:
            return self._cut(text, stop)
        text = self._shown(text + self._stops.flush())
        reason: Literal["stop", "length"] = "stop" if output.finish_reason == "stop" else "length"
        named = output.stop_token if output.stop_token in self._stop_token_ids else None
        return Piece(text, self._pending, reason, named)

    def _parts(self, decoded: str, *, last: bool = False) -> tuple[str, str]:
        """Thought and answer, where stop strings count in the answer alone."""
        if self._thought is None:
            return "", decoded
        parts = self._thought.split(decoded, last=True) if last else self._thought.add(decoded)
        return parts if self._apart else ("", decoded)

    def _feed(self, thought: str, answer: str) -> tuple[str, str | None]:
        """What may go out, and the stop string that ended it: none counts in a thought, which comes first."""
        text, stop = self._stops.add(answer, may_stop=self.tokens > self._min_tokens)
        return thought + text, stop

    def _cut(self, text: str, stop: str) -> Piece:
        if self._include_stop:
            self._hidden_spans.clear()  # the string is shown whole, special tokens and all
        piece = self._piece(text)
        return Piece(piece.text, piece.entries, "stop", stop)

    def _piece(self, text: str) -> Piece:
        """`text` goes out, and with it the entries of the tokens that began in it."""
        shown = self._shown(text)
        ready = sum(entry.offset < self._emitted for entry in self._pending)  # offsets never fall
        entries, self._pending = self._pending[:ready], self._pending[ready:]
        return Piece(shown, entries)

    def _shown(self, text: str) -> str:
        """Decoded text on its way out, less what is hidden in it."""
        start, self._emitted = self._emitted, self._emitted + len(text)
        parts, position = [], start
        while self._hidden_spans and self._hidden_spans[0][0] < self._emitted:
            begin, end = self._hidden_spans.popleft()
            parts.append(text[position - start : begin - start])
            position = min(end, self._emitted)
        return "".join([*parts, text[position - start :]]) if parts else text
