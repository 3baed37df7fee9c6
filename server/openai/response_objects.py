"""The objects and events of `/v1/responses` in OpenAI's format."""

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
ItemStatus = Literal["in_progress", "completed", "incomplete"]
Logprobs = list[dict[str, Any]]
Fields = dict[str, Any]


class _Object(Struct, frozen=True, kw_only=True):
    pass


class _Tagged(_Object, frozen=True, kw_only=True, tag_field="type"):
    pass


# --- items ------------------------------------------------------------------------------------------


class OutputText(_Tagged, frozen=True, kw_only=True, tag="output_text"):
    text: str = ""
    annotations: list[Fields] = []
    logprobs: Logprobs = []


class ReasoningText(_Tagged, frozen=True, kw_only=True, tag="reasoning_text"):
    text: str = ""


class OutputMessage(_Tagged, frozen=True, kw_only=True, tag="message"):
    id: str
    status: ItemStatus
    content: list[OutputText]
    role: Literal["assistant"] = "assistant"


class OutputCall(_Tagged, frozen=True, kw_only=True, tag="function_call"):
    id: str
    status: ItemStatus
    call_id: str
    name: str
    arguments: str


class OutputReasoning(_Tagged, frozen=True, kw_only=True, tag="reasoning"):
    id: str
    status: ItemStatus
    content: list[ReasoningText]
    summary: list[Fields] = []


OutputItem = OutputMessage | OutputCall | OutputReasoning


# --- the response -----------------------------------------------------------------------------------


class InputTokens(_Object, frozen=True, kw_only=True):
    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokens(_Object, frozen=True, kw_only=True):
    reasoning_tokens: int


class ResponseUsage(_Object, frozen=True, kw_only=True):
    input_tokens: int
    input_tokens_details: InputTokens
    output_tokens: int
    output_tokens_details: OutputTokens
    total_tokens: int


class ResponseFault(_Object, frozen=True, kw_only=True):
    code: str
    message: str


class Incomplete(_Object, frozen=True, kw_only=True):
    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponseObject(_Object, frozen=True, kw_only=True):
    """`system_fingerprint` is the digest of the model or adapter; `usage` is null until the response has ended."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Status
    error: ResponseFault | None = None
    incomplete_details: Incomplete | None = None
    model: str
    system_fingerprint: str
    output: list[OutputItem] = []
    usage: ResponseUsage | None = None
    background: bool
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: Fields
    safety_identifier: str | None
    service_tier: str = "default"
    store: bool
    temperature: float
    text: Fields
    tool_choice: str | Fields
    tools: list[Fields]
    top_logprobs: int
    top_p: float
    truncation: str = "disabled"
    user: str | None


class DeletedResponse(_Object, frozen=True, kw_only=True):
    id: str
    object: Literal["response"] = "response"
    deleted: Literal[True] = True


class InputCount(_Object, frozen=True, kw_only=True):
    """The number of prompt tokens."""

    object: Literal["response.input_tokens"] = "response.input_tokens"
    input_tokens: int


class InputItems(_Object, frozen=True, kw_only=True):
    """Messages, calls, call outputs and thoughts; those of earlier responses in the chain come first."""

    object: Literal["list"] = "list"
    data: list[Fields]
    first_id: str | None
    last_id: str | None
    has_more: bool


# --- events -----------------------------------------------------------------------------------------


class _Event(_Tagged, frozen=True, kw_only=True):
    sequence_number: Annotated[int, Meta(ge=0)]


class _StatusEvent(_Event, frozen=True, kw_only=True):
    response: ResponseObject


class _ItemEvent(_Event, frozen=True, kw_only=True):
    output_index: int


class _PartEvent(_ItemEvent, frozen=True, kw_only=True):
    item_id: str
    content_index: int = 0


class Created(_StatusEvent, frozen=True, kw_only=True, tag="response.created"):
    pass


class InProgress(_StatusEvent, frozen=True, kw_only=True, tag="response.in_progress"):
    pass


class Completed(_StatusEvent, frozen=True, kw_only=True, tag="response.completed"):
    pass


class IncompleteEvent(_StatusEvent, frozen=True, kw_only=True, tag="response.incomplete"):
    pass


class Failed(_StatusEvent, frozen=True, kw_only=True, tag="response.failed"):
    pass


class ItemAdded(_ItemEvent, frozen=True, kw_only=True, tag="response.output_item.added"):
    item: OutputItem


class ItemDone(_ItemEvent, frozen=True, kw_only=True, tag="response.output_item.done"):
    item: OutputItem


class PartAdded(_PartEvent, frozen=True, kw_only=True, tag="response.content_part.added"):
    part: OutputText | ReasoningText


class PartDone(_PartEvent, frozen=True, kw_only=True, tag="response.content_part.done"):
    part: OutputText | ReasoningText


class TextDelta(_PartEvent, frozen=True, kw_only=True, tag="response.output_text.delta"):
    delta: str
    logprobs: Logprobs


class TextDone(_PartEvent, frozen=True, kw_only=True, tag="response.output_text.done"):
    text: str
    logprobs: Logprobs


class ReasoningDelta(_PartEvent, frozen=True, kw_only=True, tag="response.reasoning_text.delta"):
    delta: str


class ReasoningDone(_PartEvent, frozen=True, kw_only=True, tag="response.reasoning_text.done"):
    text: str


class ArgumentsDelta(_ItemEvent, frozen=True, kw_only=True, tag="response.function_call_arguments.delta"):
    item_id: str
    delta: str


class ArgumentsDone(_ItemEvent, frozen=True, kw_only=True, tag="response.function_call_arguments.done"):
    item_id: str
    name: str
    arguments: str


ResponseEvent = (
    Created
    | InProgress
    | ItemAdded
    | PartAdded
    | TextDelta
    | TextDone
    | ReasoningDelta
    | ReasoningDone
    | ArgumentsDelta
    | ArgumentsDone
    | PartDone
    | ItemDone
    | Completed
    | IncompleteEvent
    | Failed
)
