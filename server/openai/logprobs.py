"""Log-probabilities in OpenAI's two shapes: columns for completions, a list of tokens for chat."""

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from server.errors import InvalidRequest
from server.messages.protocol import TokenLogprob
from server.openai.assembly import Entry
from server.text.processor import TextProcessor

_TOKENS_AT_ONCE = 256  # tokens encoded at once
_LOWEST = -9999.0  # JSON has no infinity; vLLM's stand-in

Columns = dict[str, list[Any]]


class AnswerSize:
    """Estimated bytes of a response's text and log-probabilities, with a limit, as it is held in memory as a whole.

    Args:
        limit: `max_response_bytes`.
        alternatives: number per token, without the token itself; None: no log-probabilities.
        bytes_per_token: bytes of one token's value and text.
    """

    def __init__(self, limit: int, alternatives: int | None, bytes_per_token: int) -> None:
        self._limit = limit
        self._per_token = 0 if alternatives is None else 40 + bytes_per_token * (1 + alternatives)
        self._bytes = 0

    def add(self, tokens: int, text: int = 0) -> None:
        """Count further tokens and characters of text. Raises InvalidRequest above the limit."""
        self._bytes += tokens * self._per_token + text
        if self._bytes > self._limit:
            raise InvalidRequest(
                f"The answer has about {self._bytes} bytes or more; the limit is {self._limit} "
                "(--max-response-bytes). Reduce `n`, `logprobs`, `max_tokens` or `echo`, or use `stream`.",
                param="logprobs" if self._per_token else "echo",
                code="response_too_large",
            )


def columns(text: TextProcessor, entries: Iterable[Entry], *, start: int = 0) -> Columns:
    """Return `logprobs` of a completion's choice. `start`: characters of the choice's text before this sequence's."""
    table = empty_columns()
    for entry in entries:
        _append(table, text, start + entry.offset, entry.logprob.token, entry.logprob)
    return table


def echoed_columns(
    text: TextProcessor, ids: Sequence[int], offsets: Sequence[int], logprobs: Sequence[TokenLogprob | None]
) -> dict[str, bytes]:
    """Return the columns of an echoed prompt, each as the inside of a JSON list.

    They are encoded once for all samples, and in parts, so that the interpreter lock is held only briefly. The first
    token has no logprob, as nothing precedes it.
    """
    parts: dict[str, list[bytes]] = {name: [] for name in empty_columns()}
    for start in range(0, len(ids), _TOKENS_AT_ONCE):
        table = empty_columns()
        part = slice(start, start + _TOKENS_AT_ONCE)
        for token, offset, logprob in zip(ids[part], offsets[part], logprobs[part], strict=True):
            _append(table, text, offset, token, logprob)
        for name, column in table.items():
            parts[name].append(msgspec.json.encode(column)[1:-1])
    return {name: b",".join(written) for name, written in parts.items()}


def with_echo(echoed: dict[str, bytes], table: Columns) -> dict[str, msgspec.Raw]:
    """Return the columns of an echoed prompt and its completion as JSON."""
    return {
        name: msgspec.Raw(b"[%b%b%b]" % (echoed[name], b"," if column else b"", msgspec.json.encode(column)[1:-1]))
        for name, column in table.items()
    }


def empty_columns() -> Columns:
    """Return columns without tokens."""
    return {"text_offset": [], "token_logprobs": [], "tokens": [], "top_logprobs": []}


def extend(table: Columns, more: Columns) -> None:
    """Append the columns of later tokens in place."""
    for name, column in table.items():
        column += more[name]


def _append(table: Columns, text: TextProcessor, offset: int, token: int, logprob: TokenLogprob | None) -> None:
    token_text = text.token(token).text
    table["text_offset"].append(offset)
    table["tokens"].append(token_text)
    if logprob is None:
        table["token_logprobs"].append(None)
        table["top_logprobs"].append(None)
        return
    value = max(logprob.logprob, _LOWEST)
    top = {text.token(other).text: max(other_value, _LOWEST) for other, other_value in logprob.top}
    top.setdefault(token_text, value)  # the chosen token is always included, as an extra one if necessary
    table["token_logprobs"].append(value)
    table["top_logprobs"].append(top)


def chat_tokens(text: TextProcessor, entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """Return `logprobs.content` of a chat choice."""
    return [
        _chat_token(text, entry.logprob.token, entry.logprob.logprob)
        | {"top_logprobs": [_chat_token(text, token, value) for token, value in entry.logprob.top]}
        for entry in entries
    ]


def _chat_token(text: TextProcessor, token: int, logprob: float) -> dict[str, Any]:
    shown = text.token(token)
    return {"token": shown.text, "logprob": max(logprob, _LOWEST), "bytes": list(shown.bytes)}
