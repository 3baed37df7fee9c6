"""The JSON objects that answers are made of: OpenAI's where it has one, with vLLM's additions and ours.

Types alone. The OpenAPI document describes answers with them, and the tests hold every answer that they get against it.
"""

from typing import Any, Generic, Literal, NotRequired, TypedDict, TypeVar

from server.batches.store import Status as BatchStatus
from server.finetune.evaluation_store import Score
from server.finetune.evaluation_store import Status as EvaluationStatus
from server.finetune.jobs import JobError
from server.finetune.jobs import Status as JobStatus
from server.messages.protocol import Drift, KVInfo
from server.messages.training import MemoryMode
from server.tenants.caller import Role
from server.tenants.limits import Limits

T = TypeVar("T")


class ErrorDetail(TypedDict):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorObject(TypedDict):
    error: ErrorDetail


class ListObject(TypedDict, Generic[T]):
    """`first_id` and `last_id` are there when the page is not empty; `total` counts all pages' objects."""

    object: Literal["list"]
    data: list[T]
    has_more: NotRequired[bool]
    total: NotRequired[int]
    first_id: NotRequired[str]
    last_id: NotRequired[str]


class DeletedObject(TypedDict):
    id: str
    object: str
    deleted: Literal[True]


# --- generation -------------------------------------------------------------------------------------


class CachedTokens(TypedDict):
    cached_tokens: int


class CompletionDetails(TypedDict, total=False):
    """Predictions are drafts of speculative decoding, there when any were made."""

    reasoning_tokens: int
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class UsageObject(TypedDict):
    """`completion_tokens_details` are there where the model thinks, or drafts were made."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: NotRequired[CompletionDetails]


class Choice(TypedDict):
    index: int
    finish_reason: str | None
    stop_reason: str | int | None
    token_ids: NotRequired[list[int]]  # these and the next with `return_token_ids`


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
    """`content` is null beside calls of tools when there is no text."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning: NotRequired[str]  # the thought before the answer, and again
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCallObject]]


class ChatChoice(Choice):
    message: ChatMessage
    logprobs: ChatLogprobs | None


class FunctionCallDelta(TypedDict):
    name: NotRequired[str]
    arguments: str


class ToolCallDelta(TypedDict):
    """The first of a call has its `id`, `type` and name; the others more of its arguments."""

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
    """`system_fingerprint` is the digest of what answered."""

    id: str
    created: int
    model: str
    system_fingerprint: str


class Completion(Generated):
    """Whole, and each chunk of a stream; `usage` of a chunk is null but in the last, which has no choice."""

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
    """`probs` are of the labels in order: probabilities, or scores without `use_activation`."""

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


# --- adapters ---------------------------------------------------------------------------------------


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
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int | None
    permission: list[Any]


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


class AdapterReceipt(TypedDict):
    """`scaling` is that of most modules; `rows` of device memory per kind of module, in 2-byte units."""

    object: Literal["adapter"]
    name: str
    digest: str
    created_at: int
    pinned: bool
    rank: int
    scaling: float
    modules_matched: int
    variants: list[str]
    parameters: int
    bytes: int
    dtype: str
    rows: dict[str, int]
    base_model_name_or_path: str | None
    warnings: list[str]
    task: NotRequired[Literal["SEQ_CLS"]]
    num_labels: NotRequired[int]
    new_tokens: NotRequired[int]
    tokenizer_tokens: NotRequired[int]
    chat_template: NotRequired[bool]
    stop_token_ids: NotRequired[list[int]]
    trained_tool_format: NotRequired[str]
    trained_reasoning_format: NotRequired[str]


class ListedAdapter(AdapterReceipt):
    """`tier` is the nearest that holds it. Since the server began: requests, tokens, the last one's Unix time."""

    tier: Literal["merged", "device", "host", "disk"]
    requests: int
    tokens: int
    last_used: float | None


class ModuleObject(TypedDict):
    rank: int
    scaling: float


class DecodeSpeed(TypedDict):
    requests: int
    adapter: float
    merged: float
    gain: float


class ResidentMerge(TypedDict):
    dtype: str
    bytes: int
    build_seconds: float
    drift: Drift
    decode_tokens_per_second: list[DecodeSpeed]
    prompts: NotRequired[list[str]]


class AdapterObject(ListedAdapter):
    """`file_metadata` is that of the safetensors file; `bytes_on_device` is null while the engine starts."""

    modules: dict[str, ModuleObject]
    file_metadata: dict[str, str]
    bytes_on_disk: int
    bytes_on_device: int | None
    versions: list[str]
    split: dict[str, float] | None
    shared_with: list[str] | Literal["all"]
    merged: ResidentMerge | None
    stop_tokens: list[StopToken]
    tool_format: str | None
    reasoning_format: str | None


class DeletedAdapter(TypedDict):
    object: Literal["adapter"]
    name: str
    digest: str
    deleted: Literal[True]


class VersionObject(AdapterReceipt):
    current: bool
    staged: bool
    share: float


class Versions(TypedDict):
    object: Literal["list"]
    name: str
    split: dict[str, float] | None
    data: list[VersionObject]


class ShareObject(TypedDict):
    """The tenants that may use the adapter, as OWNER/NAME."""

    object: Literal["adapter.share"]
    name: str
    tenants: list[str] | Literal["all"]


class PinObject(TypedDict):
    object: Literal["adapter.pin"]
    name: str
    pinned: bool
    digests: list[str]
    bytes_on_device: int


