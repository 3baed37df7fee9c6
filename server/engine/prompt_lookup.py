"""Prompt lookup: drafts for speculative decoding, found where a sequence's last tokens occurred before.

A text that quotes, edits or repeats itself continues as it did before. A `Drafter` finds where the last few tokens
occurred earlier, and proposes what followed them there. It also keeps count of how often its proposals come true, of
those that were not worth computing too, and so drafts less, or nothing, where a text does not repeat itself, and starts
again where it does.
"""

from collections.abc import Sequence

SIZES = (4, 2)  # lengths of the context that is looked up; the first that is found decides
_PRIOR = 0.5  # the share of proposals that come true, before anything is known
_GAIN = 0.125  # weight of the newest outcome in that share


class Drafter:
    """Proposes continuations of one growing sequence.

    Args:
        most: tokens proposed at once, at most; at least 1.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._following: dict[tuple[int, ...], int] = {}  # context -> where its latest continuation starts
        self._indexed = 0  # leading tokens that are known as continuations
        self._shares = dict.fromkeys(SIZES, _PRIOR)  # of proposals that came true, by the length of their context
        self._proposal: list[int] = []
        self._size = 0  # length of the proposal's context

    def draft(self, tokens: Sequence[int], most: int, price: float) -> list[int]:
        """The proposed continuation of `tokens`, as far as it is worth computing.

        Args:
            tokens: the sequence so far; what an earlier call was given, and more.
            most: no more than so many, whatever was said at first.
            price: the probability, 0 to 1, that a draft must have of being right.
        """
        self._index(tokens)
        self._propose(tokens)
        share = chance = self._shares.get(self._size, 0.0)
        worth = 0
        while worth < min(most, len(self._proposal)) and chance > price:
            worth += 1
            chance *= share
        return self._proposal[:worth]

    def learn(self, drawn: Sequence[int]) -> None:
        """Compare the latest proposal with the tokens that came instead; each proposal counts once."""
        for proposed, token in zip(self._proposal, drawn, strict=False):
            self._shares[self._size] += _GAIN * ((proposed == token) - self._shares[self._size])
            if proposed != token:
                break
        self._proposal = []

    def _index(self, tokens: Sequence[int]) -> None:
        for position in range(self._indexed, len(tokens)):
            for size in SIZES:
                if size <= position:
                    self._following[tuple(tokens[position - size : position])] = position
        self._indexed = len(tokens)

    def _propose(self, tokens: Sequence[int]) -> None:
        self._proposal, end = [], len(tokens)
        for self._size in SIZES:
            start = self._following.get(tuple(tokens[end - self._size :])) if self._size <= end else None
            if start is not None:
                # Where the continuation runs into the end, the text is taken to go round in circles.
                self._proposal = [tokens[start + i % (end - start)] for i in range(self._most)]
                break
