"""Adapters of experts as factors for the base's files, which hold a linear for each expert or one for all.

For mixing, factors expert by expert in every layout, named by the parameter and the expert's number.
"""

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from adapters.offline.factors import Factors, StackedFactors
from adapters.peft_format import directory as adapter_format
from adapters.peft_format.directory import AdapterSpec
from adapters.peft_format.fields import AdapterError
from adapters.peft_format.modules import ExpertsModule, peft_module_of
from adapters.peft_format.sizes import ExpertsSize


def read_experts(
    directory: Path, sizes: Mapping[str, ExpertsSize], files: Collection[str]
) -> dict[str, Factors | StackedFactors]:
    """The experts' factors of a published adapter, by the names in the base's files.

    Args:
        sizes: the base's, by parameter.
        files: names of the parameters in the base's files.

    Raises:
        AdapterError: the files hold these experts in neither way.
    """
    spec = AdapterSpec.read(directory)
    tensors = adapter_format.load_variants(directory, spec)
    found: dict[str, Factors | StackedFactors] = {}
    for module in spec.variants.experts.values():
        size = sizes[module.parameter]
        a, b = _stacked(module, [tensors[name].float() for name in module.tensors])
        if module.parameter in files:
            found[module.parameter] = _join_parts(found.get(module.parameter), module, size, a, b)
            continue
        parts = size.parts if module.parts == 1 else size.parts[module.part : module.part + 1]
        for names, part in zip(parts, b.chunk(max(1, len(parts)), 1), strict=False):
            for expert in range(size.experts):
                held = (name.replace("*", str(expert)) for name in names)
                name = next((name for name in held if f"{name}.weight" in files), None)
                if name is None:
                    raise _not_mergeable(module)
                found[name] = Factors(a[expert], part[expert], module.scaling)
        if not parts:
            raise _not_mergeable(module)
    return found


def _not_mergeable(module: ExpertsModule) -> AdapterError:
    return AdapterError(f"the base's files have no weights of '{module.parameter}' that can be merged into", "merge")


def _join_parts(
    before: Factors | StackedFactors | None, module: ExpertsModule, size: ExpertsSize, a: Tensor, b: Tensor
) -> StackedFactors:
    """The factors of a part, joined with those of the parameter's other parts."""
    whole = b.new_zeros(len(b), size.out_features, module.rank)
    whole[:, module.part * b.shape[1] : (module.part + 1) * b.shape[1]] = b
    if not isinstance(before, StackedFactors):
        return StackedFactors(a, whole, module.scaling)
    scaling = before.scaling or module.scaling or 1.0  # one for both; either may be 0
    parts = before.b * (before.scaling / scaling), whole * (module.scaling / scaling)
    return StackedFactors(torch.cat([before.a, a], 1), torch.cat(parts, 2), scaling)


def _stacked(module: ExpertsModule, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """A [experts, rank, in] and B [experts, out, rank]."""
    if len(tensors) == 2:
        a = tensors[0].view(module.experts, module.rank, -1)
        b = tensors[1].view(-1, module.rank, module.experts).permute(2, 0, 1)
    else:
        a, b = torch.stack(tensors[: module.experts]), torch.stack(tensors[module.experts :])
    return a, b


# --- expert by expert ----------------------------------------------------------------------------------------------

_SEPARATOR = "#"  # in no name of a module


def read_per_expert(directory: Path, sizes: Mapping[str, ExpertsSize]) -> dict[str, Factors]:
    """The experts' factors of a published adapter, expert by expert; separate gate and up are joined, at the sum of
    their ranks."""
    found: dict[str, Factors] = {}
    for parameter, factors in read_experts(directory, sizes, sizes).items():
        for expert, (a, b) in enumerate(zip(factors.a, factors.b, strict=True)):
            found[f"{parameter}{_SEPARATOR}{expert}"] = Factors(a, b, factors.scaling)
    return found


def parameter_of(name: str) -> str | None:
    """The parameter of a single expert's factors; None for any other module."""
    parameter, separator, _ = name.partition(_SEPARATOR)
    return parameter if separator else None


def join_experts(
    mixed: Mapping[str, tuple[Tensor, Tensor]], experts: Collection[str]
) -> dict[str, tuple[Tensor, Tensor]]:
    """The pairs in PEFT's layout of a file: those of single experts joined under their parameter's module.

    Args:
        experts: the base's parameters of experts, in their order.
    """
    found = {name: pair for name, pair in mixed.items() if parameter_of(name) is None}
    by_parameter: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, pair in mixed.items():
        if parameter := parameter_of(name):
            by_parameter.setdefault(parameter, []).append(pair)
    adapted = [parameter for parameter in experts if parameter in by_parameter]
    for parameter in adapted:
        a, b = zip(*by_parameter[parameter], strict=True)
        found[peft_module_of(parameter, adapted)] = torch.cat(a), torch.stack(b, dim=-1).flatten(1)
    return found
