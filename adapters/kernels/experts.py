"""The weights of one linear of all experts of a layer, quantised separately and stacked in memory."""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from adapters.kernels.placement import on_huge_pages
from adapters.kernels.weight import Int8Copy, QuantizedWeight, WeightKind


@dataclass(frozen=True, eq=False)
class ExpertWeights:
    """The weights `[out, in]` of several experts: the stacked tensors of a `QuantizedWeight` each."""

    kind: WeightKind
    shape: tuple[int, int]  # (out, in) of one expert
    data: Tensor  # [experts, ...], like absmax, nested_absmax and offset
    absmax: Tensor | None = None
    nested_absmax: Tensor | None = None
    offset: Tensor | None = None  # fp32 [experts]
    code: Tensor | None = None
    nested_code: Tensor | None = None
    blocksize: int = 0
    nested_blocksize: int = 0
    int8: Int8Copy | None = None  # of every expert, its `data` stacked; see `with_int8_inputs`

    @classmethod
    def quantize(cls, experts: Iterable[Tensor], kind: str, dtype: torch.dtype) -> "ExpertWeights":
        """Quantise dense weights `[out, in]` one by one like bitsandbytes; 4-bit ones with double quantisation.

        Args:
            kind: nf4, fp4, int8, or none for dense weights in `dtype`.
        """
        singles = [_quantized(dense, kind, dtype) for dense in experts]
        first = singles[0]
        stacked: dict[str, Any] = {
            name: torch.stack([getattr(single, name) for single in singles])
            for name in ("data", "absmax", "nested_absmax")
            if getattr(first, name) is not None
        }
        if first.nested_absmax is not None:
            stacked["offset"] = torch.tensor([single.offset for single in singles], device=first.device)
        return cls(
            first.kind,
            first.shape,
            code=first.code,
            nested_code=first.nested_code,
            blocksize=first.blocksize,
            nested_blocksize=first.nested_blocksize,
            **stacked,
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors, by field name."""
        found = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in found if isinstance(value, Tensor)}

    def to_huge_pages(self) -> "ExpertWeights":
        """Return the same weights in memory that kernels read fastest."""
        moved: dict[str, Any] = {name: on_huge_pages(tensor) for name, tensor in self.tensors().items()}
        return replace(self, **moved)

    def with_int8_inputs(self) -> "ExpertWeights":
        """The same weights, to be multiplied by inputs rounded to int8: see `QuantizedWeight.with_int8_inputs`."""
        copies = [copy for expert in range(len(self)) if (copy := self[expert].with_int8_inputs().int8)]
        data = on_huge_pages(torch.stack([copy.data for copy in copies]))
        return replace(self, int8=Int8Copy(data, copies[0].levels))

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, expert: int) -> QuantizedWeight:
        """Return a view of one expert's weight."""
        absmax, nested_absmax = (
            None if whole is None else whole[expert] for whole in (self.absmax, self.nested_absmax)
        )
        return QuantizedWeight(
            self.kind,
            self.data[expert],
            self.shape,
            absmax,
            self.code,
            self.blocksize,
            nested_absmax,
            self.nested_code,
            self.nested_blocksize,
            0.0 if self.offset is None else float(self.offset[expert]),
            None if self.int8 is None else Int8Copy(self.int8.data[expert], self.int8.levels),
        )


def _quantized(dense: Tensor, kind: str, dtype: torch.dtype) -> QuantizedWeight:
    import bitsandbytes.functional as bnb  # here, since weight.py must import it first (see there)

    shape = (dense.shape[0], dense.shape[1])
    if kind == "none":
        return QuantizedWeight("dense", dense.to(dtype), shape)
    if kind == "int8":
        data, absmax, _ = bnb.int8_vectorwise_quant(dense.to(torch.float16))
        return QuantizedWeight("int8", data, shape, absmax)
    data, state = bnb.quantize_4bit(dense.to(dtype).contiguous(), quant_type=kind, compress_statistics=True)
    nested = state.state2
    return QuantizedWeight(
        state.quant_type,
        data,
        shape,
        state.absmax,
        state.code,
        state.blocksize,
        nested.absmax,
        nested.code,
        nested.blocksize,
        float(state.offset),
    )
