"""Conversion of one sequence's token ids to its client-visible text, logprobs and finish reason.

The engine sends ids only. Here they are decoded, stop strings are found, and logprobs are truncated with the text.
No I/O and no HTTP.
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
    """One token's logprobs, and the start of its text as a character offset in this sequence's text."""

    offset: int
    logprob: TokenLogprob


@dataclass(frozen=True, slots=True)
class Piece:
    """The addition of one engine output to a sequence."""

    text: str
    entries: list[Entry] = field(default_factory=list)  # empty unless logprobs were requested
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: int | str | None = None  # the client's stop token or stop string, if it ended the sequence
    prompt_logprobs: Sequence[TokenLogprob | None] = ()  # the whole prompt's, on the first piece of its sample 0
    tokens: Sequence[int] = ()  # ids, if requested; text that is held back follows in a later piece

    def __bool__(self) -> bool:
        """Whether there is anything to send."""
        return bool(self.text or self.entries or self.finish_reason or self.prompt_logprobs or self.tokens)


class Assembler:
    """Incremental text of one sequence.

    Args:
        decode: token ids -> text.
        prompt: the prompt's ids, the left context of the first new token.
        silent: ids that `decode` skips.
        stops: stop strings, matched in the answer; in the thought as well if one of them contains its end mark.
        hidden: special tokens, id -> text, that are decoded and matched by stop strings but not shown to the client.
        include_stop: whether the matched stop string or stop token is part of the text.
        min_tokens: a stop string that ends within so many tokens does not count.
        stop_token_ids: the client's own, for `stop_reason`.
        thought: separates the thought from the answer and counts its tokens.
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
        self._hidden_spans: deque[tuple[int, int]] = deque()  # in decoded characters that are not emitted yet
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._stop_token_ids = stop_token_ids
        self._thought = thought
        self._stops_skip_thought = thought is not None and not any(thought.end in stop for stop in stops)
        self._decoded = 0  # characters decoded so far
        self._emitted = 0  # characters emitted so far
        self._pending: list[Entry] = []  # entries of text that is held back
        self.tokens = 0  # counted so far, without those after a stop string

    @property
    def thought_tokens(self) -> int:
        """Number of tokens that belong to the thought."""
        return 0 if self._thought is None else self._thought.count

    def add(self, output: Output) -> Piece:
        """Return the piece of this output. One with a `finish_reason` is the last; the sequence may then be aborted."""
        text = ""
        for i, token in enumerate(output.tokens):
            self.tokens += 1
            if token == output.stop_token and i == len(output.tokens) - 1 and not self._include_stop:
                break  # a stop token is not part of the text
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
        text = self._visible(text + self._stops.flush())
        reason: Literal["stop", "length"] = "stop" if output.finish_reason == "stop" else "length"
        named = output.stop_token if output.stop_token in self._stop_token_ids else None
        return Piece(text, self._pending, reason, named)

    def _parts(self, decoded: str, *, last: bool = False) -> tuple[str, str]:
        """Split text into thought and answer; all of it is answer if stop strings are matched in both."""
        if self._thought is None:
            return "", decoded
        parts = self._thought.split(decoded, last=True) if last else self._thought.add(decoded)
        return parts if self._stops_skip_thought else ("", decoded)

    def _feed(self, thought: str, answer: str) -> tuple[str, str | None]:
        """Return the text to emit, and the stop string if one matched. The thought comes first and is not matched."""
        text, stop = self._stops.add(answer, may_stop=self.tokens > self._min_tokens)
        return thought + text, stop

    def _cut(self, text: str, stop: str) -> Piece:
        if self._include_stop:
            self._hidden_spans.clear()  # the stop string is shown complete, with its special tokens
        piece = self._piece(text)
        return Piece(piece.text, piece.entries, "stop", stop)

    def _piece(self, text: str) -> Piece:
        """Emit `text` with the logprob entries of the tokens that begin in it."""
        visible = self._visible(text)
        ready = sum(entry.offset < self._emitted for entry in self._pending)  # offsets never fall
        entries, self._pending = self._pending[:ready], self._pending[ready:]
        return Piece(visible, entries)

    def _visible(self, text: str) -> str:
        """Emit decoded text without its hidden tokens."""
        start, self._emitted = self._emitted, self._emitted + len(text)
        parts, position = [], start
        while self._hidden_spans and self._hidden_spans[0][0] < self._emitted:
            begin, end = self._hidden_spans.popleft()
            parts.append(text[position - start : begin - start])
            position = min(end, self._emitted)
        return "".join([*parts, text[position - start :]]) if parts else text
