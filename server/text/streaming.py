"""Streamed text, token by token: never half a character, never part of a stop string.

Bookkeeping over a decode function.
"""

from collections.abc import Callable, Container, Sequence
from functools import lru_cache

_CONTEXT = 6  # prompt tokens decoded as left context of the first new token
_MAX_INCOMPLETE_TOKENS = 64
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """Incremental decoding. The joined pieces equal the text decoded at once.

    Tokens cannot be decoded one by one: a character may span several, and sentencepiece-style decoders drop the leading
    space. So a short window is decoded with and without the new tokens; the difference is emitted once it does not end
    within a character. (After `_MAX_INCOMPLETE_TOKENS` tokens without a complete character it is emitted as it is, so
    that the window stays short.)

    Args:
        decode: token ids -> text.
        prompt: preceding tokens, of which only the last few matter.
        silent: ids for which `decode` returns no text.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int] = (), silent: Container[int] = ()
    ) -> None:
        self._decode = decode
        self._silent = silent
        self._window = [token for token in prompt[-_MAX_INCOMPLETE_TOKENS:] if token not in silent][-_CONTEXT:]
        self._emitted = len(decode(self._window)) if self._window else 0  # characters of the window's text already out
        self._emitted_tokens = len(self._window)  # tokens of the window already out entirely

    def add(self, token: int) -> str:
        """Add a token and return the text that it completes; empty while a character is incomplete."""
        if token in self._silent:
            return ""
        self._window.append(token)
        text = self._decode(self._window)
        incomplete = len(text) <= self._emitted or text.endswith(_INCOMPLETE)
        if incomplete and len(self._window) - self._emitted_tokens < _MAX_INCOMPLETE_TOKENS:
            return ""
        piece = text[self._emitted :]
        if len(self._window) > _CONTEXT:  # the tokens just emitted are enough left context
            self._window = self._window[self._emitted_tokens :]
            text = self._decode(self._window)
        self._emitted_tokens = len(self._window)
        self._emitted = len(text)
        return piece

    def flush(self) -> str:
        """Return the rest once the sequence has ended; bytes of an incomplete character read U+FFFD."""
        return self._decode(self._window)[self._emitted :]


class StopStrings:
    """A search for stop strings in text that arrives in pieces, which holds back a possible beginning of one.

    A Knuth-Morris-Pratt automaton per string: constant work per character for any length of strings. Of several
    matches, the one that ends first counts, and of those the longest, so the result is independent of the pieces.

    Args:
        stops: non-empty strings.
        include: whether the matched string is part of the text.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._automata = [_Automaton(stop) for stop in sorted(set(stops), key=len, reverse=True)]
        self._include = include
        self._held = ""

    def add(self, piece: str, *, may_stop: bool = True) -> tuple[str, str | None]:
        """Add text; return the text safe to emit, and the stop string that ended it, if any. `may_stop`: False ignores
        matches that end in this piece."""
        if not self._automata:
            return piece, None
        text = self._held + piece
        for position, char in enumerate(piece, start=len(self._held) + 1):
            matched = None
            for automaton in self._automata:
                if automaton.step(char) and may_stop and matched is None:
                    matched = automaton.stop
            if matched is not None:
                self._held = ""
                return text[: position if self._include else position - len(matched)], matched
        hold = max(automaton.progress for automaton in self._automata)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold], None

    def flush(self) -> str:
        """Return the text held back as a possible stop string, once the sequence has ended."""
        held, self._held = self._held, ""
        return held


class _Automaton:
    """The Knuth-Morris-Pratt automaton of one stop string."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.progress = 0  # length of the longest proper prefix of `stop` that the text ends with
        self._fallback = _fallback(stop)

    def step(self, char: str) -> bool:
        """Advance by one character; return True when it completes the stop string."""
        k = self.progress
        while k and self.stop[k] != char:
            k = self._fallback[k]
        k += self.stop[k] == char
        complete = k == len(self.stop)
        self.progress = self._fallback[k] if complete else k
        return complete


@lru_cache(maxsize=256)
def _fallback(stop: str) -> tuple[int, ...]:
    """Return the automaton's failure function: for k matched characters, the next shorter match; k from 0 to all."""
    fallback = [0] * (len(stop) + 1)
    k = 0
    for i in range(1, len(stop)):
        while k and stop[i] != stop[k]:
            k = fallback[k]
        k += stop[i] == stop[k]
        fallback[i + 1] = k
    return tuple(fallback)
