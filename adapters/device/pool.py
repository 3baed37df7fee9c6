"""The rank-row pool: storage of resident adapters on the device.

Each LoraLinear has one A tensor and one B tensor of row units; an adapter owns a window of rows per module kind, the
same rows in every layer. Addresses never change after construction. The cache (cache.py) decides which adapters are
resident.
"""

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from adapters import kernels
from adapters.device.host import HostAdapter, from_units
from adapters.device.lora import LoraLinear
from adapters.device.memory import to_device, zeros
from adapters.device.rows import RowAllocator, round_up
from adapters.device.variants import Extras
from adapters.peft_format.sizes import LinearSize


@dataclass(frozen=True, eq=False)
class ResidentAdapter:
    """One adapter on the device: its rows, as the columns of a segment table of L linears, and its extras."""

    windows: dict[str, int]  # kind -> first unit
    linears: list[int]  # indices of the linears it targets
    first_unit: np.ndarray  # int32 [L]
    ranks: np.ndarray  # int32 [L], 0 for linears that the adapter does not target
    scaling: np.ndarray  # fp32 [L]
    dtype: int  # a DTYPE_CODES value
    extras: Extras | None  # on the device
    invocation: tuple[int, ...]  # in force from the last occurrence of these tokens on; empty: from the first token
    reserved: torch.cuda.Event | None  # recorded after the previous owner's last use of the rows

    @property
    def plain(self) -> bool:
        """Whether the adapter has rank rows only."""
        return self.extras is None and not self.invocation

    def start_in(self, prompt: Sequence[int]) -> int:
        """Return the first position under the adapter; `sys.maxsize` if its invocation does not occur (as in PEFT)."""
        count = len(self.invocation)
        for start in range(len(prompt) - count, -1, -1) if count else (0,):
            if tuple(prompt[start : start + count]) == self.invocation:
                return start
        return sys.maxsize


class Use(NamedTuple):
    """A run of a step's tokens that uses one resident adapter."""

    start: int
    end: int
    digest: str
    weight: float


class SegmentDeltas:
    """The adapters' deltas of one serving step: `Deltas` over the pool's rows.

    table int32 [L, S, 5], scale fp32 [L, S]: one segment table per linear, see `kernels.lora_add_`.
    """

    def __init__(self, pool: "RowPool", table: Tensor, scale: Tensor, touched: list[bool]) -> None:
        self.pool = pool
        self.table = table
        self.scale = scale
        self._touched = touched

    def add(self, linear: LoraLinear, x: Tensor, y: Tensor) -> Tensor:
        index = linear.index
        if self._touched[index]:
            kernels.lora_add_(y, x, self.pool.a[index], self.pool.b[index], self.table[index], self.scale[index])
        return y


