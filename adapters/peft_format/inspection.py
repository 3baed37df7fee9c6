"""Validation of an uploaded adapter, read in full and trusted in nothing.

It reads the safetensors header itself, finds a use for every tensor (layout.py) and checks every value. With numpy
only, so that it can run in a process of its own without torch and delay nothing else.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from adapters.peft_format import packed_rows
from adapters.peft_format.config import MAX_CONFIG_BYTES, AdapterConfig, parse_config
from adapters.peft_format.conversion import convert
from adapters.peft_format.directory import CONFIG_NAME, SPEC_NAME, WEIGHTS_NAME, AdapterSpec, check_not_swapped
from adapters.peft_format.fields import AdapterError, shorten
from adapters.peft_format.layout import layout
from adapters.peft_format.matching import check_tensors, count_new_tokens
from adapters.peft_format.modules import LoraModule, Variants
from adapters.peft_format.outline import Outline
from adapters.peft_format.sizes import LinearSize
from adapters.peft_format.spelling import names_in_file, non_text_module, respelled, respelled_layout, respelled_outline
from adapters.peft_format.text import NO_TEXT, AdapterText
from adapters.peft_format.weights import (
    FORMATS,
    TensorEntry,
    check_finite,
    is_zero,
    last_rows_bytes,
    read_chunks,
    read_header,
)
from adapters.safetensors_header import CONVERT_HINT

_ROWS = 4096  # rows compared at a time


@dataclass(frozen=True)
class Check:
    """The arguments of `inspect`."""

    directory: Path
    linears: Mapping[str, LinearSize]
    model_class: str
    outline: Outline | None
    text: AdapterText
    ignore_vision: bool = False


def inspect_adapter(check: Check) -> AdapterSpec:
    """Convert and inspect the adapter, and lay out its rows beside it. Raises AdapterError, OSError."""
    weights = check.directory / WEIGHTS_NAME
    converted = convert(weights) if weights.is_file() else []
    arguments = check.directory, check.linears, check.model_class, check.outline, check.text
    spec = inspect(*arguments, ignore_vision=check.ignore_vision)
    spec = dataclasses.replace(spec, warnings=(*converted, *spec.warnings))
    packed_rows.write(check.directory, spec)
    return spec


def inspect(
    directory: Path,
    linears: Mapping[str, LinearSize],
    model_class: str,
    outline: Outline | None = None,
    text: AdapterText = NO_TEXT,
    *,
    ignore_vision: bool = False,
) -> AdapterSpec:
    """Validate the adapter in `directory` against a base, reading every byte of it.

    Args:
        linears: full module name -> shape, for every linear of the base's decoder.
        model_class: the base's class, such as "LlamaForCausalLM".
        outline: the base's other parameters; without, an adapter may change linears only.
        text: the adapter's tokens and chat template.
        ignore_vision: accept an adapter that also changes parts of the base not used for text.

    Raises:
        AdapterError: naming the config field, the tensor, or the file (`config`, `weights`) at fault.
        OSError: a fault of the disk, not of the adapter.
    """
    config = parse_config(_read_config(directory))
    config.check_class(model_class)
    outline = outline or Outline()
    if config.is_classifier:
        outline = outline.without_head()
    path = directory / WEIGHTS_NAME
    if not path.is_file():
        raise AdapterError(
            f"the adapter has no {WEIGHTS_NAME}: pickled weights (.bin, .pt) are not accepted. {CONVERT_HINT}",
            "weights",
        )
    with path.open("rb") as file:
        tensors = read_header(file)
        names = names_in_file(tensors, linears, outline)
        linears, outline = respelled(linears, names), respelled_outline(outline, names)
        outline = outline.with_new_tokens(count_new_tokens(tensors, outline))
        plan = layout(config, linears, outline, tensors)
        warnings = [*_unknown_fields(config), *plan.warnings, *check_tensors(tensors, plan, linears, outline)]
        plan = respelled_layout(plan, {theirs: ours for ours, theirs in names.items()})
        digest = hashlib.sha256(_digest_preamble(plan.modules, plan.variants, text))
        for name, tensor in sorted(tensors.items()):
            digest.update(_digest_heading(name, tensor))
            is_non_text = not ignore_vision and non_text_module(name, outline) is not None and ".lora_A." not in name
            for chunk in read_chunks(file, tensor):
                digest.update(chunk)
                check_finite(chunk, name, tensor)
                # In a tower that saw no training data, B is still zero: the tower is unchanged.
                if is_non_text and not (".lora_B." in name and is_zero(chunk, tensor)):
                    raise AdapterError(
                        f"tensor '{shorten(name)}' changes '{non_text_module(name, outline)}', which is not used for "
                        "text: images and sound are not served. --ignore-vision-adapters serves the rest",
                        name,
                        "unsupported_adapter_feature",
                    )
            twin = plan.duplicates.get(name)
            if twin is not None and not _are_equal(file, tensor, tensors[twin]):
                raise AdapterError(f"tensor '{name}' differs from '{twin}', although both are one parameter", name)
            twin = plan.transposed.get(name)
            if twin is not None and not _are_transposed(file, tensor, tensors[twin]):
                raise AdapterError(
                    f"tensor '{name}' is not the transpose of '{twin}': with ensure_weight_tying PEFT has one pair for "
                    "both where the base is fp32, and two where it was trained in bf16. To serve both as they are, set "
                    "ensure_weight_tying to false and name embedding and head in target_modules",
                    name,
                )
            theirs = tensor._replace(end=tensor.end - last_rows_bytes(tensor, max(outline.new_tokens, 0)))
            if name not in plan.base_copies:
                continue
            rounded_to = outline.matching_dtype(plan.base_copies[name], tensor.dtype, read_chunks(file, theirs))
            if rounded_to is None:
                raise AdapterError(
                    f"tensor '{name}' differs from the served base's: the adapter belongs to another base, or "
                    "changed this one. List the module in modules_to_save to serve it with these weights",
                    name,
                    "base_mismatch",
                )
            if rounded_to != outline.resolve_parameter(plan.base_copies[name]).dtype:
                warnings.append(f"'{name}' is the base's, rounded to {rounded_to}: the base's own is served")
    spec = AdapterSpec(
        digest=f"sha256:{digest.hexdigest()}",
        config=config.normalised(),
        modules=plan.modules,
        dtype="float32",
        rank=0,
        parameters=sum(math.prod(tensor.shape) for tensor in tensors.values()),
        bytes=sum(tensor.end - tensor.start for tensor in tensors.values()),
        warnings=tuple(warnings),
        variants=dataclasses.replace(plan.variants, device_bytes=_device_bytes(plan.variants, tensors, outline)),
        text=text,
    )
    dtypes = {FORMATS[tensors[name].dtype].name for module in spec.adapted.values() for name in module.tensors}
    return dataclasses.replace(
        spec,
        dtype=dtypes.pop() if len(dtypes) == 1 else "float32",
        rank=max(module.rank for module in spec.adapted.values()),
    )


def digest_of(directory: Path) -> str:
    """The digest of an adapter that passed `inspect`, recomputed from its spec and all its numbers.

    Raises AdapterError, or an error of the JSON reader, when the files are damaged.
    """
    spec = AdapterSpec.parse((directory / SPEC_NAME).read_text())
    digest = hashlib.sha256(_digest_preamble(spec.modules, spec.variants, spec.text))
    with (directory / WEIGHTS_NAME).open("rb") as file:
        for name, tensor in sorted(read_header(file).items()):
            digest.update(_digest_heading(name, tensor))
            for chunk in read_chunks(file, tensor):
                digest.update(chunk)
    return f"sha256:{digest.hexdigest()}"


def _read_config(directory: Path) -> bytes:
    path = directory / CONFIG_NAME
    if not path.is_file():
        raise AdapterError(f"the adapter has no {CONFIG_NAME}", "config")
    with path.open("rb") as file:
        raw = file.read(MAX_CONFIG_BYTES + 1)
    check_not_swapped(raw)
    return raw


def _unknown_fields(config: AdapterConfig) -> list[str]:
    return [f"config has the unknown field '{shorten(name)}', which is ignored" for name in config.unknown]


def _are_equal(file: BinaryIO, one: TensorEntry, other: TensorEntry) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with open(file.name, "rb") as again:  # noqa: PTH123 - two places of one file, read side by side
        return all(a == b for a, b in zip(read_chunks(file, one), read_chunks(again, other), strict=True))


def _are_transposed(file: BinaryIO, one: TensorEntry, other: TensorEntry) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape[::-1]):
        return False
    bits = f"<u{FORMATS[one.dtype].itemsize}"
    a, b = (np.memmap(file.name, bits, "r", tensor.start, tensor.shape) for tensor in (one, other))
    return all(np.array_equal(a[i : i + _ROWS], b[:, i : i + _ROWS].T) for i in range(0, len(a), _ROWS))


def _digest_heading(name: str, tensor: TensorEntry) -> bytes:
    """The bytes before a tensor's content in a digest."""
    return json.dumps([name, tensor.dtype, tensor.shape]).encode() + b"\n"


