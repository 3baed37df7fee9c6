"""Text that grows token by token, never by half a character. Pure bookkeeping over a decode function."""

from collections.abc import Callable, Container, Sequence

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
