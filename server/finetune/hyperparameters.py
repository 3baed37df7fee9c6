"""The options of a fine-tune, and the resolution of each "auto", done once, when the job is prepared.

Pure functions of the request, the base and the data set's size.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from adapters.peft_format.config import parse_config
from adapters.peft_format.directory import AdapterSpec
from adapters.peft_format.fields import AdapterError
from adapters.peft_format.modules import LoraModule, Variants
from adapters.peft_format.sizes import ExpertsSize, LinearSize
from server.messages.protocol import Ready
from server.messages.training import Init, MemoryMode, ModuleShape, Optimizer, Schedule, TrainingPlan

Auto = Literal["auto"]

DEFAULT_EPOCHS = 3
LARGEST_AUTO_BATCH = 8
DEFAULT_MAX_SEQ_LEN = 2048
MICRO_BATCH_TOKENS = {"cpu": 128, "cuda": 4096}
_IN_A_LAYER = re.compile(r"\.\d+\.")  # in names of modules inside a list, such as a layer
_FUSED = ("FalconH1", "NemotronH")  # PEFT does not adapt `out_proj` in these architectures: fused kernels bypass it


class Hyperparameters(msgspec.Struct, frozen=True, kw_only=True):
    """OpenAI's three hyperparameters."""

    n_epochs: int | Auto = "auto"
    batch_size: int | Auto = "auto"
    learning_rate_multiplier: float | Auto = "auto"


