"""PEFT LoRA directories: `inspect` validates one, `load` reads its tensors, `write` makes one.

`inspect` trusts nothing: it reads the safetensors header itself, finds a use for every tensor (layout.py) and looks at
every value, with numpy only, so that it can run in a process without torch.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from adapters.disk import sync, write_synced
from adapters.peft_format import record
from adapters.peft_format.config import MAX_CONFIG_BYTES, AdapterConfig, AdapterError, parse_config
from adapters.peft_format.fields import shorten
from adapters.peft_format.layout import PREFIX, layout
from adapters.peft_format.matching import match, new_tokens
from adapters.peft_format.modules import ExpertsModule, LoraModule, Variants
from adapters.peft_format.outline import Outline
from adapters.peft_format.sizes import EXTRAS, LinearSize, extra_units, units_per_row
from adapters.peft_format.spelling import beside, respelled, respelled_layout, respelled_outline, spelling
from adapters.peft_format.text import NO_TEXT, AdapterText
from adapters.peft_format.weights import (
    FORMATS,
    MAX_HEADER_BYTES,
    Dtype,
    TensorEntry,
    check_finite,
    chunks,
    is_zero,
    read_header,
)
from adapters.safetensors_header import CONVERT

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "AdapterConfig",
    "AdapterError",
    "AdapterSpec",
    "LinearSize",
    "LoraModule",
    "Outline",
    "Variants",
    "digest_of",
    "inspect",
    "load",
    "load_variants",
    "write",
]

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
SPEC_NAME = "spec.json"  # what `inspect` found, kept beside the files so that nobody need look at every value again


@dataclass(frozen=True)
class AdapterSpec:
    """All there is to know about an adapter that passed `inspect`.

    Attributes:
        digest: "sha256:" and 64 hex digits, over the mathematics (module, rank, scaling) and the tensors' content.
        config: the config's working and recorded fields, in normal form.
        modules: full name of a linear of the base -> its adapter.
        dtype: of every A and B, or float32 where they differ.
        rank: the largest of any module.
        parameters: numbers in the file.
        bytes: size of the tensors in the file.
        text: tokens and a chat template of its own.
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
    variants: Variants = field(default_factory=Variants)
    text: AdapterText = NO_TEXT

    @property
    def adapted(self) -> dict[str, LoraModule]:
        """Every pair of A and B, those of embedding, head and experts included."""
        return self.modules | self.variants.tables | self.variants.experts

    def rows(self, linears: Mapping[str, LinearSize] | None = None) -> dict[str, int]:
        """Row units that this adapter needs per kind, for the largest rank there (see `adapters.peft_format.sizes`).

        Without `linears` a module's kind is the last part of its name.
        """
        units: dict[str, int] = {}
        for name, module in self.modules.items():
            kind = name.rpartition(".")[2] if linears is None else linears[name].kind
            units[kind] = max(units.get(kind, 0), module.rank)
        width, extras = units_per_row(self.dtype), extra_units(self.variants.device_bytes)
        return {kind: width * rank for kind, rank in units.items()} | ({EXTRAS: extras} if extras else {})

    def save(self, directory: Path) -> None:
        """Keep this spec in `directory` beside the files that it describes, and note them all (fsync'ed)."""
        write_synced(directory / SPEC_NAME, json.dumps(dataclasses.asdict(self)).encode())
        record.write(directory)

    @classmethod
    def read(cls, directory: Path) -> "AdapterSpec":
        """The spec that `save` left, for published versions only. Raises DamagedFile when it is no longer that one."""
        return cls.parse(record.checked(directory, SPEC_NAME).decode())

    @classmethod
    def parse(cls, document: str) -> "AdapterSpec":
        """From what `save` wrote."""
        fields = json.loads(document)
        modules = {name: LoraModule(**module) for name, module in fields.pop("modules").items()}
        variants = fields.get("variants", {})  # directories of earlier releases have none
        tables = {name: LoraModule(**module) for name, module in variants.pop("tables", {}).items()}
        experts = {name: ExpertsModule(**module) for name, module in variants.pop("experts", {}).items()}
        whole = Variants(tables=tables, experts=experts, **variants)
        rest = {"warnings": tuple(fields["warnings"]), "variants": whole}
        if "text" in fields:
            rest["text"] = AdapterText.of(fields["text"])
        return cls(**fields | {"modules": modules} | rest)


