"""Adapters in host memory: rows laid out as the pool has them, ready to be copied to the device.

That is in row units: int16 `[units, width]`, the same bytes as `[rank, width]` numbers of any dtype.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from adapters import kernels
from adapters.device.variants import Extras
from adapters.peft_format.packed_rows import RowFile
from adapters.peft_format.sizes import EXTRAS, extra_units

AT_ONCE_BYTES = 1 << 20  # are copied in less than a millisecond
DTYPE_CODES = {torch.float32: kernels.FP32, torch.bfloat16: kernels.BF16, torch.float16: kernels.FP16}
_DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}


def as_units(matrix: Tensor) -> Tensor:
    """`[rank, width]` numbers -> int16 `[units, width]`."""
    return matrix.flatten().view(torch.int16).view(-1, matrix.shape[1])  # strides of one column may be anything


def from_units(storage: Tensor, first: int, rank: int, code: int) -> Tensor:
    """A copy of `rank` rows that begin at unit `first` of int16 `[units, width]`: `[rank, width]` numbers."""
    dtype = _DTYPES[code]
    units = rank * dtype.itemsize // storage.dtype.itemsize
    return storage[first : first + units].flatten().clone().view(dtype).view(rank, -1)


class HostRows(NamedTuple):
    """One linear's rows in row units: a int16 [units, in], b int16 [units, out]."""

    a: Tensor
    b: Tensor
    rank: int
    scaling: float


@dataclass(frozen=True, eq=False)
class HostAdapter:
    """An adapter read, transposed and laid out, ready for the device."""

    digest: str
    dtype: int  # a DTYPE_CODES value, one for the whole adapter
    linears: dict[str, HostRows]  # by full module name
    bytes: int
    rank: int  # the largest
    extras: Extras | None = None  # its effect besides rank rows
    extra_bytes: int = 0  # that these count for on the device
    invocation: tuple[int, ...] = ()  # the adapter is in force from the last occurrence of these tokens on
    file: RowFile | None = None  # the numbers are there, and `linears` has their shapes only

    def units(self, kinds: Mapping[str, str]) -> dict[str, int]:
        """Row units needed per kind: the largest window over that kind's layers. `kinds`: module name -> kind."""
        need: dict[str, int] = {}
        for name, rows in self.linears.items():
            kind = kinds[name]
            need[kind] = max(need.get(kind, 0), len(rows.a))
        return need | ({EXTRAS: extra_units(self.extra_bytes)} if self.extra_bytes else {})

    @property
    def fills_at_once(self) -> bool:
        """Whether copying it to the device takes no time to speak of."""
        return self.bytes <= AT_ONCE_BYTES


def host_adapter(
    digest: str, modules: Mapping[str, tuple[Tensor, Tensor, float]], dtype: torch.dtype, pin: bool = False
) -> HostAdapter:
    """Lay an adapter out for the pool. `modules`: name -> (A [rank, in], B [out, rank], scaling)."""
    linears: dict[str, HostRows] = {}
    total = 0
    for name, (a, b, scaling) in modules.items():
        units_a, units_b = (as_units(matrix.to(dtype)) for matrix in (a, b.T))
        linears[name] = HostRows(units_a, units_b, a.shape[0], scaling)
        total += units_a.nbytes + units_b.nbytes
    if pin:
        # In one piece: to ask for such memory disturbs the device, however little it is.
        linears = moved(linears, torch.empty(total // 2, dtype=torch.int16, pin_memory=True))
    rank = max((rows.rank for rows in linears.values()), default=0)
    return HostAdapter(digest, DTYPE_CODES[dtype], linears, total, rank)


def filed_adapter(digest: str, file: RowFile, dtype: torch.dtype, device: torch.device) -> HostAdapter:
    """An adapter whose rows are laid out already.

    Those of a large one are read when a CPU's rows are there to take them: in between they would be copied twice.
    """
    pin = device.type == "cuda"
    if pin or file.bytes <= AT_ONCE_BYTES:
        memory = torch.empty(file.bytes // 2, dtype=torch.int16, pin_memory=pin)
        file.read_into([memory.numpy()])
    else:
        memory = torch.empty(file.bytes // 2, dtype=torch.int16, device="meta")
    linears = {}
    for part in file.parts:
        sizes = [part.units * part.inputs, part.units * part.outputs]
        a, b, memory = memory.split([*sizes, len(memory) - sum(sizes)])
        linears[part.name] = HostRows(a.view(part.units, -1), b.view(part.units, -1), part.rank, part.scaling)
    return HostAdapter(
        digest,
        DTYPE_CODES[dtype],
        linears,
        file.bytes,
        max((part.rank for part in file.parts), default=0),
        file=file if memory.is_meta else None,
    )


def moved(linears: Mapping[str, HostRows], memory: Tensor) -> dict[str, HostRows]:
    """The same rows one after the other in `memory`, int16 [units in all]."""
    found = {}
    for name, rows in linears.items():
        a, b, memory = memory.split([rows.a.numel(), rows.b.numel(), memory.numel() - rows.a.numel() - rows.b.numel()])
        found[name] = rows._replace(a=a.view_as(rows.a).copy_(rows.a), b=b.view_as(rows.b).copy_(rows.b))
    return found
