"""PEFT LoRA directories: `inspect` validates one, `load` reads its tensors, `write` makes one.

`inspect` trusts nothing: it reads the safetensors header itself, fits every tensor to a linear of the base and looks at
every value, with numpy only, so that it can run in a process without torch. Knows no names, versions or device memory.
"""

import dataclasses
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final, Literal, NamedTuple, Protocol

import numpy as np

from adapters.config import MAX_CONFIG_BYTES, AdapterConfig, AdapterError, parse_config
from adapters.fields import shorten, strict_json

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AdapterConfig", "AdapterError", "AdapterSpec", "LinearShape", "LoraModule", "inspect", "load", "write"]

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
SPEC_NAME = "spec.json"  # what `inspect` found, kept beside the files so that nobody need look at every value again

Dtype = Literal["float32", "bfloat16", "float16"]


class _Format(NamedTuple):
    name: Dtype
    itemsize: int
    exponent: int  # mask of the exponent's bits; all set means infinite or NaN


FORMATS: Final = {
    "F32": _Format("float32", 4, 0x7F800000),
    "BF16": _Format("bfloat16", 2, 0x7F80),
    "F16": _Format("float16", 2, 0x7C00),
}
MAX_HEADER_BYTES = 1 << 20
MAX_TENSORS = 100_000
MAX_DIMENSION = 1 << 31
CHUNK_BYTES = 4 << 20  # a multiple of every item size

PREFIX = "base_model.model."


class LinearShape(Protocol):
    """What this file needs to know of one linear of the base."""

    @property
    def kind(self) -> str: ...
    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...


@dataclass(frozen=True)
class LoraModule:
    """One adapted linear: delta(x) = scaling * B (A x).

    Attributes:
        a: name in the file of A [rank, in].
        b: name in the file of B [out, rank].
    """

    rank: int
    scaling: float
    a: str
    b: str


@dataclass(frozen=True)
class AdapterSpec:
    """All there is to know about an adapter that passed `inspect`.

    Attributes:
        digest: "sha256:" and 64 hex digits, over the mathematics (module, rank, scaling) and the tensors' content.
        config: the config's working and recorded fields, in normal form.
        modules: full name of a linear of the base -> its adapter.
        dtype: of every tensor in the file, or float32 where they differ.
        rank: the largest of any module.
        parameters: numbers in the file.
        bytes: size of the tensors in the file.
        warnings: what the owner should know although the adapter is accepted.
    """

    digest: str
    config: dict[str, Any]
    modules: dict[str, LoraModule]
    dtype: Dtype
    rank: int
    parameters: int
    bytes: int
    warnings: tuple[str, ...] = ()

    def rows(self, linears: Mapping[str, LinearShape] | None = None) -> dict[str, int]:
        """Row units of two bytes that this adapter needs per kind: the largest rank there, twice that in float32.

        Without `linears` a module's kind is the last part of its name.
        """
        units: dict[str, int] = {}
        for name, module in self.modules.items():
            kind = name.rpartition(".")[2] if linears is None else linears[name].kind
            units[kind] = max(units.get(kind, 0), module.rank)
        width = 2 if self.dtype == "float32" else 1
        return {kind: width * rank for kind, rank in units.items()}

    def save(self, directory: Path) -> None:
        """Keep this spec in `directory`, beside the files that it describes (fsync'ed)."""
        _write_synced(directory / SPEC_NAME, json.dumps(dataclasses.asdict(self)).encode())

    @classmethod
    def read(cls, directory: Path) -> "AdapterSpec":
        """The spec that `save` left. Trusts the directory: for published versions only."""
        fields = json.loads((directory / SPEC_NAME).read_bytes())
        modules = {name: LoraModule(**module) for name, module in fields.pop("modules").items()}
        return cls(**fields | {"modules": modules, "warnings": tuple(fields["warnings"])})


# --- reading ---------------------------------------------------------------------------------------


