"""Mixtures of experts: taken out of a model before its weights are read, then read expert by expert and quantised.

transformers holds each linear of a layer's experts as one parameter, which its own loading would read whole and leave
unquantised. Files hold it like that or as one tensor per expert, as transformers' conversions describe.
"""

import copy
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    Interleave,
    MergeModulelist,
    Transpose,
    WeightConverter,
    dot_natural_key,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from adapters.device import experts
from adapters.device.experts import ExpertLinear
from adapters.device.lora import StepSlot
from adapters.kernels import ExpertWeights
from adapters.peft_format.outline import weight_files
from server.model import UnservableModel, naming

EXPERTS = "lorakeet"
FILE = "experts.safetensors"  # of a quantised copy
MXFP4 = "mxfp4"  # storage in which only experts are quantised; they are decoded when read

_PER_EXPERT = (MergeModulelist, Concatenate, Transpose, Interleave)  # conversions that treat each expert separately
_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def register() -> None:
    """Register `EXPERTS` as an experts implementation of transformers. Must precede `from_pretrained`."""
    ALL_EXPERTS_FUNCTIONS.register(EXPERTS, experts.forward)


def expert_count_entry(config: Any) -> str | None:
    """Return a text model's number of experts as an entry of its config, for messages; None without experts."""
    parts = [part for part in (config, getattr(config, "ffn_config", None)) if part is not None]
    counts = ((name, getattr(part, name, None)) for part in parts for name in _COUNTS)
    return next((f"{name} = {count}" for name, count in counts if count), None)


def replace_experts(model: transformers.PreTrainedModel) -> None:
    """Replace the experts' weights with empty `ExpertLinear`s.

    Raises UnservableModel for experts that do not follow transformers' interface for experts.
    """
    found = []
    for name, module in list(model.named_modules()):
        if hasattr(module, "is_transposed") and hasattr(module, "has_post_expert_norm"):
            parameters = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
            for part in [part for part in module._parameters if part in parameters]:
                shape = getattr(module, part).shape
                delattr(module, part)
                setattr(module, part, ExpertLinear(shape, bool(module.is_transposed)))
                found.append(f"{name}.{part}")
    text = expert_count_entry(model.config.get_text_config())
    unsupported = [
        name for name, weight in model.get_decoder().named_parameters() if "expert" in name and weight.dim() > 2
    ]
    if unsupported or (text and not found):
        where = f"{text}; {unsupported[0]}" if text and unsupported else text or unsupported[0]
        raise UnservableModel(f"mixture-of-experts models of this shape are not served ({where})")
    model._keys_to_ignore_on_load_unexpected = {
        *(model._keys_to_ignore_on_load_unexpected or ()),
        *(rf"{re.escape(name.partition('.')[2])}(_blocks|_scales)?$" for name in found),
    }


def linears(model: nn.Module) -> dict[str, ExpertLinear]:
    """Return the experts' linears of a model, by full name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, ExpertLinear)}


def attach(
    model: transformers.PreTrainedModel, slot: StepSlot, first: int, renamed: Mapping[str, str]
) -> list[ExpertLinear]:
    """Attach the experts' linears to `slot` for adapters, with indices from `first` on.

    Args:
        renamed: parameter in the model's files -> in the model, where these differ.
    """
    parts_of = _expert_parts(model)
    others = {}  # module -> its name in the files
    for theirs, ours in renamed.items():
        while "." in ours and ours.rpartition(".")[2] == theirs.rpartition(".")[2]:
            ours, theirs = ours.rpartition(".")[0], theirs.rpartition(".")[0]
        others[f"{ours}."] = f"{theirs}."
    found = linears(model)
    for index, (name, linear) in enumerate(found.items(), first):
        module = f"{name.rpartition('.')[0]}."
        modules = [
            module,
            *(theirs + module[len(ours) :] for ours, theirs in others.items() if module.startswith(ours)),
        ]
        parts = next((parts for end, parts in parts_of.items() if f".{name}".endswith(f".{end}")), [])
        linear.size = linear.size._replace(
            parts=tuple(tuple(f"{module}*.{part}" for module in modules) for part in parts)
        )
        linear.attach(name, index, slot)
    return list(found.values())


def _expert_parts(model: transformers.PreTrainedModel) -> dict[str, list[str]]:
    """Return the names of the single experts' linears that make up a parameter, by the end of its name."""
    found = {}
    for conversion in get_model_conversion_mapping(model):
        if isinstance(conversion, WeightConverter) and len(conversion.target_patterns) == 1:
            steps = {type(step) for step in conversion.operations}
            if MergeModulelist in steps and steps <= {MergeModulelist, Concatenate}:
                target = conversion.target_patterns[0].replace("\\", "").lstrip(".")
                found[target] = [pattern.split(".")[-2] for pattern in conversion.source_patterns]
    return found


