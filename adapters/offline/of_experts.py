"""Adapters of experts as factors of what the base's files hold: a linear of each expert, or all experts' in one."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from adapters.offline.mix import Factors
from adapters.peft_format import directory as adapter_format
from adapters.peft_format.directory import AdapterSpec
from adapters.peft_format.fields import AdapterError
from adapters.peft_format.modules import ExpertsModule
from adapters.peft_format.sizes import ExpertsSize


class StackedFactors(NamedTuple):
    """`Factors` of every expert. a fp32 [experts, rank, in], b fp32 [experts, out, rank], scaled."""

    a: Tensor
    b: Tensor

    @property
    def delta(self) -> Tensor:
        """[experts, out, in]"""
        return self.b @ self.a


def read(
    directory: Path, sizes: Mapping[str, ExpertsSize], files: Collection[str]
) -> dict[str, Factors | StackedFactors]:
    """Those of a published adapter.

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
            found[module.parameter] = _joined(found.get(module.parameter), module, size, a, b)
            continue
        parts = size.parts if module.parts == 1 else size.parts[module.part : module.part + 1]
        for names, part in zip(parts, b.chunk(max(1, len(parts)), 1), strict=False):
            for expert in range(size.experts):
                held = (name.replace("*", str(expert)) for name in names)
                name = next((name for name in held if f"{name}.weight" in files), None)
                if name is None:
                    raise _refused(module)
                found[name] = Factors(a[expert], part[expert], 1.0)
        if not parts:
            raise _refused(module)
    return found


def _refused(module: ExpertsModule) -> AdapterError:
    return AdapterError(f"the base's files have no weights of '{module.parameter}' that can be merged into", "merge")


def _joined(
    before: Factors | StackedFactors | None, module: ExpertsModule, size: ExpertsSize, a: Tensor, b: Tensor
) -> StackedFactors:
    """With those of the parameter's other parts."""
    whole = b.new_zeros(len(b), size.out_features, module.rank)
    whole[:, module.part * b.shape[1] : (module.part + 1) * b.shape[1]] = b
    if not isinstance(before, StackedFactors):
        return StackedFactors(a, whole)
    return StackedFactors(torch.cat([before.a, a], 1), torch.cat([before.b, whole], 2))


def _stacked(module: ExpertsModule, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
    """A [experts, rank, in] and B [experts, out, rank], the latter scaled."""
    if len(tensors) == 2:
        a = tensors[0].view(module.experts, module.rank, -1)
        b = tensors[1].view(-1, module.rank, module.experts).permute(2, 0, 1)
    else:
        a, b = torch.stack(tensors[: module.experts]), torch.stack(tensors[module.experts :])
    return a, b * module.scaling
