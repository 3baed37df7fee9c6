"""Files, fine-tuning jobs and evaluations."""

from typing import Any, Literal, TypedDict

from server.finetune.evaluation_store import Score
from server.finetune.evaluation_store import Status as EvaluationStatus
from server.finetune.jobs import JobError
from server.finetune.jobs import Status as JobStatus
from server.messages.training import MemoryMode


class FileObject(TypedDict):
    """`report` has the counts of the file's validation."""

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
    """The text of each token, and whether it counts in the loss."""

    tokens: list[str]
    trained: list[bool]


class PreviewedLine(TypedDict):
    """`length` in tokens; sequences above the training length are `cut`. No sequences: nothing to learn."""

    line: int
    length: int
    cut: bool
    sequences: list[PreviewedSequence]


class JobObject(TypedDict):
    """`lora`, `training`, `step`, `total_steps` are ours, like `stop_token_ids` and formats, which the data taught."""

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
    """In bytes; `activations` and `total` by memory mode. `mode` is the faster that fits, null if neither does."""

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
