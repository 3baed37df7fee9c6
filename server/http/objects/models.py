"""Models: the base and adapters, as OpenAI lists them, and their tokenizers."""

from typing import Any, Literal, NotRequired, TypedDict


class TokenizerInfo(TypedDict):
    """Special tokens are there by the names that the tokenizer has: `eos_token`, `bos_token`, ..."""

    tokenizer_class: str
    chat_template: str | None
    model_max_length: int
    bos_token: NotRequired[str]
    eos_token: NotRequired[str]
    unk_token: NotRequired[str]
    sep_token: NotRequired[str]
    pad_token: NotRequired[str]
    cls_token: NotRequired[str]
    mask_token: NotRequired[str]


class ModelCard(TypedDict):
    """OpenAI's fields, vLLM's from `root` on, and Anthropic's from `type` on."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int | None
    permission: list[Any]
    type: Literal["model"]
    display_name: str
    created_at: str
    max_input_tokens: int | None
    max_tokens: int | None


class StopToken(TypedDict):
    """`named_by`: the model's files, its chat template, or the adapter's fine-tune, that make it end an answer."""

    id: int
    token: str
    named_by: list[str]


class ModelDetails(ModelCard):
    """`tool_format` and `reasoning_format` are how it calls tools and how it thinks; null where it does not."""

    stop_tokens: list[StopToken]
    tool_format: str | None
    reasoning_format: str | None
