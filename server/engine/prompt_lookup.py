"""Prompt lookup: drafts for speculative decoding, taken from where a sequence's last tokens occurred before.

A text that quotes, edits or repeats itself often continues as it did before. A `Drafter` finds the last earlier
occurrence of the last few tokens and proposes the tokens that followed. It also tracks the acceptance rate of its
proposals, including those not worth computing, and so drafts less, or nothing, while a text does not repeat itself,
and resumes when it does.
"""

from collections.abc import Sequence

SIZES = (4, 2)  # lengths of the context to look up; the first one found is used
_PRIOR = 0.5  # the assumed acceptance rate before the first outcome
_GAIN = 0.125  # weight of the newest outcome in that rate


class Drafter:
    """Proposes continuations of one growing sequence.

    Args:
        most: most tokens proposed at once; at least 1.
    """

    def __init__(self, max_drafts: int) -> None:
        self._max_drafts = max_drafts
        self._following: dict[tuple[int, ...], int] = {}  # context -> where its latest continuation starts
        self._indexed = 0  # leading tokens that are indexed as continuations
        self._acceptance = dict.fromkeys(SIZES, _PRIOR)  # acceptance rate, by the length of the context
        self._proposal: list[int] = []
        self._size = 0  # length of the proposal's context

    def draft(self, tokens: Sequence[int], max_drafts: int, min_probability: float) -> list[int]:
        """Return the proposed continuation of `tokens`, as far as it is worth computing.

        Args:
            tokens: the sequence so far; it extends the tokens of earlier calls.
            max_drafts: limit for this call, besides the constructor's.
            min_probability: the least probability of acceptance, 0 to 1, for a draft to be worth computing.
        """
        self._index(tokens)
        self._propose(tokens)
        rate = probability = self._acceptance.get(self._size, 0.0)
        count = 0
        while count < min(max_drafts, len(self._proposal)) and probability > min_probability:
            count += 1
            probability *= rate
        return self._proposal[:count]

    def learn(self, drawn: Sequence[int]) -> None:
        """Update the acceptance rate from the latest proposal and the drawn tokens; each proposal counts once."""
        for proposed, token in zip(self._proposal, drawn, strict=False):
            self._acceptance[self._size] += _GAIN * ((proposed == token) - self._acceptance[self._size])
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
                # A continuation that reaches the end of the text is repeated periodically.
                self._proposal = [tokens[start + i % (end - start)] for i in range(self._max_drafts)]
                break