def read(
    model: transformers.PreTrainedModel, directory: Path, kind: str, dtype: torch.dtype, device: torch.device
) -> None:
    """Read the experts from the model's files, one at a time, and quantise them (`ExpertWeights.quantize`).

    Raises UnservableModel for missing experts or unexpected shapes.
    """
    targets = linears(model)
    if not targets:
        return
    map_name = naming.name_mapper(model)
    converters = {
        pattern: conversion
        for conversion in get_model_conversion_mapping(model)
        if isinstance(conversion, WeightConverter)
        for pattern in conversion.source_patterns
    }
    sources: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    with ExitStack() as files:
        opened = [files.enter_context(safe_open(path, "pt")) for path in weight_files(directory)]
        file_of = {name: file for file in opened for name in file.keys()}  # noqa: SIM118 - it is no dict
        for name in sorted(file_of, key=dot_natural_key):
            target, pattern = map_name(name)
            packed = re.fullmatch(r"(.+)_(blocks|scales)", target)
            if packed and packed[1] in targets:
                target, pattern = packed[1], packed[2]
            if target in targets:
                sources[target][pattern or ""].append(name)

        def tensor(name: str, expert: int | None) -> Tensor:
            part = file_of[name].get_slice(name)
            read: Tensor = part[:] if expert is None else part[expert : expert + 1]
            return read

        def dense(target: str, linear: ExpertLinear) -> Iterator[Tensor]:
            for expert in range(linear.shape[0]):
                weight = _read_expert(target, linear.shape, sources[target], converters, expert, tensor)
                if weight.shape != (1, *linear.shape[1:]) or not weight.is_floating_point():
                    raise UnservableModel(
                        f"{target} has experts of shape {tuple(weight.shape)} and {weight.dtype} in the files"
                    )
                yield (weight[0].T if linear.transposed else weight[0]).to(device, dtype)

        for target, linear in targets.items():
            linear.fill(ExpertWeights.quantize(dense(target, linear), kind, dtype), dtype)


def _read_expert(
    target: str,
    shape: torch.Size,
    sources: dict[str, list[str]],
    converters: dict[str, WeightConverter],
    expert: int,
    read: Callable[[str, int | None], Tensor],
) -> Tensor:
    """Return one expert's part of a parameter, `[1, ...]`, made by the whole parameter's conversion."""
    if not sources:
        raise UnservableModel(f"{target} is not in the files")
    if "" in sources:
        return read(sources[""][0], expert)
    if "blocks" in sources:
        return convert_moe_packed_tensors(*(read(sources[part][0], expert) for part in ("blocks", "scales")))
    converter: Any = copy.deepcopy(converters[next(iter(sources))])
    other = [type(step).__name__ for step in converter.operations if not isinstance(step, _PER_EXPERT)]
    if other:
        raise UnservableModel(f"{target} is made from its files by {other[0]}, which mixes experts: it is not served")
    separate = any(isinstance(step, MergeModulelist) for step in converter.operations)
    for pattern, names in sources.items():
        if separate and len(names) <= expert:
            raise UnservableModel(f"{target} lacks expert {expert} in the files")
        name = names[expert] if separate else names[0]
        converter.collected_tensors[pattern].append(read(name, None if separate else expert))
    # A model of one expert, for conversions that read the parameter's shape.
    single_expert = SimpleNamespace(get_parameter=lambda _: torch.empty((1, *shape[1:]), device="meta"))
    made: Tensor | list[Tensor] = converter.convert(target, model=single_expert)[target]
    return made[0] if isinstance(made, list) else made


def save(model: nn.Module, directory: Path) -> None:
    """Write the experts of a quantised copy, if any."""
    tensors: dict[str, Tensor] = {}
    kept: dict[str, str] = {}
    for name, linear in linears(model).items():
        tensors |= {f"{name}.{part}": tensor.clone() for part, tensor in linear.weights.tensors().items()}
        kept = {part: str(getattr(linear.weights, part)) for part in ("kind", "blocksize", "nested_blocksize")}
    if tensors:
        save_file(tensors, directory / FILE, metadata=kept)


def load(model: nn.Module, directory: Path, dtype: torch.dtype, device: torch.device) -> None:
    """Read the experts written by `save`."""
    if not linears(model):
        return
    with safe_open(directory / FILE, "pt", device=str(device)) as file:
        kept, stored = file.metadata(), list(file.keys())
        for name, linear in linears(model).items():
            parts = {key.removeprefix(f"{name}."): file.get_tensor(key) for key in stored if key.startswith(f"{name}.")}
            out, inner = linear.shape[:0:-1] if linear.transposed else linear.shape[1:]
            weights = ExpertWeights(
                kind=kept["kind"],
                shape=(out, inner),
                blocksize=int(kept["blocksize"]),
                nested_blocksize=int(kept["nested_blocksize"]),
                **parts,
            )
            linear.fill(weights, dtype)


def pad_routers(model: nn.Module) -> list[nn.Module]:
    """Make routers batch-invariant: all modules next to experts that multiply by their own parameter."""
    found: list[nn.Module] = []
    for name, module in list(model.named_modules()):
        if not any(isinstance(child, ExpertLinear) for child in module.children()):
            continue
        for router in model.get_submodule(name.rpartition(".")[0]).modules():
            own = [weight for weight in router._parameters.values() if weight is not None and weight.dim() == 2]
            if own and router is not module and not isinstance(router, nn.Linear | nn.Embedding):
                experts.pad_router(router, own[0])
                found.append(router)
    return found
