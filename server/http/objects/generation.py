"""Responses of generation, classification, tokenisation and batches."""

from typing import Literal, NotRequired, TypedDict

from server.batches.store import Status as BatchStatus


class CachedTokens(TypedDict):
    cached_tokens: int


class CompletionDetails(TypedDict, total=False):
    """Predictions are drafts of speculative decoding, present if there were any."""

    reasoning_tokens: int
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class UsageObject(TypedDict):
    """`completion_tokens_details` are present if the model thinks or there were drafts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: NotRequired[CompletionDetails]


class Choice(TypedDict):
    index: int
    finish_reason: str | None
    stop_reason: str | int | None
    token_ids: NotRequired[list[int]]  # this and `prompt_token_ids` with `return_token_ids`


class LogprobColumns(TypedDict):
    text_offset: list[int]
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(Choice):
    text: str
    logprobs: LogprobColumns | None
    prompt_token_ids: NotRequired[list[int]]


class TokenAlternative(TypedDict):
    token: str
    logprob: float
    bytes: list[int]


class ChatToken(TokenAlternative):
    top_logprobs: list[TokenAlternative]


class ChatLogprobs(TypedDict):
    content: list[ChatToken]
    refusal: None


class FunctionCall(TypedDict):
    name: str
    arguments: str


class ToolCallObject(TypedDict):
    id: str
    type: Literal["function"]
    function: FunctionCall


class ChatMessage(TypedDict):
    """`content` is null if there are tool calls and no text."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning: NotRequired[str]  # the thought before the answer; `reasoning_content` repeats it
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCallObject]]


class ChatChoice(Choice):
    message: ChatMessage
    logprobs: ChatLogprobs | None


class FunctionCallDelta(TypedDict):
    name: NotRequired[str]
    arguments: str


class ToolCallDelta(TypedDict):
    """A call's first delta has its `id`, `type` and name; the others continue its arguments."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionCallDelta


class ChatDelta(TypedDict, total=False):
    role: Literal["assistant"]
    content: str | None
    reasoning: str
    reasoning_content: str
    tool_calls: list[ToolCallDelta]


class ChatChunkChoice(Choice):
    delta: ChatDelta
    logprobs: ChatLogprobs | None


class Generated(TypedDict):
    """`system_fingerprint` is the digest of the adapter or base that answered."""

    id: str
    created: int
    model: str
    system_fingerprint: str


class Completion(Generated):
    """A completion or a chunk of its stream; a chunk's `usage` is null except in the last, which has no choice."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: NotRequired[UsageObject | None]


class ChatCompletion(Generated):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: UsageObject
    prompt_token_ids: NotRequired[list[int]]


class ChatCompletionChunk(Generated):
    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: NotRequired[UsageObject | None]
    prompt_token_ids: NotRequired[list[int]]


class Classified(TypedDict):
    """`probs` has a value per label, in order: probabilities, or scores without `use_activation`."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class Classification(TypedDict):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Classified]
    usage: UsageObject


class Tokens(TypedDict):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(TypedDict):
    prompt: str


class BatchFaultObject(TypedDict):
    code: str
    message: str
    param: str | None
    line: int | None


class BatchFaultsObject(TypedDict):
    object: Literal["list"]
    data: list[BatchFaultObject]


class RequestCounts(TypedDict):
    total: int
    completed: int
    failed: int


class BatchObject(TypedDict):
    """`errors` are errors in the input file; errors of single requests are in the error file."""

    id: str
    object: Literal["batch"]
    endpoint: str
    errors: BatchFaultsObject | None
    input_file_id: str
    completion_window: Literal["24h"]
    status: BatchStatus
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int | None
    expires_at: int
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    metadata: dict[str, str] | None
