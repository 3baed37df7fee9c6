"""An adapter's chat template, and its tokens beyond its base's tokenizer.

Only the added tokens of an uploaded tokenizer are used: everything else (normaliser, splitting, merges) is the base's,
so a hostile tokenizer can do nothing but add words.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from adapters.peft_format.fields import AdapterError, shorten

TOKENIZER_NAME, TEMPLATE_NAME = "tokenizer.json", "chat_template.jinja"
MAX_TOKENIZER_BYTES = 64 * 1024 * 1024
MAX_TEMPLATE_BYTES = 256 * 1024
MAX_TOKEN_LENGTH = 256  # characters
MAX_ADDED_TOKENS = 65536  # in a tokenizer, those of its base included
MAX_ADDED_CHARACTERS = 4 * 1024 * 1024  # of all added tokens together


@dataclass(frozen=True)
class NewToken:
    """One token beyond the base's tokenizer, as in the `tokenizers` library."""

    id: int
    content: str
    special: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


@dataclass(frozen=True)
class AdapterText:
    """The text side of an adapter. Part of its digest if there is any."""

    tokens: tuple[NewToken, ...] = ()
    chat_template: str | None = None
    stop_tokens: tuple[int, ...] = ()  # ends of turns in its training data
    tool_format: str | None = None  # of tool calls there
    reasoning_format: str | None = None

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> "AdapterText":
        """The text from the JSON of its `dataclasses.asdict`."""
        tokens = tuple(NewToken(**token) for token in fields["tokens"])
        formats = fields.get("tool_format"), fields.get("reasoning_format")
        return cls(tokens, fields["chat_template"], tuple(fields.get("stop_tokens", ())), *formats)


NO_TEXT = AdapterText()


class _Document(msgspec.Struct):
    """A tokenizer.json, reduced to this field."""

    added_tokens: list[NewToken]


_DOCUMENT = msgspec.json.Decoder(_Document)  # made in one thread: when several use a type first, msgspec crashes


def read_added_tokens(path: Path) -> tuple[NewToken, ...]:
    """The added tokens of a tokenizer.json. Raises AdapterError for any other file, and for too many tokens."""
    if path.stat().st_size > MAX_TOKENIZER_BYTES:
        raise AdapterError(f"a tokenizer has at most {MAX_TOKENIZER_BYTES} bytes", "tokenizer")
    try:
        tokens = _DOCUMENT.decode(path.read_bytes()).added_tokens
    except msgspec.ValidationError as fault:
        if "$.added_tokens[" in str(fault):
            raise AdapterError("added_tokens are objects with an id, a content and flags", "tokenizer") from None
        raise AdapterError("the tokenizer has no list of added_tokens: upload a tokenizer.json", "tokenizer") from None
    except (msgspec.DecodeError, RecursionError) as fault:
        raise AdapterError(f"the tokenizer is not valid JSON: {fault}", "tokenizer") from None
    if len(tokens) > MAX_ADDED_TOKENS:
        raise AdapterError(f"the tokenizer has {len(tokens)} added tokens, of {MAX_ADDED_TOKENS} at most", "tokenizer")
    for token in tokens:
        if not 1 <= len(token.content) <= MAX_TOKEN_LENGTH:
            raise AdapterError(
                f"an added token has 1 to {MAX_TOKEN_LENGTH} characters, not {len(token.content)}", "tokenizer"
            )
    if sum(len(token.content) for token in tokens) > MAX_ADDED_CHARACTERS:
        raise AdapterError(f"added tokens have {MAX_ADDED_CHARACTERS} characters together at most", "tokenizer")
    return tuple(tokens)


def find_new_tokens(
    added: Iterable[NewToken], id_in_base: Callable[[str], int | None], size: int
) -> tuple[NewToken, ...]:
    """The added tokens of a tokenizer that the base's tokenizer lacks.

    Args:
        id_in_base: a token's id in the base's tokenizer.
        size: the number of tokens in that; new ones are numbered from there.

    Raises:
        AdapterError: the tokenizer was not made by adding tokens to the base's.
    """
    found: list[NewToken] = []
    for token in added:
        base_id = id_in_base(token.content)
        if base_id is None:
            found.append(token)
        elif base_id != token.id:
            raise AdapterError(
                f"the tokenizer has '{shorten(token.content)}' as {token.id}, the base's has it as {base_id}",
                "tokenizer",
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


def check_template(path: Path) -> str:
    """A chat template's source. Raises AdapterError."""
    if path.stat().st_size > MAX_TEMPLATE_BYTES:
        raise AdapterError(f"a chat template has at most {MAX_TEMPLATE_BYTES} bytes", "chat_template")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise AdapterError("the chat template is not UTF-8", "chat_template") from None
