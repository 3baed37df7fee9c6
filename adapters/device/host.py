"""Adapters in host memory, in the pool's layout, ready to be copied to the device.

The layout is row units: int16 `[units, width]`, the same bytes as `[rank, width]` numbers of any dtype.
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

AT_ONCE_BYTES = 1 << 20  # copied in less than a millisecond
DTYPE_CODES = {torch.float32: kernels.FP32, torch.bfloat16: kernels.BF16, torch.float16: kernels.FP16}
_DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}


def as_units(matrix: Tensor) -> Tensor:
    """Return `[rank, width]` numbers as int16 `[units, width]`."""
    return matrix.flatten().view(torch.int16).view(-1, matrix.shape[1])  # flattened, since one column has any strides


def from_units(storage: Tensor, first: int, rank: int, code: int) -> Tensor:
    """Copy `rank` rows from unit `first` on of int16 `[units, width]`, as `[rank, width]` numbers."""
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
    extras: Extras | None = None  # its variants, beyond rank rows
    extra_bytes: int = 0  # device bytes of the extras
    invocation: tuple[int, ...] = ()  # the adapter is in force from the last occurrence of these tokens on
    file: RowFile | None = None  # if set, the numbers are still in this file, and `linears` has only their shapes

    def units(self, kinds: Mapping[str, str]) -> dict[str, int]:
        """Return the row units needed per kind: the most in any layer. `kinds`: module name -> kind."""
        need: dict[str, int] = {}
        for name, rows in self.linears.items():
            kind = kinds[name]
            need[kind] = max(need.get(kind, 0), len(rows.a))
        return need | ({EXTRAS: extra_units(self.extra_bytes)} if self.extra_bytes else {})

    @property
    def fills_at_once(self) -> bool:
        """Whether copying it to the device takes negligible time."""
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
        # In one piece, since every allocation of pinned memory disturbs the device, however small.
        linears = pack_rows(linears, torch.empty(total // 2, dtype=torch.int16, pin_memory=True))
    rank = max((rows.rank for rows in linears.values()), default=0)
    return HostAdapter(digest, DTYPE_CODES[dtype], linears, total, rank)


def adapter_from_row_file(digest: str, file: RowFile, dtype: torch.dtype, device: torch.device) -> HostAdapter:
    """Return an adapter with rows from a row file, already in the pool's layout.

    A large adapter for a CPU is read only when it is filled into its rows, which saves a copy.
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


def pack_rows(linears: Mapping[str, HostRows], memory: Tensor) -> dict[str, HostRows]:
    """Copy rows one after the other into `memory`, int16 [all numbers], and return them there."""
    found = {}
    for name, rows in linears.items():
        a, b, memory = memory.split([rows.a.numel(), rows.b.numel(), memory.numel() - rows.a.numel() - rows.b.numel()])
        found[name] = rows._replace(a=a.view_as(rows.a).copy_(rows.a), b=b.view_as(rows.b).copy_(rows.b))
    return found