class Residency(TypedDict):
    object: Literal["adapter.residency"]
    name: str
    digests: list[str]
    seconds: float


class MeanLogprobs(TypedDict):
    adapter: float
    base: float


class Difference(TypedDict):
    mean: float
    max: float


class Verification(TypedDict):
    object: Literal["adapter.verification"]
    name: str
    digest: str
    prompt_tokens: int
    changes_anything: bool
    mean_logprob: MeanLogprobs
    logprob_difference: Difference
    difference_from_peft: Difference | None


class CheckpointFile(TypedDict):
    name: str
    bytes: int


class MergedCheckpoint(TypedDict):
    dtype: str
    bytes: int
    files: list[CheckpointFile]


class MergeObject(TypedDict):
    object: Literal["merge"]
    name: str
    digest: str
    checkpoint: NotRequired[MergedCheckpoint | None]
    resident: NotRequired[ResidentMerge | None]


class DeletedMerge(TypedDict):
    object: Literal["merge"]
    name: str
    digest: str
    deleted: list[Literal["checkpoint", "resident"]]


# --- training ---------------------------------------------------------------------------------------


class FileObject(TypedDict):
    """`report` counts what checking the file found."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["processed"]
    expires_at: None
    status_details: str | None
    report: dict[str, int] | None


class PreviewedSequence(TypedDict):
    """A text for each token, and whether it counts in the loss."""

    tokens: list[str]
    trained: list[bool]


class PreviewedLine(TypedDict):
    """`length` in tokens; longer sequences than are trained on are `cut`. No sequence: there is nothing to learn."""

    line: int
    length: int
    cut: bool
    sequences: list[PreviewedSequence]


class JobObject(TypedDict):
    """`lora`, `training`, `step`, `total_steps` are ours, and `stop_token_ids` and formats, which its rows taught."""

    id: str
    object: Literal["fine_tuning.job"]
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    error: JobError | None
    fine_tuned_model: str | None
    hyperparameters: dict[str, Any]
    model: str
    organization_id: str
    result_files: list[str]
    seed: int
    status: JobStatus
    trained_tokens: int | None
    training_file: str
    validation_file: str | None
    integrations: list[dict[str, Any]] | None
    metadata: dict[str, str] | None
    method: dict[str, Any]
    lora: dict[str, Any]
    training: dict[str, Any]
    step: int
    total_steps: int | None
    stop_token_ids: list[int]
    tool_format: str | None
    reasoning_format: str | None


class EventObject(TypedDict):
    id: str
    object: Literal["fine_tuning.job.event"]
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any] | None


class CheckpointObject(TypedDict):
    id: str
    object: Literal["fine_tuning.job.checkpoint"]
    created_at: int
    fine_tuned_model_checkpoint: str | None
    fine_tuning_job_id: str
    step_number: int
    metrics: dict[str, float | None]


class Estimate(TypedDict):
    """Bytes; `activations` and `total` by memory mode. `mode` is the faster one that fits, null when neither does."""

    object: Literal["fine_tuning.estimate"]
    parameters: int
    tokens: int
    base: int
    adapter: int
    gradients: int
    optimizer: int
    checkpoint: int
    activations: dict[MemoryMode, int]
    total: dict[MemoryMode, int]
    available: int
    mode: MemoryMode | None


class Scores(TypedDict):
    base: Score
    adapter: Score | None


class EvaluationObject(TypedDict):
    """`results.adapter` is null when the base itself is evaluated; the result file has a line for each example."""

    id: str
    object: Literal["evaluation"]
    status: EvaluationStatus
    created_at: int
    finished_at: int | None
    model: str
    digest: str | None
    file: str
    examples: int | None
    tokens: int | None
    results: Scores | None
    result_files: list[str]
    error: JobError | None


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
    """`errors` are faults of the input file; those of single requests are in the error file."""

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


# --- the server -------------------------------------------------------------------------------------


class Health(TypedDict):
    status: Literal["ok"]


class Readiness(TypedDict):
    """`error` says what is missing."""

    status: Literal["ready", "unavailable"]
    engine_pid: int | None
    base_digest: str | None
    stop_tokens: list[StopToken]
    int8_drift: Drift | None
    kv_cache: KVInfo | None
    error: NotRequired[ErrorDetail]


class Version(TypedDict):
    version: str


class ServerHistory(TypedDict):
    """Columns of equal length, oldest sample first. What a sample cannot know is null."""

    object: Literal["server.history"]
    interval_seconds: float
    limits: dict[str, int | None]
    samples: dict[str, list[float | None]]


class UsageRow(TypedDict):
    """Of one tenant, adapter (null: the base) and day in UTC."""

    object: Literal["usage"]
    id: str
    tenant: str
    adapter: str | None
    day: str
    requests: int
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    trained_tokens: int
    device_seconds: float


class TenantObject(TypedDict):
    """`created_at`: null for the default tenant, which is always there."""

    object: Literal["tenant"]
    id: str
    created_at: int | None
    limits: Limits


class KeyObject(TypedDict):
    """`id` is what the secret begins with; `adapters`: those that it is bound to, null for all."""

    object: Literal["key"]
    id: str
    tenant: str
    name: str
    roles: list[Role]
    adapters: list[str] | None
    created_at: int
    expires_at: int | None
    revoked_at: int | None
    last_used_at: int | None


class NewKeyObject(KeyObject):
    secret: str