def inspect(directory: Path, linears: Mapping[str, LinearShape], model_class: str) -> AdapterSpec:
    """Validate the adapter in `directory` against a base, reading every byte of it once.

    Args:
        linears: full module name -> shape, for every linear of the base that can be adapted.
        model_class: the base's class, such as "LlamaForCausalLM".

    Raises:
        AdapterError: naming the config field, the tensor, or the file (`config`, `weights`) at fault.
        OSError: the disk's fault, not the adapter's.
    """
    config = parse_config(_read_config(directory))
    config.check_class(model_class)
    resolved = config.resolve(linears)
    path = directory / WEIGHTS_NAME
    if not path.is_file():
        raise AdapterError(
            f"the adapter has no {WEIGHTS_NAME}: pickled weights (.bin, .pt) are not accepted", "weights"
        )
    with path.open("rb") as file:
        tensors = read_header(file)
        modules = _fit(tensors, resolved, linears)
        mathematics = json.dumps({name: [m.rank, m.scaling] for name, m in sorted(modules.items())})
        digest = hashlib.sha256(f"lora {mathematics}\n".encode())
        for name, tensor in sorted(tensors.items()):
            digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode() + b"\n")
            _read_values(file, name, tensor, digest)
    dtypes = {FORMATS[tensor.dtype].name for tensor in tensors.values()}
    return AdapterSpec(
        digest=f"sha256:{digest.hexdigest()}",
        config=config.normalised(),
        modules=modules,
        dtype=dtypes.pop() if len(dtypes) == 1 else "float32",
        rank=max(module.rank for module in modules.values()),
        parameters=sum(math.prod(tensor.shape) for tensor in tensors.values()),
        bytes=sum(tensor.end - tensor.start for tensor in tensors.values()),
        warnings=config.warnings,
    )


def load(directory: Path, spec: AdapterSpec | None = None) -> dict[str, tuple["Tensor", "Tensor"]]:
    """The tensors of an adapter that passed `inspect`: module -> (A [rank, in], B [out, rank]), on the CPU.

    All have the dtype of `spec` (by default the one kept in `directory`), and memory of their own: a file that is
    mapped would be read page by page when the device asks for it.
    """
    import torch

    spec = AdapterSpec.read(directory) if spec is None else spec
    with (directory / WEIGHTS_NAME).open("rb") as file:
        entries = read_header(file)

        def tensor(name: str) -> "Tensor":
            entry = entries[name]
            values = torch.empty(entry.shape, dtype=getattr(torch, FORMATS[entry.dtype].name))
            file.seek(entry.start)
            if file.readinto(values.view(torch.uint8).numpy().data) != entry.end - entry.start:
                raise AdapterError("weights were cut short while being read", "weights")
            return values.to(getattr(torch, spec.dtype))

        return {name: (tensor(module.a), tensor(module.b)) for name, module in spec.modules.items()}


def _read_config(directory: Path) -> bytes:
    path = directory / CONFIG_NAME
    if not path.is_file():
        raise AdapterError(f"the adapter has no {CONFIG_NAME}", "config")
    with path.open("rb") as file:
        return file.read(MAX_CONFIG_BYTES + 1)


class TensorEntry(NamedTuple):
    """One tensor of a safetensors file; `start` and `end` count from the beginning of the file."""

    dtype: str
    shape: tuple[int, int]
    start: int
    end: int


def read_header(file: BinaryIO) -> dict[str, TensorEntry]:
    """The tensors that a safetensors file declares, once the declaration is known to be true of the file.

    Raises:
        AdapterError: the header is not JSON, larger than 1 MiB, or describes anything but two-dimensional floating
            tensors that lie one behind the other and fill the file exactly.
    """
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > size - 8:
        if start.startswith((b"PK\x03\x04", b"\x80")):
            raise AdapterError("weights are a pickle, not safetensors: save with safe_serialization=True", "weights")
        raise AdapterError("weights are cut short, or not a safetensors file: the header does not fit in", "weights")
    if length > MAX_HEADER_BYTES:
        raise AdapterError(
            f"weights have a header of {length} bytes; at most {MAX_HEADER_BYTES} are allowed", "weights"
        )
    header = strict_json(file.read(length), "weights")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise AdapterError("weights have a __metadata__ that is not an object of strings", "weights")
    if not 0 < len(header) <= MAX_TENSORS:
        raise AdapterError(f"weights hold {len(header)} tensors; 1 to {MAX_TENSORS} are allowed", "weights")
    tensors = {name: _parse_entry(name, entry, 8 + length) for name, entry in header.items()}
    position = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if tensor.start != position:
            raise AdapterError(f"tensor '{shorten(name)}' overlaps another or leaves a gap before it", name)
        position = tensor.end
    if position != size:
        raise AdapterError(f"weights have {size} bytes, but the tensors end at byte {position}", "weights")
    return tensors