class RowPool:
    """Rank-row storage for every LoraLinear, and the windows that adapters own in it.

    Args:
        linears: full module name -> sizes, in LoraLinear index order.
        capacity: kind -> row units; EXTRAS among them.
            The invariant per kind: free units + resident units = capacity.
    """

    def __init__(self, linears: Mapping[str, LinearSize], capacity: Mapping[str, int], device: torch.device) -> None:
        self.names = list(linears)
        self.kinds = {name: linear.kind for name, linear in linears.items()}
        self.device = device
        self.rows = {kind: RowAllocator(units) for kind, units in capacity.items()}
        self._index = {name: index for index, name in enumerate(self.names)}
        # On a GPU rows are filled on a separate stream, concurrently with steps.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._adapters: dict[str, ResidentAdapter] = {}
        self._last_deltas: tuple[list[Use], SegmentDeltas] | None = (
            None  # the last result of `deltas`, while it is valid
        )

        # Zeros, not empty: kernels that work in whole tiles may read unused rows (and multiply them by zero).
        def storage(linear: LinearSize, width: int) -> Tensor:
            return zeros((self.rows[linear.kind].capacity, width), torch.int16, device)

        self.a = [storage(linear, linear.in_features) for linear in linears.values()]
        self.b = [storage(linear, linear.out_features) for linear in linears.values()]

    def __contains__(self, digest: str) -> bool:
        return digest in self._adapters

    def adapter(self, digest: str) -> ResidentAdapter | None:
        """Return a resident adapter; None if it is not on the device."""
        return self._adapters.get(digest)

    @property
    def capacity(self) -> dict[str, int]:
        return {kind: rows.capacity for kind, rows in self.rows.items()}

    @property
    def free(self) -> dict[str, int]:
        return {kind: rows.free for kind, rows in self.rows.items()}

    @property
    def resident(self) -> dict[str, int]:
        return {kind: rows.used for kind, rows in self.rows.items()}

    def units_of(self, digest: str) -> dict[str, int]:
        """Return the units per kind of a resident adapter."""
        windows = self._adapters[digest].windows
        return {kind: self.rows[kind].size_of(first) for kind, first in windows.items()}

    def insert(self, adapter: HostAdapter) -> bool:
        """Make an adapter resident; False, with no change, if rows are lacking. See `reserve`."""
        if not self.reserve(adapter):
            return False
        self.fill(adapter)
        return True

    def reserve(self, adapter: HostAdapter, *, compact: bool = True) -> bool:
        """Reserve an adapter's rows, to be filled. False if rows are lacking; then, and after a fault, it keeps none.

        Args:
            compact: move other adapters if enough units are free but not in one gap, which would be False otherwise.
                Only between steps, and while no rows are being filled.
        """
        need = adapter.units(self.kinds)
        if any(round_up(units) > self.rows[kind].free for kind, units in need.items()):
            return False
        windows: dict[str, int] = {}
        with ExitStack() as undo:
            for kind, units in need.items():
                first = self.rows[kind].allocate(units)
                if first is None and compact:
                    self._compact(kind)
                    first = self.rows[kind].allocate(units)
                if first is None:
                    return False
                windows[kind] = first
                undo.callback(self.rows[kind].release, first)
            self._adapters[adapter.digest] = self._make_resident(adapter, windows)
            undo.pop_all()
        self._last_deltas = None
        return True

    def _make_resident(self, adapter: HostAdapter, windows: dict[str, int]) -> ResidentAdapter:
        count = len(self.names)
        placed = ResidentAdapter(
            windows,
            [self._index[name] for name in adapter.linears],
            first_unit=np.zeros(count, np.int32),
            ranks=np.zeros(count, np.int32),
            scaling=np.zeros(count, np.float32),
            dtype=adapter.dtype,
            extras=None if adapter.extras is None else adapter.extras.to(self.device),
            invocation=adapter.invocation,
            reserved=None if self._stream is None else torch.cuda.current_stream(self.device).record_event(),
        )
        for name, rows in adapter.linears.items():
            index = self._index[name]
            placed.first_unit[index] = windows[self.kinds[name]]
            placed.ranks[index] = rows.rank
            placed.scaling[index] = rows.scaling
        return placed

    def fill(self, adapter: HostAdapter) -> None:
        """Copy an adapter into its rows. May run in another thread during steps, since no step reads them yet.

        Raises OSError if its file cannot be read.
        """
        if self._stream is None:
            self._copy(adapter)
            return
        with torch.cuda.stream(self._stream):
            reserved = self._adapters[adapter.digest].reserved
            assert reserved is not None
            self._stream.wait_event(reserved)
            self._copy(adapter)
        self._stream.synchronize()  # steps read the filled rows on another stream

    def _copy(self, adapter: HostAdapter) -> None:
        windows = self._adapters[adapter.digest].windows
        rows: list[Tensor] = []
        for name, linear in adapter.linears.items():
            index, first = self._index[name], windows[self.kinds[name]]
            rows += [storage[index][first : first + len(linear.a)] for storage in (self.a, self.b)]
        if adapter.file is not None:
            adapter.file.read_into([row.numpy() for row in rows])
            return
        numbers = [matrix for linear in adapter.linears.values() for matrix in (linear.a, linear.b)]
        for row, matrix in zip(rows, numbers, strict=True):
            row.copy_(matrix, non_blocking=True)

    def remove(self, digest: str) -> None:
        """Free an adapter's rows. Raises KeyError if it is not resident."""
        self._last_deltas = None
        for kind, first in self._adapters.pop(digest).windows.items():
            self.rows[kind].release(first)

    def factors(self, digest: str, name: str) -> tuple[Tensor, Tensor, float] | None:
        """Return copies of an adapter's A [rank, in] and B [out, rank] at a linear, and its scaling; None without."""
        adapter, index = self._adapters[digest], self._index[name]
        first, rank = int(adapter.first_unit[index]), int(adapter.ranks[index])
        if not rank:
            return None
        a, b = (from_units(rows[index], first, rank, adapter.dtype) for rows in (self.a, self.b))
        return a, b.T, float(adapter.scaling[index])

    def deltas(self, uses: Sequence[Use]) -> SegmentDeltas | None:
        """Return the segment tables of one step; None if no token uses an adapter."""
        if not uses:
            return None
        if self._last_deltas is not None and self._last_deltas[0] == uses:  # common while the same requests decode
            return self._last_deltas[1]
        count = len(self.names)
        table = np.empty((count, len(uses), 5), np.int32)
        scale = np.empty((count, len(uses)), np.float32)
        for column, use in enumerate(uses):
            adapter = self._adapters[use.digest]
            table[:, column, 0] = use.start
            table[:, column, 1] = use.end
            table[:, column, 2] = adapter.first_unit
            table[:, column, 3] = adapter.ranks
            table[:, column, 4] = adapter.dtype
            scale[:, column] = adapter.scaling * np.float32(use.weight)
        touched = np.asarray(table[:, :, 3].any(axis=1)).tolist()
        deltas = SegmentDeltas(
            self,
            to_device(torch.from_numpy(table), self.device),
            to_device(torch.from_numpy(scale), self.device),
            touched,
        )
        self._last_deltas = [*uses], deltas
        return deltas

    def _compact(self, kind: str) -> None:
        self._last_deltas = None
        moves = self.rows[kind].compact()
        moved = {move.source: move.target for move in moves}
        for name, index in self._index.items():
            if self.kinds[name] != kind:
                continue
            for storage in (self.a[index], self.b[index]):
                for source, target, units in moves:
                    # Source and target may overlap: copy through a temporary.
                    storage[target : target + units] = storage[source : source + units].clone()
        for adapter in self._adapters.values():
            first = adapter.windows.get(kind)
            if first in moved:
                adapter.windows[kind] = moved[first]
                for index in adapter.linears:
                    if self.kinds[self.names[index]] == kind:
                        adapter.first_unit[index] = moved[first]
