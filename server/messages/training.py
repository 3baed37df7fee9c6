"""The messages about training between the API process and the engine process.

The API process starts and stops jobs and owns everything durable; the engine process trains, and writes tensors only
into the directories named to it. Structs in the style of `server.messages.protocol`, and part of its unions.
"""

from collections.abc import Mapping
from typing import Literal

import msgspec

from adapters.peft_format.sizes import ExpertsSize, LinearSize

Optimizer = Literal["adamw", "paged_adamw_32bit", "paged_adamw_8bit"]
Schedule = Literal["linear", "cosine", "constant"]
Init = Literal["kaiming", "gaussian"]
MemoryMode = Literal["recompute", "keep"]


CHECKPOINTS = "checkpoints"  # their folder in a job's directory
STORAGE_FULL = "storage_full"  # the `code` of a `JobEnded` after a checkpoint found no disk space


class _Message(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Base of these messages; the struct's name is its tag."""


class ModuleShape(msgspec.Struct, frozen=True, array_like=True):
    """The adapter's update of one linear, one for all experts alike, or one per expert (the name then has a *).

    Attributes:
        parameter: for experts with linears of their own, the base's parameter that holds these.
        part: index of these linears among `parts` equal parts of that parameter's outputs.
    """

    rank: int
    scaling: float
    parameter: str = ""
    part: int = 0
    parts: int = 1

    def of(self, name: str) -> str:
        """Return the base's linear, or parameter of experts, adapted under this name."""
        return self.parameter or name

    def size(self, name: str, sizes: Mapping[str, LinearSize | ExpertsSize]) -> LinearSize | ExpertsSize:
        """Return the size of the linear adapted under this name. `sizes`: of linears and experts' parameters."""
        size = sizes[self.of(name)]
        return size._replace(out_features=size.out_features // self.parts)


class TrainingPlan(msgspec.Struct, frozen=True, kw_only=True):
    """All parameters of a job's arithmetic. Fixed when the job first starts; the server's load never changes them."""

    seed: int
    n_epochs: int
    batch_size: int  # examples per optimiser step
    micro_batch_tokens: int  # tokens per pass; splits a batch without changing the result
    packing: bool = True  # several sequences per pass, without attention across them
    learning_rate: float
    lr_scheduler: Schedule = "linear"
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0  # 0: no clipping
    optimizer: Optimizer = "adamw"
    lora_dropout: float = 0.0
    init: Init = "kaiming"
    scale_vector: bool = False  # a trained factor per output of each linear, folded into B when saved
    memory: MemoryMode = "recompute"
    checkpoint_every: int = 0  # steps; 0: at each epoch's end
    eval_every: int = 0  # steps; 0: with each checkpoint only
    early_stopping: int = 0  # number of full evaluations without a better validation loss before stopping; 0: off


# --- API process -> engine --------------------------------------------------------------------------


class StartJob(_Message, frozen=True, kw_only=True):
    """Train, from the beginning or from a saved state. Answered by a stream of the messages below.

    `directory` is the job's own: the engine writes `directory/checkpoints/step-N/` and reports it in a `Checkpoint`.
    """

    id: str
    directory: str
    train_data: str  # `Dataset` files
    valid_data: str | None = None
    modules: dict[str, ModuleShape]  # by full module name
    config: dict[str, object]  # adapter_config.json of the resulting adapter
    plan: TrainingPlan
    initial: str | None = None  # directory of an adapter to continue from
    resume: str | None = None  # directory of a checkpoint of this job to resume


class StopJob(_Message, frozen=True):
    """End after the current optimiser step. `save` writes a checkpoint first (pause); otherwise nothing is kept."""

    id: str
    save: bool


class PlanMemory(_Message, frozen=True, kw_only=True):
    """Ask for the memory that a job would need. Answered by a `MemoryPlan` of the same id, or `Done` with an error."""

    id: str
    modules: dict[str, ModuleShape]
    optimizer: Optimizer
    scale_vector: bool
    tokens: int  # of its largest pass


# --- engine -> API process --------------------------------------------------------------------------


class Metrics(msgspec.Struct, frozen=True, omit_defaults=True):
    """OpenAI's metrics of one step. Losses are means over trained tokens, in nats."""

    step: int
    train_loss: float | None = None
    train_mean_token_accuracy: float | None = None
    valid_loss: float | None = None
    valid_mean_token_accuracy: float | None = None
    full_valid_loss: float | None = None
    full_valid_mean_token_accuracy: float | None = None


class TrainingStep(_Message, frozen=True, kw_only=True):
    """The results of one optimiser step."""

    id: str
    metrics: Metrics
    total_steps: int
    learning_rate: float
    grad_norm: float  # before clipping
    trained_tokens: int  # since the job's beginning
    seconds: float  # wall time of the step
    busy_seconds: float  # of this, device time of the job's passes


class Checkpoint(_Message, frozen=True, kw_only=True):
    """A complete checkpoint in `directory`, not yet synced: adapter files, optimiser state, the job's position.

    A "state" serves only to resume: it is written when the job is paused, and at intervals.
    """

    id: str
    metrics: Metrics
    directory: str
    trained_tokens: int
    kind: Literal["checkpoint", "state", "final"]


class JobEnded(_Message, frozen=True, kw_only=True):
    """The last message of a job."""

    id: str
    outcome: Literal["succeeded", "paused", "cancelled", "failed"]
    code: str | None = None  # of a failure
    message: str | None = None


class JobNote(_Message, frozen=True):
    """A notice to the job's owner."""

    id: str
    level: Literal["info", "warn"]
    message: str


class MemoryPlan(_Message, frozen=True, kw_only=True):
    """Bytes that a job would take beside the base, which is loaded already.

    `checkpoint` is the copy held while a checkpoint is written. `mode` is the faster memory mode that fits into
    `available`, None when neither does.
    """

    id: str
    base: int
    adapter: int
    gradients: int
    optimizer: int
    checkpoint: int
    activations: dict[MemoryMode, int]
    available: int
    mode: MemoryMode | None

    def total(self, mode: MemoryMode) -> int:
        """A job's bytes in one mode, without the base."""
        return self.adapter + self.gradients + self.optimizer + self.checkpoint + self.activations[mode]


JobRequest = StartJob | StopJob | PlanMemory
JobReply = TrainingStep | Checkpoint | JobNote | JobEnded