def _parse_entry(name: str, entry: Any, data_start: int) -> TensorEntry:
    def refuse(reason: str) -> AdapterError:
        return AdapterError(f"tensor '{shorten(name)}' {reason}", name)

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise refuse("must be declared by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in FORMATS:
        raise refuse(f"has a dtype that is not served: {shorten(json.dumps(dtype), 40)} (F32, F16 or BF16)")
    for numbers, what in (shape, "a shape [rows, columns]"), (offsets, "data_offsets [begin, end]"):
        if not isinstance(numbers, list) or len(numbers) != 2 or not all(type(n) is int and n >= 0 for n in numbers):
            raise refuse(f"needs {what} of two natural numbers, not {shorten(json.dumps(numbers), 40)}")
    rows, columns = shape
    if max(shape) > MAX_DIMENSION or offsets[1] - offsets[0] != rows * columns * FORMATS[dtype].itemsize:
        raise refuse(f"has data_offsets that do not fit its shape {shorten(json.dumps(shape), 40)}")
    return TensorEntry(dtype, (rows, columns), data_start + offsets[0], data_start + offsets[1])


def _fit(
    tensors: Mapping[str, TensorEntry], resolved: Mapping[str, tuple[int, float]], linears: Mapping[str, LinearShape]
) -> dict[str, LoraModule]:
    """A module for every linear that the config selects; every tensor belongs to one, with the right shape."""
    for name in tensors:
        _check_home(name, resolved, linears)
    modules: dict[str, LoraModule] = {}
    for module, (rank, scaling) in resolved.items():
        a, b = f"{PREFIX}{module}.lora_A.weight", f"{PREFIX}{module}.lora_B.weight"
        linear = linears[module]
        for name, shape in (a, (rank, linear.in_features)), (b, (linear.out_features, rank)):
            if name not in tensors:
                raise AdapterError(f"the config adapts '{module}', but the weights lack '{name}'", name)
            if tensors[name].shape != shape:
                found, wanted = list(tensors[name].shape), list(shape)
                raise AdapterError(
                    f"tensor '{name}' has shape {found}; rank {rank} on this base asks for {wanted}", name
                )
        modules[module] = LoraModule(rank, scaling, a, b)
    return modules


def _check_home(name: str, resolved: Mapping[str, Any], linears: Mapping[str, LinearShape]) -> None:
    def refuse(reason: str) -> AdapterError:
        return AdapterError(f"tensor '{shorten(name)}' {reason}", name)

    match = re.fullmatch(r"base_model\.model\.(.+)\.lora_[AB]\.weight", name)
    if match is None:
        if re.fullmatch(r".+\.lora_[AB]\.[^.]+\.weight", name):
            raise refuse("carries an adapter's name: save with PEFT's save_pretrained, which leaves it out")
        raise refuse(f"is none of a LoRA adapter's: '{PREFIX}<module>.lora_A.weight' and '...lora_B.weight'")
    if match[1] not in linears:
        raise refuse("adapts a module that the base does not have, or that cannot be adapted")
    if match[1] not in resolved:
        raise refuse("adapts a module that the config does not select")


def _read_values(file: BinaryIO, name: str, tensor: TensorEntry, digest: "hashlib._Hash") -> None:
    """Hash a tensor's bytes and look for values that are not finite, in chunks."""
    layout = FORMATS[tensor.dtype]
    file.seek(tensor.start)
    remaining = tensor.end - tensor.start
    while remaining:
        wanted = min(remaining, CHUNK_BYTES)
        chunk = file.read(wanted)
        if len(chunk) != wanted:
            raise AdapterError("weights were cut short while being read", "weights")
        remaining -= wanted
        digest.update(chunk)
        bits = np.frombuffer(chunk, dtype=f"<u{layout.itemsize}")
        if np.any(bits & layout.exponent == layout.exponent):
            raise AdapterError(f"tensor '{shorten(name)}' holds NaN or infinite values", name, "non_finite_weights")


# --- writing ---------------------------------------------------------------------------------------


def write(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, tuple["Tensor", "Tensor"]]) -> None:
    """Write an adapter as PEFT's `save_pretrained` does, fsync'ed, into an existing directory.

    Args:
        config: fields of `adapter_config.json`; `peft_type` is added.
        tensors: module -> (A [rank, in], B [out, rank]).
    """
    from safetensors.torch import save_file

    named = {}
    for module, (a, b) in tensors.items():
        named[f"{PREFIX}{module}.lora_A.weight"] = a.detach().cpu().contiguous()
        named[f"{PREFIX}{module}.lora_B.weight"] = b.detach().cpu().contiguous()
    save_file(named, directory / WEIGHTS_NAME, metadata={"format": "pt"})
    sync(directory / WEIGHTS_NAME)
    document = json.dumps({"peft_type": "LORA", **config}, indent=2, sort_keys=True)
    _write_synced(directory / CONFIG_NAME, document.encode())
    sync(directory)


def sync(path: Path) -> None:
    """Make a file's content, or a directory's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_synced(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    sync(path)
