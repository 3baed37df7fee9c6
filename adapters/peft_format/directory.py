"""PEFT LoRA directories: their description (`AdapterSpec`), their tensors (`load`), and writing one (`write`).

Validation is in `inspection.py`.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.disk import sync, write_synced
from adapters.peft_format import record
from adapters.peft_format.fields import AdapterError
from adapters.peft_format.layout import PREFIX
from adapters.peft_format.modules import ExpertsModule, LoraModule, Variants
from adapters.peft_format.sizes import EXTRAS, LinearSize, extra_units, units_per_row
from adapters.peft_format.text import NO_TEXT, AdapterText
from adapters.peft_format.weights import (
    FORMATS,
    MAX_HEADER_BYTES,
    Dtype,
    TensorEntry,
    last_rows_bytes,
    read_header,
)

if TYPE_CHECKING:
    from torch import Tensor

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
SPEC_NAME = "spec.json"  # the result of `inspect`, kept beside the files so that they need not be validated again


@dataclass(frozen=True)
class AdapterSpec:
    """The description of an adapter that passed `inspect`.

    Attributes:
        digest: "sha256:" and 64 hex digits, over the mathematics (module, rank, scaling) and the tensors' content.
        config: the config's working and recorded fields, in normal form.
        modules: full name of a linear of the base -> its adapter.
        dtype: of every A and B, or float32 where they differ.
        rank: the largest of any module.
        parameters: numbers in the file.
        bytes: size of the tensors in the file.
        text: tokens and a chat template of its own.
        warnings: notes for the owner of an accepted adapter.
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
        """Every pair of A and B, those of embedding, head, experts and routers included."""
        return self.modules | self.variants.tables | self.variants.experts | self.variants.routers

    def rows(self, linears: Mapping[str, LinearSize] | None = None) -> dict[str, int]:
        """Row units that this adapter needs per module kind, for the kind's largest rank (see
        `adapters.peft_format.sizes`).

        Without `linears` a module's kind is the last part of its name.
        """
        units: dict[str, int] = {}
        for name, module in self.modules.items():
            kind = name.rpartition(".")[2] if linears is None else linears[name].kind
            units[kind] = max(units.get(kind, 0), module.rank)
        width, extras = units_per_row(self.dtype), extra_units(self.variants.device_bytes)
        return {kind: width * rank for kind, rank in units.items()} | ({EXTRAS: extras} if extras else {})

    def save(self, directory: Path) -> None:
        """Write this spec beside the files that it describes, and the record of them all (fsync'ed)."""
        write_synced(directory / SPEC_NAME, json.dumps(dataclasses.asdict(self)).encode())
        record.write(directory)

    @classmethod
    def read(cls, directory: Path) -> "AdapterSpec":
        """The spec written by `save`, of published versions only. Raises DamagedFile when it has changed since."""
        return cls.parse(record.read_checked(directory, SPEC_NAME).decode())

    @classmethod
    def parse(cls, document: str) -> "AdapterSpec":
        """The spec in a document written by `save`."""
        fields = json.loads(document)
        modules = {name: LoraModule(**module) for name, module in fields.pop("modules").items()}
        variants = fields.get("variants", {})  # directories of earlier releases have none
        tables = {name: LoraModule(**module) for name, module in variants.pop("tables", {}).items()}
        experts = {name: ExpertsModule(**module) for name, module in variants.pop("experts", {}).items()}
        routers = {name: LoraModule(**module) for name, module in variants.pop("routers", {}).items()}
        whole = Variants(tables=tables, experts=experts, routers=routers, **variants)
        rest = {"warnings": tuple(fields["warnings"]), "variants": whole}
        if "text" in fields:
            rest["text"] = AdapterText.from_fields(fields["text"])
        return cls(**fields | {"modules": modules} | rest)


def check_not_swapped(raw: bytes) -> None:
    """Refuse a config that begins as weights do: the two were swapped. Raises AdapterError."""
    if raw[8:9] == b"{" and int.from_bytes(raw[:8], "little") <= MAX_HEADER_BYTES:
        raise AdapterError("config holds safetensors: config and weights are swapped", "config", "parts_swapped")


