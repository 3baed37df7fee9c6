"""What an adapter brings for the text around it: tokens that its base's tokenizer does not have, and a chat template.

Of an uploaded tokenizer only its added tokens are used: everything else (normaliser, splitting, merges) is the base's,
so a hostile tokenizer can do nothing but add words.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from adapters.peft_format.fields import AdapterError, shorten

TOKENIZER_NAME, TEMPLATE_NAME = "tokenizer.json", "chat_template.jinja"
MAX_TOKENIZER_BYTES = 64 * 1024 * 1024
MAX_TEMPLATE_BYTES = 256 * 1024
MAX_TOKEN_LENGTH = 256  # characters
_FLAGS = ("special", "lstrip", "rstrip", "single_word", "normalized")


@dataclass(frozen=True)
class NewToken:
    """One token beyond the base's tokenizer, as the `tokenizers` library has it."""

    id: int
    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


@dataclass(frozen=True)
class AdapterText:
    """All of it. Part of the adapter's digest when there is any."""

    tokens: tuple[NewToken, ...] = ()
    chat_template: str | None = None
    stop_tokens: tuple[int, ...] = ()  # that ended the turns it was trained on

    @classmethod
    def of(cls, fields: dict[str, Any]) -> "AdapterText":
        """From what `dataclasses.asdict` and JSON made of one."""
        tokens = tuple(NewToken(**token) for token in fields["tokens"])
        return cls(tokens, fields["chat_template"], tuple(fields.get("stop_tokens", ())))


NO_TEXT = AdapterText()


def read_new_tokens(raw: bytes, known: Callable[[str], int | None], size: int) -> tuple[NewToken, ...]:
    """The tokens of a tokenizer.json that the base's tokenizer lacks.

    Args:
        known: a token's id in the base's tokenizer.
        size: how many tokens that has: new ones are numbered from there.

    Raises:
        AdapterError: it is no tokenizer, or not one that was made by adding tokens to the base's.
    """
    try:
        document = json.loads(raw)
    except (ValueError, RecursionError):
        raise AdapterError("the tokenizer is not valid JSON", "tokenizer") from None
    entries = document.get("added_tokens") if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise AdapterError("the tokenizer has no list of added_tokens: upload a tokenizer.json", "tokenizer")
    found: list[NewToken] = []
    for entry in entries:
        token = _token(entry)
        there = known(token.content)
        if there is None:
            found.append(token)
        elif there != token.id:
            raise AdapterError(
                f"the tokenizer has '{shorten(token.content)}' as {token.id}, the base's has it as {there}", "tokenizer"
            )
    found.sort(key=lambda token: token.id)
    if [token.id for token in found] != list(range(size, size + len(found))):
        raise AdapterError(
            f"the tokenizer's new tokens are not numbered from {size} on, where those of the base's end: it was made "
            "from another",
            "tokenizer",
        )
    if len({token.content for token in found}) < len(found):
        raise AdapterError("the tokenizer has a new token twice", "tokenizer")
    return tuple(found)


def _token(entry: Any) -> NewToken:
    if not isinstance(entry, dict):
        raise AdapterError("the tokenizer's added_tokens must be objects", "tokenizer")
    id_, content = entry.get("id"), entry.get("content")
    flags = {flag: entry.get(flag, False) for flag in _FLAGS}
    if type(id_) is not int or not isinstance(content, str) or not all(type(flag) is bool for flag in flags.values()):
        raise AdapterError("the tokenizer's added_tokens need an id, a content and flags", "tokenizer")
    if not 1 <= len(content) <= MAX_TOKEN_LENGTH:
        raise AdapterError(f"an added token has 1 to {MAX_TOKEN_LENGTH} characters, not {len(content)}", "tokenizer")
    try:
        content.encode()
    except UnicodeEncodeError:
        raise AdapterError("an added token has half a surrogate pair", "tokenizer") from None
    return NewToken(id_, content, **flags)


def check_template(raw: bytes) -> str:
    """A chat template's source. Raises AdapterError."""
    if len(raw) > MAX_TEMPLATE_BYTES:
        raise AdapterError(f"a chat template has at most {MAX_TEMPLATE_BYTES} bytes", "chat_template")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise AdapterError("the chat template is not UTF-8", "chat_template") from None