# --- reading ---------------------------------------------------------------------------------------


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
        outline: its other parameters; without, an adapter may touch nothing but linears.
        text: what came with the adapter besides config and weights.
        ignore_vision: accept one that also changes parts of its base which text does not pass.

    Raises:
        AdapterError: naming the config field, the tensor, or the file (`config`, `weights`) at fault.
        OSError: the disk's fault, not the adapter's.
    """
    config = parse_config(_read_config(directory))
    config.check_class(model_class)
    outline = outline or Outline()
    if config.classifies:
        outline = outline.headless()
    path = directory / WEIGHTS_NAME
    if not path.is_file():
        raise AdapterError(
            f"the adapter has no {WEIGHTS_NAME}: pickled weights (.bin, .pt) are not accepted. {CONVERT}", "weights"
        )
    with path.open("rb") as file:
        tensors = read_header(file)
        names = spelling(tensors, linears, outline)
        linears, outline = respelled(linears, names), respelled_outline(outline, names)
        outline = outline.grown(new_tokens(tensors, outline))
        plan = layout(config, linears, outline, tensors)
        warnings = [*_unknown_fields(config), *plan.warnings, *match(tensors, plan, linears, outline)]
        plan = respelled_layout(plan, {theirs: ours for ours, theirs in names.items()})
        digest = hashlib.sha256(_mathematics(plan.modules, plan.variants, text))
        for name, tensor in sorted(tensors.items()):
            digest.update(_heading(name, tensor))
            changes = not ignore_vision and beside(name, outline) is not None and ".lora_A." not in name
            for chunk in chunks(file, tensor):
                digest.update(chunk)
                check_finite(chunk, name, tensor)
                # A tower that text has never passed keeps the zeros of its B, and is not changed.
                if changes and not (".lora_B." in name and is_zero(chunk, tensor)):
                    raise AdapterError(
                        f"tensor '{shorten(name)}' changes '{beside(name, outline)}', which text does not pass: images "
                        "and sound are not served. --ignore-vision-adapters serves the rest",
                        name,
                        "unsupported_adapter_feature",
                    )
            twin = plan.twins.get(name)
            if twin is not None and not _same(file, tensor, tensors[twin]):
                raise AdapterError(f"tensor '{name}' differs from '{twin}', which is the same by another name", name)
            theirs = tensor._replace(end=tensor.end - _new_bytes(tensor, max(outline.new_tokens, 0)))
            if name not in plan.copies:
                continue
            rounded_to = outline.equals(plan.copies[name], tensor.dtype, chunks(file, theirs))
            if rounded_to is None:
                raise AdapterError(
                    f"tensor '{name}' is not what the served base has there: the adapter belongs to another base, or "
                    "changed this one. List the module in modules_to_save to serve it with these weights",
                    name,
                    "base_mismatch",
                )
            if rounded_to != outline.stored(plan.copies[name]).dtype:
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
    """The digest of an adapter that passed `inspect`, computed anew from its spec and all its numbers.

    Raises AdapterError, or what reading JSON raises, when the files are not whole.
    """
    spec = AdapterSpec.parse((directory / SPEC_NAME).read_text())
    digest = hashlib.sha256(_mathematics(spec.modules, spec.variants, spec.text))
    with (directory / WEIGHTS_NAME).open("rb") as file:
        for name, tensor in sorted(read_header(file).items()):
            digest.update(_heading(name, tensor))
            for chunk in chunks(file, tensor):
                digest.update(chunk)
    return f"sha256:{digest.hexdigest()}"


def load(directory: Path, spec: AdapterSpec | None = None) -> dict[str, tuple["Tensor", "Tensor"]]:
    """The rank rows of an adapter that passed `inspect`: linear -> (A [rank, in], B [out, rank]), on the CPU.

    All have the dtype of `spec` (by default the one kept in `directory`), and memory of their own: a file that is
    mapped would be read page by page when the device asks for it.
    """
    import torch

    spec = AdapterSpec.read(directory) if spec is None else spec
    dtype = getattr(torch, spec.dtype)
    names = [name for module in spec.modules.values() for name in (module.a, module.b)]
    tensors = _read_tensors(directory, names)
    # A copied, so that what was read can go as soon as B has been laid out.
    return {name: (tensors[m.a].to(dtype, copy=True), tensors[m.b].to(dtype)) for name, m in spec.modules.items()}


def load_pairs(directory: Path) -> dict[str, tuple["Tensor", "Tensor"]]:
    """`load`, and the pairs of experts by their names in `Variants`: A and B as PEFT lays those of a parameter out."""
    import torch

    spec = AdapterSpec.read(directory)
    found = load(directory, spec)
    for name, module in spec.variants.experts.items():
        tensors = _read_tensors(directory, module.tensors)
        a, b = ([tensors[one] for one in module.tensors if f".lora_{letter}." in one] for letter in "AB")
        found[name] = (a[0], b[0]) if len(a) == 1 else (torch.cat(a), torch.stack(b, dim=-1).flatten(1))
    return found


def load_variants(directory: Path, spec: AdapterSpec) -> dict[str, "Tensor"]:
    """The tensors that `spec.variants` names, in the file's dtypes, by their names in the file."""
    variants = spec.variants
    pairs = [*variants.tables.values(), *variants.experts.values()]
    vectors = [*variants.magnitudes.values(), *variants.delta_biases.values(), *variants.classifier.values()]
    matrices = (name for module in pairs for name in module.tensors)
    whole = {*matrices, *vectors, *variants.parameters.values(), *variants.tokens.values()}
    last = dict.fromkeys({*variants.grown.values()} - whole, variants.new_tokens)
    return _read_tensors(directory, whole | last.keys(), last)