# --- reading ---------------------------------------------------------------------------------------


def load(directory: Path, spec: AdapterSpec | None = None) -> dict[str, tuple["Tensor", "Tensor"]]:
    """The rank rows of an adapter that passed `inspect`: linear -> (A [rank, in], B [out, rank]), on the CPU.

    All have the dtype of `spec` (by default the one in `directory`), and memory of their own: a mapped file would be
    read page by page during the copy to the device.
    """
    import torch

    spec = AdapterSpec.read(directory) if spec is None else spec
    dtype = getattr(torch, spec.dtype)
    names = [name for module in spec.modules.values() for name in (module.a, module.b)]
    tensors = _read_tensors(directory, names)
    # A is copied, so that the file's bytes can be freed as soon as B has been laid out.
    return {name: (tensors[m.a].to(dtype, copy=True), tensors[m.b].to(dtype)) for name, m in spec.modules.items()}


def load_pairs(directory: Path) -> dict[str, tuple["Tensor", "Tensor"]]:
    """`load`, and the pairs of experts by their names in `Variants`: A and B in PEFT's layout for a parameter."""
    import torch

    spec = AdapterSpec.read(directory)
    found = load(directory, spec)
    for name, module in spec.variants.experts.items():
        tensors = _read_tensors(directory, module.tensors)
        a, b = ([tensors[one] for one in module.tensors if f".lora_{letter}." in one] for letter in "AB")
        found[name] = (a[0], b[0]) if len(a) == 1 else (torch.cat(a), torch.stack(b, dim=-1).flatten(1))
    return found


def load_variants(directory: Path, spec: AdapterSpec) -> dict[str, "Tensor"]:
    """The tensors named by `spec.variants`, in the file's dtypes, by their names in the file."""
    variants = spec.variants
    pairs = [*variants.tables.values(), *variants.experts.values(), *variants.routers.values()]
    vectors = [*variants.magnitudes.values(), *variants.delta_biases.values(), *variants.classifier.values()]
    matrices = (name for module in pairs for name in module.tensors)
    complete = {*matrices, *vectors, *variants.parameters.values(), *variants.tokens.values()}
    last_rows = dict.fromkeys({*variants.grown.values()} - complete, variants.new_tokens)
    return _read_tensors(directory, complete | last_rows.keys(), last_rows)


def _read_tensors(
    directory: Path, names: Iterable[str], last_rows: Mapping[str, int] | None = None
) -> dict[str, "Tensor"]:
    """Tensors of the file by name; of those in `last_rows`, only that many last rows."""
    import torch

    found: dict[str, Tensor] = {}
    with (directory / WEIGHTS_NAME).open("rb") as file:
        entries = read_header(file)
        for run in _runs({name: _last_rows(entries[name], (last_rows or {}).get(name)) for name in names}):
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


def _last_rows(tensor: TensorEntry, rows: int | None) -> TensorEntry:
    """The last `rows` rows of a matrix; all of it for None."""
    if rows is None:
        return tensor
    return tensor._replace(shape=(rows, *tensor.shape[1:]), start=tensor.end - last_rows_bytes(tensor, rows))


def _runs(entries: Mapping[str, TensorEntry]) -> list[list[tuple[str, TensorEntry]]]:
    """Adjacent tensors of the file, each run to be read at once: many small reads in a thread would take the
    interpreter away from other threads as many times."""
    runs: list[list[tuple[str, TensorEntry]]] = []
    for name, entry in sorted(entries.items(), key=lambda item: item[1].start):
        if runs and runs[-1][-1][1].end == entry.start:
            runs[-1].append((name, entry))
        else:
            runs.append([(name, entry)])
    return runs


# --- writing ---------------------------------------------------------------------------------------


def write(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, tuple["Tensor", "Tensor"]]) -> None:
    """Write an adapter like PEFT's `save_pretrained`, fsync'ed, into an existing directory.

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