def _digest_preamble(modules: Mapping[str, LoraModule], variants: Variants, text: AdapterText) -> bytes:
    """The first bytes of an adapter's digest: everything but the content of its tensors."""

    def pairs(modules: Mapping[str, LoraModule]) -> dict[str, list[float]]:
        return {name: [module.rank, module.scaling] for name, module in sorted(modules.items())}

    lines = f"lora {json.dumps(pairs(modules))}\n"
    if variants != Variants():
        lines += f"variants {json.dumps([pairs(variants.tables), variants.token_ids, variants.invocation])}\n"
    if variants.experts:  # absent from the earliest digests
        lines += f"experts {json.dumps(pairs(variants.experts))}\n"
    if variants.routers:
        lines += f"routers {json.dumps(pairs(variants.routers))}\n"
    if text != NO_TEXT:
        fields = dataclasses.asdict(text)
        for name in ("stop_tokens", "tool_format", "reasoning_format"):  # absent from the earliest digests
            if not fields[name]:
                del fields[name]
        lines += f"text {json.dumps(fields)}\n"
    return lines.encode()


def _device_bytes(variants: Variants, tensors: Mapping[str, TensorEntry], outline: Outline) -> int:
    """An upper bound of the device memory that `adapters.device.variants` takes for these."""
    total = 8 * outline.head_bias[0] if outline.head_bias and variants.names else 0
    for module in variants.tables.values():
        total += 4 * module.rank**2 + sum(_tensor_bytes(tensors, name, 4) for name in (module.a, module.b))
    for module in variants.routers.values():  # whole
        total += 4 * tensors[module.a].shape[1] * tensors[module.b].shape[0]
    for experts in variants.experts.values():  # B has zeros for the parameter's other parts
        dtypes = {tensors[name].dtype for name in experts.tensors}
        each = FORMATS[dtypes.pop() if len(dtypes) == 1 else "F32"].itemsize
        total += sum(
            _tensor_bytes(tensors, name, each) * (experts.parts if ".lora_B." in name else 1)
            for name in experts.tensors
        )
    for name in (*variants.magnitudes.values(), *variants.delta_biases.values()):
        total += _tensor_bytes(tensors, name, 8)
    for name in (*variants.parameters.values(), *variants.tokens.values(), *variants.classifier.values()):
        total += _tensor_bytes(tensors, name, 8 if len(tensors[name].shape) == 1 else 4)
    for name in variants.grown.values():
        total += max(variants.new_tokens, 0) * _tensor_bytes(tensors, name, 4) // tensors[name].shape[0]
    return total + sum(8 * len(ids) for ids in variants.token_ids.values())


def _tensor_bytes(tensors: Mapping[str, TensorEntry], name: str, each: int) -> int:
    return each * math.prod(tensors[name].shape)