def _read_tensors(directory: Path, names: Iterable[str], last: Mapping[str, int] | None = None) -> dict[str, "Tensor"]:
    """Tensors of the file by name, whole but for those in `last`: of these only so many last rows."""
    import torch

    found: dict[str, Tensor] = {}
    with (directory / WEIGHTS_NAME).open("rb") as file:
        entries = read_header(file)
        for run in _runs({name: _tail(entries[name], (last or {}).get(name)) for name in names}):
            start = run[0][1].start
            content = torch.empty(run[-1][1].end - start, dtype=torch.uint8)
            file.seek(start)
            if file.readinto(content.numpy().data) != len(content):
                raise AdapterError("weights were cut short while being read", "weights")
            for name, entry in run:
                values = content[entry.start - start : entry.end - start]
                if (entry.start - start) % FORMATS[entry.dtype].itemsize:
                    values = values.clone()
                found[name] = values.view(getattr(torch, FORMATS[entry.dtype].name)).view(entry.shape)
    return found


def _tail(tensor: TensorEntry, rows: int | None) -> TensorEntry:
    """So many last rows of a matrix; all of it for None."""
    if rows is None:
        return tensor
    return tensor._replace(shape=(rows, *tensor.shape[1:]), start=tensor.end - _new_bytes(tensor, rows))


def _runs(entries: Mapping[str, TensorEntry]) -> list[list[tuple[str, TensorEntry]]]:
    """Tensors that lie one after another in the file, to be read at once: whoever reads many pieces in a thread takes
    the interpreter away from others as many times."""
    runs: list[list[tuple[str, TensorEntry]]] = []
    for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
        if runs and runs[-1][-1][1].end == entry.start:
            runs[-1].append((name, entry))
        else:
            runs.append([(name, entry)])
    return runs


