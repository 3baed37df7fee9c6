"""W + BA: an adapter merged into its base and written as a Hugging Face checkpoint in bfloat16.

W is the base from its files, not as quantised for serving. The base's safetensors are processed one file at a time, so
that memory follows the largest file; tokenizer and config are copied.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from adapters.disk import sync
from adapters.offline import of_experts
from adapters.offline.factors import Factors, StackedFactors, read_factors
from adapters.peft_format.fields import AdapterError
from adapters.peft_format.sizes import ExpertsSize

_INDEX = "model.safetensors.index.json"
_CONFIG = "config.json"


def merge(
    base: Path,
    factors: Mapping[str, Factors | StackedFactors],
    target: Path,
    *,
    renamed: Mapping[str, str] | None = None,
    transposed: bool = False,
) -> None:
    """Write the base with `factors` merged in to the existing directory `target`, fsync'ed.

    Args:
        base: a directory in Hugging Face layout with safetensors.
        factors: full module name -> factors; those of experts by the files' names, as from `of_experts.read_experts`.
        renamed: parameter in the base's files -> its full name, where these differ.
        transposed: the files hold weights of linears as [in, out].

    Raises:
        AdapterError: a module has no weight of its shape in the base's files.
    """
    remaining = dict(factors)
    for source in sorted(base.glob("*.safetensors")):
        merged: dict[str, torch.Tensor] = {}
        with safe_open(source, "pt") as file:
            metadata = file.metadata()
            for name in file.keys():  # noqa: SIM118 - not a mapping
                weight = file.get_tensor(name)
                own = name.removesuffix(".weight")
                module = remaining.pop(
                    own if own in remaining else (renamed or {}).get(name, name).removesuffix(".weight"), None
                )
                if isinstance(module, StackedFactors):
                    weight = _add_delta(name, weight, _in_file_orientation(name, weight, module.delta))
                elif module is not None:
                    weight = _add_delta(name, weight, module.delta.T if transposed else module.delta)
                merged[name] = weight.bfloat16() if weight.is_floating_point() else weight
        save_file(merged, target / source.name, metadata=metadata)
    if remaining:
        raise AdapterError(f"the base's files have no weight for '{min(remaining)}'", "merge")
    _copy_other_files(base, target)
    for path in (*target.iterdir(), target):
        sync(path)


def _add_delta(name: str, weight: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    if delta.shape != weight.shape:
        raise AdapterError(f"'{name}' has shape {list(weight.shape)}, not {list(delta.shape)}", "merge")
    return weight.float() + delta


def _in_file_orientation(name: str, weight: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """The delta of all experts in the file's orientation. Raises AdapterError for square weights, which do not show
    it."""
    if delta.shape[1] == delta.shape[2]:
        raise AdapterError(f"'{name}' holds square weights, whose inputs cannot be told from their outputs", "merge")
    return delta if delta.shape == weight.shape else delta.mT


def _copy_other_files(base: Path, target: Path) -> None:
    for path in base.iterdir():
        if path.is_file() and path.suffix in (".json", ".txt", ".model", ".jinja"):
            shutil.copyfile(path, target / path.name)
    config = json.loads((base / _CONFIG).read_text())
    config.pop("torch_dtype", None)
    (target / _CONFIG).write_text(json.dumps(config | {"dtype": "bfloat16"}, indent=2))
    if (target / _INDEX).exists():
        index = json.loads((target / _INDEX).read_text())
        size = sum(path.stat().st_size for path in target.glob("*.safetensors"))
        (target / _INDEX).write_text(json.dumps({"metadata": {"total_size": size}, "weight_map": index["weight_map"]}))


def _tensor_names(base: Path) -> set[str]:
    """The names of all tensors in a directory's files."""
    found: set[str] = set()
    for source in base.glob("*.safetensors"):
        with safe_open(source, "pt") as file:
            found |= set(file.keys())
    return found


def carry_out(order: Mapping[str, Any]) -> None:
    """Merge the adapter in `order["adapter"]` into the base in `order["base"]`; write to `order["target"]`."""
    base, adapter = Path(order["base"]), Path(order["adapter"])
    factors: dict[str, Factors | StackedFactors] = {**read_factors(adapter, allowed_variants={"experts"})}
    sizes = {name: ExpertsSize(**size) for name, size in order["experts"].items()}
    factors |= of_experts.read_experts(adapter, sizes, _tensor_names(base))
    files = {name: order[name] for name in ("renamed", "transposed")}
    merge(base, factors, Path(order["target"]), **files)
