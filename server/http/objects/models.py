"""Models: the base and adapters in OpenAI's shapes, and their tokenizers."""

from typing import Any, Literal, NotRequired, TypedDict


class TokenizerInfo(TypedDict):
    """Special tokens are listed under the tokenizer's names: `eos_token`, `bos_token`, ..."""

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
    """`named_by`: the sources that make it a stop token: the model's files, chat template, or adapter's fine-tune."""

    id: int
    token: str
    named_by: list[str]


class ModelDetails(ModelCard):
    """`tool_format` and `reasoning_format` are the formats of tool calls and thoughts; null if it has none."""

    stop_tokens: list[StopToken]
    tool_format: str | None
    reasoning_format: str | None
