"""Where a stop string is checked: a search over text that arrives in pieces."""

from collections.abc import Sequence
from functools import lru_cache


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