class LoraOptions(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The adapter's shape. Fields of PEFT's `LoraConfig` have the same meaning as there."""

    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    target_parameters: list[str] | None = None
    bias: str = "none"
    modules_to_save: list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool = False
    init: Init = "kaiming"
    scale_vector: bool = False


class TrainingOptions(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Options of training. None: decided from the base, the device and the data."""

    learning_rate: float | None = None
    lr_scheduler: Schedule = "linear"
    warmup_ratio: float = 0.03  # of all steps
    warmup_steps: int | None = None  # instead of the ratio
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    optimizer: Optimizer | None = None
    max_seq_len: int | None = None
    micro_batch_tokens: int | None = None
    packing: bool = True
    completions_only: bool = True
    checkpoint_every: int | None = None  # steps; None: each epoch's end
    eval_every: int | None = None  # steps; None: with each checkpoint
    early_stopping: int | None = None  # evaluations without a better validation loss; None: never


def adapter_config(lora: LoraOptions, name: str, base: Ready) -> dict[str, Any]:
    """Return the `adapter_config.json` of the job's adapter, in PEFT's terms. `name`: the base's.

    Only linears of the layers are trained, and none that PEFT refuses: "all-linear" becomes a list of names if the base
    has others, or experts, which PEFT would include.
    """
    targets = lora.target_modules
    outside = {_kind(linear) for linear in base.linears if not _IN_A_LAYER.search(linear)}
    if base.architecture.startswith(_FUSED):
        outside.add("out_proj")
    if targets == "all-linear" and (outside or base.experts):
        targets = sorted({_kind(linear) for linear in base.linears} - outside)
    of_experts = {"target_parameters": lora.target_parameters} if lora.target_parameters else {}
    return of_experts | {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name,
        "inference_mode": True,
        "r": lora.r,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "target_modules": targets,
        "bias": lora.bias,
        "modules_to_save": lora.modules_to_save,
        "layers_to_transform": lora.layers_to_transform,
        "rank_pattern": lora.rank_pattern or {},
        "alpha_pattern": lora.alpha_pattern or {},
        "use_rslora": lora.use_rslora,
    }


def _kind(name: str) -> str:
    return name.rpartition(".")[2]


def modules(config: Mapping[str, Any], base: Ready) -> dict[str, ModuleShape]:
    """Return the shapes of a config's adapted linears by name, those of experts by their parameter.

    Raises:
        AdapterError: naming the field that is wrong, or that cannot be trained here.
    """
    for field, trained in (("bias", "none"), ("modules_to_save", None)):
        if config[field] != trained:
            raise AdapterError(f"{field} = {json.dumps(config[field])} is not trained here, only A and B are", field)
    parsed = parse_config(json.dumps(config).encode())
    parsed.check_plain()
    resolved = parsed.resolve(base.linears, experts=base.experts)
    return {name: ModuleShape(rank, scaling) for name, (rank, scaling) in resolved.items()}


def trained_on(adapter: AdapterSpec) -> dict[str, ModuleShape]:
    """Return the shapes of an adapter to continue from, as `modules` does. Raises AdapterError if untrainable here."""
    variants = [kind for kind in adapter.variants.names if kind != "experts"]
    if variants:
        raise AdapterError(f"has more than A and B ({', '.join(variants)}), which is not trained here", "model")
    shapes = {name: ModuleShape(pair.rank, pair.scaling) for name, pair in adapter.modules.items()}
    for name, pair in adapter.variants.experts.items():
        expert_part = (pair.parameter, pair.part, pair.parts) if name != pair.parameter else ()
        shapes[name] = ModuleShape(pair.rank, pair.scaling, *expert_part)
    return shapes


def parameters(shapes: Mapping[str, ModuleShape], base: Ready) -> int:
    """Return the number of parameters in A and B: rank x (in + out) for each linear, of each expert."""
    sizes: dict[str, LinearSize | ExpertsSize] = {**base.linears, **base.experts}
    adapted = [(shape.rank, shape.size(name, sizes)) for name, shape in shapes.items()]
    return sum(rank * size.pairs * (size.in_features + size.out_features) for rank, size in adapted)


def max_seq_len(training: TrainingOptions, base: Ready) -> int:
    """Return the most tokens of an example; longer ones are cut."""
    return min(training.max_seq_len or DEFAULT_MAX_SEQ_LEN, base.max_model_len)


def micro_batch_tokens(training: TrainingOptions, base: Ready) -> int:
    """Return the tokens of a pass: the job's option, or the device's default."""
    return training.micro_batch_tokens or MICRO_BATCH_TOKENS[base.device.partition(":")[0]]


def optimizer(training: TrainingOptions, base: Ready) -> Optimizer:
    """Return the optimiser: the job's option, or a default, unpaged on a CPU, where there is nothing to page."""
    return training.optimizer or ("adamw" if base.device == "cpu" else "paged_adamw_32bit")


def learning_rate(base: Ready) -> float:
    """Return a peak rate for LoRA by the base's width: 5e-4 at 2000, less for wider models.

    The exponent is the fit of Schulman et al., "LoRA Without Regret" (2025), for Llama models.
    """
    [(width, _)] = Counter(linear.in_features for linear in base.linears.values()).most_common(1)
    return float(f"{5e-4 * (2000 / width) ** 0.78:.1e}")


def hyperparameters(given: Hyperparameters, examples: int) -> Hyperparameters:
    """Return the three hyperparameters with every "auto" decided."""
    return Hyperparameters(
        n_epochs=DEFAULT_EPOCHS if given.n_epochs == "auto" else given.n_epochs,
        batch_size=max(1, min(LARGEST_AUTO_BATCH, examples // 10)) if given.batch_size == "auto" else given.batch_size,
        learning_rate_multiplier=1.0 if given.learning_rate_multiplier == "auto" else given.learning_rate_multiplier,
    )


def plan(
    given: Hyperparameters,
    lora: LoraOptions,
    training: TrainingOptions,
    *,
    seed: int,
    sequences: int,
    base: Ready,
    memory: MemoryMode = "recompute",
) -> TrainingPlan:
    """Return all parameters of the job's arithmetic, for a training set of `sequences`."""
    decided = hyperparameters(given, sequences)
    n_epochs, batch_size = int(decided.n_epochs), int(decided.batch_size)
    multiplier = float(decided.learning_rate_multiplier)
    steps = n_epochs * math.ceil(sequences / batch_size)
    warmup = math.ceil(training.warmup_ratio * steps) if training.warmup_steps is None else training.warmup_steps
    return TrainingPlan(
        seed=seed,
        n_epochs=n_epochs,
        batch_size=batch_size,
        micro_batch_tokens=micro_batch_tokens(training, base),
        packing=training.packing,
        learning_rate=multiplier * (training.learning_rate or learning_rate(base)),
        lr_scheduler=training.lr_scheduler,
        warmup_steps=min(warmup, steps),
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        optimizer=optimizer(training, base),
        lora_dropout=lora.lora_dropout,
        init=lora.init,
        scale_vector=lora.scale_vector,
        memory=memory,
        checkpoint_every=training.checkpoint_every or 0,
        eval_every=training.eval_every or 0,
        early_stopping=training.early_stopping or 0,
    )


def saved_spec(shapes: Mapping[str, ModuleShape], base: Ready) -> AdapterSpec:
    """Return the spec of a saved adapter of these shapes, as far as memory is concerned."""
    modules = {
        name: LoraModule(shape.rank, shape.scaling, "", "") for name, shape in shapes.items() if name in base.linears
    }
    of_experts = {name: shape for name, shape in shapes.items() if name in base.experts}
    return AdapterSpec(
        digest="",
        config={},
        modules=modules,
        dtype="float32",
        rank=max(shape.rank for shape in shapes.values()),
        parameters=0,
        bytes=0,
        variants=Variants(device_bytes=4 * parameters(of_experts, base)),
    )
