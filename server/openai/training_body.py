"""The bodies of fine-tuning requests: fields, ranges, defaults, and conversion to a job's options.

Checks that depend on the base and the files are in the handlers.
"""

import importlib.util
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from server.errors import InvalidRequest
from server.finetune.hyperparameters import Hyperparameters, LoraOptions, TrainingOptions
from server.openai.body import Body, Entries, Items, Metadata
from server.openai.schema import INT32

Auto = Literal["auto"]
_SUFFIX = r"^[A-Za-z0-9._-]{1,64}$"


class HyperparametersBody(Body):
    """OpenAI's three hyperparameters."""

    n_epochs: Auto | Annotated[int, Field(ge=1, le=1000)] = "auto"
    batch_size: Auto | Annotated[int, Field(ge=1, le=4096)] = "auto"
    learning_rate_multiplier: Auto | Annotated[float, Field(gt=0, le=1000)] = "auto"

    def options(self) -> Hyperparameters:
        return Hyperparameters(**self.model_dump())


class SupervisedBody(Body):
    hyperparameters: HyperparametersBody = HyperparametersBody()


class MethodBody(Body):
    type: Literal["supervised"]
    supervised: SupervisedBody = SupervisedBody()


class LoraBody(Body):
    """The adapter's shape. Values are checked against the base by the reader of adapter configs."""

    r: int | None = None
    lora_alpha: float | None = None
    lora_dropout: float | None = Field(default=None, ge=0, lt=1)
    target_modules: str | Items[str] | None = None
    target_parameters: Items[str] | None = None
    bias: str | None = None
    modules_to_save: Items[str] | None = None
    layers_to_transform: int | Items[int] | None = None
    rank_pattern: Entries[str, int] | None = None
    alpha_pattern: Entries[str, float] | None = None
    use_rslora: bool | None = None
    init: Literal["kaiming", "gaussian"] | None = None
    scale_vector: bool | None = None

    def options(self) -> LoraOptions:
        return LoraOptions(**self.model_dump(exclude_none=True))


class TrainingBody(Body):
    """Options of the training run."""

    learning_rate: float | None = Field(default=None, gt=0, le=1)
    lr_scheduler: Literal["linear", "cosine", "constant"] | None = None
    warmup_ratio: float | None = Field(default=None, ge=0, le=1)
    warmup_steps: int | None = Field(default=None, ge=0, le=INT32)
    weight_decay: float | None = Field(default=None, ge=0, le=1)
    max_grad_norm: float | None = Field(default=None, ge=0, le=1e6)
    optimizer: Literal["adamw", "paged_adamw_32bit", "paged_adamw_8bit"] | None = None
    max_seq_len: int | None = Field(default=None, ge=8, le=INT32)
    micro_batch_tokens: int | None = Field(default=None, ge=1, le=1 << 20)
    packing: bool | None = None
    completions_only: bool | None = None
    checkpoint_every: int | None = Field(default=None, ge=1, le=INT32)
    eval_every: int | None = Field(default=None, ge=1, le=INT32)
    early_stopping: int | None = Field(default=None, ge=1, le=1000)

    def options(self) -> TrainingOptions:
        return TrainingOptions(**self.model_dump(exclude_none=True))


class WandbBody(Body):
    project: str = Field(min_length=1, max_length=128)
    entity: str | None = Field(default=None, min_length=1, max_length=128)
    name: str | None = Field(default=None, min_length=1, max_length=128)
    tags: Items[Annotated[str, Field(min_length=1, max_length=64)]] = Field(default=[], max_length=50)


class IntegrationBody(Body):
    type: Literal["wandb"]
    wandb: WandbBody

    @model_validator(mode="after")
    def _installed(self) -> "IntegrationBody":
        if importlib.util.find_spec("wandb") is None:
            raise ValueError("the wandb package is not installed on this server: pip install wandb")
        return self


class JobBody(Body):
    """The body of `POST /v1/fine_tuning/jobs`."""

    no_ops: ClassVar[dict[str, tuple[Any, ...]]] = {"integrations": ([],)}

    model: str = Field(min_length=1)
    training_file: str = Field(min_length=1)
    validation_file: str | None = Field(default=None, min_length=1)
    suffix: str | None = Field(default=None, pattern=_SUFFIX)
    seed: int | None = Field(default=None, ge=0, le=INT32)
    metadata: Metadata | None = None
    method: MethodBody | None = None
    hyperparameters: HyperparametersBody | None = None
    integrations: Items[IntegrationBody] | None = Field(default=None, max_length=1)
    lora: LoraBody | None = None
    training: TrainingBody | None = None

    @property
    def chosen_hyperparameters(self) -> Hyperparameters:
        """The hyperparameters, from `method` or from the deprecated field."""
        if self.method is not None and self.hyperparameters is not None:
            message = "`hyperparameters` is deprecated and cannot be combined with `method`."
            raise InvalidRequest(message, param="hyperparameters")
        if self.method is not None:
            return self.method.supervised.hyperparameters.options()
        return (self.hyperparameters or HyperparametersBody()).options()


class EstimateBody(Body):
    """The body of `POST /v1/fine_tuning/estimate`."""

    model: str = Field(min_length=1)
    lora: LoraBody | None = None
    training: TrainingBody | None = None
