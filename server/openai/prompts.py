"""Prompts given as text or token ids, one or several, and their encoding."""

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, PlainValidator

from server.errors import InvalidRequest
from server.openai.schema import INT32
from server.openai.target import Target


def _prompts(value: Any) -> list[str | list[int]]:
    """Normalise a text, texts, ids or lists of ids to a list of texts or of lists of ids."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return value
        if _are_ids(value):
            return [value]
        if all(isinstance(item, list) and item and _are_ids(item) for item in value):
            return value
    raise ValueError("must be a string, a list of strings, a list of token ids, or a list of such lists, and not empty")


def _are_ids(value: list[Any]) -> bool:
    if not all(type(item) is int for item in value):  # excludes bool, a subclass of int
        return False
    if min(value) < 0 or max(value) > INT32:
        raise ValueError(f"a token id is from 0 to {INT32}")
    return True


_Ids = Annotated[list[Annotated[int, Field(ge=0, le=INT32)]], Field(min_length=1)]
_Texts = Annotated[list[str], Field(min_length=1)]
Prompts = Annotated[
    list[str | list[int]],
    PlainValidator(_prompts, json_schema_input_type=str | _Texts | _Ids | Annotated[list[_Ids], Field(min_length=1)]),
]


async def encode_prompts(
    target: Target, inputs: Sequence[str | list[int]], max_tokens: int, *, add_special_tokens: bool, param: str
) -> list[list[int]]:
    """Return the token ids of each prompt. Raises `InvalidRequest` for an empty one or ids outside the vocabulary."""
    texts = [prompt for prompt in inputs if isinstance(prompt, str)]  # all prompts or none
    encoded = await target.text.encode(texts, add_special_tokens=add_special_tokens, max_tokens=max_tokens, param=param)
    prompts = encoded or [prompt for prompt in inputs if not isinstance(prompt, str)]
    for ids in prompts:
        if not ids:
            raise InvalidRequest(f"`{param}` is empty: it has no token.", param=param)
        if max(ids) >= target.vocab_size:
            message = f"`{param}`: token id {max(ids)} is outside the vocabulary of {target.vocab_size}."
            raise InvalidRequest(message, param=param)
    return prompts
