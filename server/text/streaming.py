"""Text that grows token by token: never half a character, never part of a stop string.

Pure bookkeeping over a decode function.
"""

from collections.abc import Callable, Container, Sequence
from functools import lru_cache

_CONTEXT = 6  # prompt tokens that give the first new token its left neighbours
_PATIENCE = 64
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """Incremental decoding. The pieces joined are what decoding everything at once gives.

    Tokenizers do not decode token by token: a character may be spread over tokens, and sentencepiece-style decoders
    drop the space at the very beginning. So a short window is decoded with and without the new tokens; the difference
    is emitted once it does not end in the middle of a character. (After `_PATIENCE` tokens that complete none it is
    emitted as it is, so that the window stays short.)

    Args:
        decode: token ids -> text.
        prompt: what precedes; only its last few tokens matter.
        silent: ids that `decode` passes over.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int] = (), silent: Container[int] = ()
    ) -> None:
        self._decode = decode
        self._silent = silent
        self._window = [token for token in prompt[-_PATIENCE:] if token not in silent][-_CONTEXT:]
        self._emitted = len(decode(self._window)) if self._window else 0  # characters of the window's text already out
        self._settled = len(self._window)  # tokens of the window that are out entirely

    def add(self, token: int) -> str:
        """The text that this token completes; empty while a character is incomplete."""
        if token in self._silent:
            return ""
        self._window.append(token)
        text = self._decode(self._window)
        incomplete = len(text) <= self._emitted or text.endswith(_INCOMPLETE)
        if incomplete and len(self._window) - self._settled < _PATIENCE:
            return ""
        piece = text[self._emitted :]
        if len(self._window) > _CONTEXT:  # the tokens just emitted are left context enough
            self._window = self._window[self._settled :]
            text = self._decode(self._window)
        self._settled = len(self._window)
        self._emitted = len(text)
        return piece

    def flush(self) -> str:
        """What is held back, at the end: bytes that never became a character read U+FFFD."""
        return self._decode(self._window)[self._emitted :]


class StopStrings:
    """Looks for stop strings in text that arrives in pieces and holds back what may be the beginning of one.

    A Knuth-Morris-Pratt automaton per string: constant work per character, however long the strings. Of several
    matches the one that ends first counts, of those the longest; so the result does not depend on how text is cut.

    Args:
        stops: non-empty strings.
        include: whether the matched string is part of the text.
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._automata = [_Automaton(stop) for stop in sorted(set(stops), key=len, reverse=True)]
        self._include = include
        self._held = ""

    def add(self, piece: str, *, may_stop: bool = True) -> tuple[str, str | None]:
        """Text safe to emit, and the stop string that ended it, if any. `may_stop`: matches that end here count."""
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
        """What was held back, at the end: it did not become a stop string."""
        held, self._held = self._held, ""
        return held


class _Automaton:
    """How far the text's end agrees with one stop string."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.progress = 0  # the longest proper prefix of `stop` that the text ends with
        self._fallback = _fallback(stop)

    def step(self, char: str) -> bool:
        """Take one character; True when it completes the stop string."""
        k = self.progress
        while k and self.stop[k] != char:
            k = self._fallback[k]
        k += self.stop[k] == char
        complete = k == len(self.stop)
        self.progress = self._fallback[k] if complete else k
        return complete


@lru_cache(maxsize=256)
def _fallback(stop: str) -> tuple[int, ...]:
    """After k characters have agreed: the next shorter agreement, for k from 0 to all."""
    fallback = [0] * (len(stop) + 1)
    k = 0
    for i in range(1, len(stop)):
        while k and stop[i] != stop[k]:
            k = fallback[k]
        k += stop[i] == stop[k]
        fallback[i + 1] = k
    return tuple(fallback)
