"""Adapters as factors of changes to weights, read from published directories."""

from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from adapters.peft_format import directory as adapter_format
from adapters.peft_format.directory import AdapterSpec
from adapters.peft_format.fields import AdapterError


class Factors(NamedTuple):
    """delta(x) = scaling * B (A x). a fp32 [rank, in], b fp32 [out, rank]."""

    a: Tensor
    b: Tensor
    scaling: float

    @property
    def delta(self) -> Tensor:
        """[out, in]"""
        return self.b @ self.a * self.scaling


class StackedFactors(Factors):
    """`Factors` of all experts. a fp32 [experts, rank, in], b fp32 [experts, out, rank], delta [experts, out, in]."""


def read_factors(directory: Path, allowed_variants: Collection[str] = ()) -> dict[str, Factors]:
    """The factors of a published adapter.

    Args:
        allowed_variants: kinds of variants that the caller handles.

    Raises:
        AdapterError: the adapter has variants that cannot be mixed.
    """
    spec = AdapterSpec.read(directory)
    if kinds := [kind for kind in spec.variants.names if kind not in allowed_variants]:
        raise AdapterError(f"only plain LoRA can be mixed and merged, not {', '.join(kinds)}", "mix")
    tensors = adapter_format.load(directory, spec)
    return {name: Factors(a.float(), b.float(), spec.modules[name].scaling) for name, (a, b) in tensors.items()}
