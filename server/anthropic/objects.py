"""The objects and events of `/v1/messages` in Anthropic's format."""

from typing import Any, Literal

from msgspec import Struct

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]


class _Object(Struct, frozen=True, kw_only=True):
    pass


class _Tagged(_Object, frozen=True, kw_only=True, tag_field="type"):
    pass


class MessageFault(_Object, frozen=True, kw_only=True):
    type: str
    message: str
    param: str | None
    code: str | None


class MessageError(_Tagged, frozen=True, kw_only=True, tag="error"):
    error: MessageFault


# --- messages ---------------------------------------------------------------------------------------


class TextBlock(_Tagged, frozen=True, kw_only=True, tag="text"):
    text: str


class ThinkingBlock(_Tagged, frozen=True, kw_only=True, tag="thinking"):
    """The signature is empty: thoughts are accepted without one."""

    thinking: str
    signature: str = ""


class ToolUseBlock(_Tagged, frozen=True, kw_only=True, tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any]


Block = TextBlock | ThinkingBlock | ToolUseBlock


class MessageUsage(_Object, frozen=True, kw_only=True):
    """`input_tokens` counts computed tokens, `cache_read_input_tokens` those found in the prefix cache."""

    input_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int
    output_tokens: int


class MessageObject(_Tagged, frozen=True, kw_only=True, tag="message"):
    id: str
    role: Literal["assistant"] = "assistant"
    model: str
    content: list[Block]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage


class TokenCount(_Object, frozen=True, kw_only=True):
    input_tokens: int


# --- events -----------------------------------------------------------------------------------------


class TextBlockDelta(_Tagged, frozen=True, kw_only=True, tag="text_delta"):
    text: str


class ThinkingDelta(_Tagged, frozen=True, kw_only=True, tag="thinking_delta"):
    thinking: str


class InputDelta(_Tagged, frozen=True, kw_only=True, tag="input_json_delta"):
    partial_json: str


class MessageStart(_Tagged, frozen=True, kw_only=True, tag="message_start"):
    message: MessageObject


class Ping(_Tagged, frozen=True, kw_only=True, tag="ping"):
    pass


class BlockStart(_Tagged, frozen=True, kw_only=True, tag="content_block_start"):
    index: int
    content_block: Block


class BlockDelta(_Tagged, frozen=True, kw_only=True, tag="content_block_delta"):
    index: int
    delta: TextBlockDelta | ThinkingDelta | InputDelta


class BlockStop(_Tagged, frozen=True, kw_only=True, tag="content_block_stop"):
    index: int


class Ending(_Object, frozen=True, kw_only=True):
    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(_Tagged, frozen=True, kw_only=True, tag="message_delta"):
    delta: Ending
    usage: MessageUsage


class MessageStop(_Tagged, frozen=True, kw_only=True, tag="message_stop"):
    pass


MessageEvent = MessageStart | Ping | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop | MessageError