def _read_config(directory: Path) -> bytes:
    path = directory / CONFIG_NAME
    if not path.is_file():
        raise AdapterError(f"the adapter has no {CONFIG_NAME}", "config")
    with path.open("rb") as file:
        raw = file.read(MAX_CONFIG_BYTES + 1)
    check_beginning(raw)
    return raw


def check_beginning(raw: bytes) -> None:
    """Raises AdapterError when a config begins as weights do: the two were swapped."""
    if raw[8:9] == b"{" and int.from_bytes(raw[:8], "little") <= MAX_HEADER_BYTES:
        raise AdapterError("config holds safetensors: config and weights are swapped", "config", "parts_swapped")


def _unknown_fields(config: AdapterConfig) -> list[str]:
    return [f"config has the unknown field '{shorten(name)}', which is passed over" for name in config.unknown]


def _new_bytes(tensor: TensorEntry, rows: int) -> int:
    """The size of a matrix's last rows."""
    return rows * math.prod(tensor.shape[1:]) * FORMATS[tensor.dtype].itemsize


def _same(file: BinaryIO, one: TensorEntry, other: TensorEntry) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with open(file.name, "rb") as again:  # noqa: PTH123 - two places of one file, read side by side
        return all(a == b for a, b in zip(chunks(file, one), chunks(again, other), strict=True))


def _heading(name: str, tensor: TensorEntry) -> bytes:
    """What comes before a tensor's content in a digest."""
    return json.dumps([name, tensor.dtype, tensor.shape]).encode() + b"\n"


def _mathematics(modules: Mapping[str, LoraModule], variants: Variants, text: AdapterText) -> bytes:
    """What an adapter is beyond the content of its tensors, as bytes to begin its digest with."""

    def pairs(modules: Mapping[str, LoraModule]) -> dict[str, list[float]]:
        return {name: [module.rank, module.scaling] for name, module in sorted(modules.items())}

    lines = f"lora {json.dumps(pairs(modules))}\n"
    if variants != Variants():
        lines += f"variants {json.dumps([pairs(variants.tables), variants.token_ids, variants.invocation])}\n"
    if variants.experts:  # the first digests had none
        lines += f"experts {json.dumps(pairs(variants.experts))}\n"
    if text != NO_TEXT:
        fields = dataclasses.asdict(text)
        for name in ("stop_tokens", "tool_format", "reasoning_format"):  # the first digests had none
            if not fields[name]:
                del fields[name]
        lines += f"text {json.dumps(fields)}\n"
    return lines.encode()


def _device_bytes(variants: Variants, tensors: Mapping[str, TensorEntry], outline: Outline) -> int:
    """At most as much memory as `adapters.device.variants` takes for all this."""
    total = 8 * outline.head_bias[0] if outline.head_bias and variants.names else 0
    for module in variants.tables.values():
        total += 4 * module.rank**2 + sum(_numbers(tensors, name, 4) for name in (module.a, module.b))
    for experts in variants.experts.values():  # B has zeros for the parameter's other parts
        dtypes = {tensors[name].dtype for name in experts.tensors}
        each = FORMATS[dtypes.pop() if len(dtypes) == 1 else "F32"].itemsize
        total += sum(
            _numbers(tensors, name, each) * (experts.parts if ".lora_B." in name else 1) for name in experts.tensors
        )
    for name in (*variants.magnitudes.values(), *variants.delta_biases.values()):
        total += _numbers(tensors, name, 8)
    for name in (*variants.parameters.values(), *variants.tokens.values(), *variants.classifier.values()):
        total += _numbers(tensors, name, 8 if len(tensors[name].shape) == 1 else 4)
    for name in variants.grown.values():
        total += max(variants.new_tokens, 0) * _numbers(tensors, name, 4) // tensors[name].shape[0]
    return total + sum(8 * len(ids) for ids in variants.token_ids.values())


def _numbers(tensors: Mapping[str, TensorEntry], name: str, each: int) -> int:
    return each * math.prod(tensors[name].shape)


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
    write_synced(directory / CONFIG_NAME, document.encode())
    sync(directory)
