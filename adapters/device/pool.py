"""The rank-row pool: where resident adapters live on the device.

Each LoraLinear has one A tensor and one B tensor of 2-byte units; an adapter owns a window of rows per module kind, the
same rows in every layer. Addresses never change after construction. Knows adapters as `HostAdapter`s (rows ready to be
copied) by digest.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from adapters import kernels
from adapters.device.lora import LoraLinear
from adapters.device.memory import sent, zeros
from adapters.device.rows import RowAllocator, rounded
from adapters.peft_format.directory import EXTRAS, EXTRAS_UNIT
from adapters.peft_format.packed_rows import RowFile

if TYPE_CHECKING:
    from adapters.device.variants import Extras

DTYPE_CODES = {torch.float32: kernels.FP32, torch.bfloat16: kernels.BF16, torch.float16: kernels.FP16}
_DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}


AT_ONCE_BYTES = 1 << 20  # are copied in less than a millisecond


class LinearSize(Protocol):
    """What the pool needs to know of a linear."""

    @property
    def kind(self) -> str: ...
    @property
    def in_features(self) -> int: ...
    @property
    def out_features(self) -> int: ...


class HostRows(NamedTuple):
    """One linear's part of an adapter in host memory, as raw units: a int16 [units, in], b int16 [units, out]."""

    a: Tensor
    b: Tensor
    rank: int
    scaling: float


@dataclass(frozen=True, eq=False)
class HostAdapter:
    """An adapter read, transposed and laid out, ready for the device."""

    digest: str
    dtype: int  # a DTYPE_CODES value, one for the whole adapter
    linears: dict[str, HostRows]  # full module name -> rows
    bytes: int
    rank: int  # the largest
    extras: "Extras | None" = None  # what it does besides rank rows
    extra_bytes: int = 0  # that these count for on the device
    invocation: tuple[int, ...] = ()  # the adapter is in force from the last occurrence of these tokens on
    file: RowFile | None = None  # the numbers are there, and `linears` has their shapes only

    def units(self, kinds: Mapping[str, str]) -> dict[str, int]:
        """Row units needed per kind: the largest window over that kind's layers. `kinds`: module name -> kind."""
        need: dict[str, int] = {}
        for name, rows in self.linears.items():
            kind = kinds[name]
            need[kind] = max(need.get(kind, 0), len(rows.a))
        return need | ({EXTRAS: -(-self.extra_bytes // EXTRAS_UNIT)} if self.extra_bytes else {})


def host_adapter(
    digest: str, modules: Mapping[str, tuple[Tensor, Tensor, float]], dtype: torch.dtype, pin: bool = False
) -> HostAdapter:
    """Lay an adapter out for the pool. `modules`: name -> (A [rank, in], B [out, rank], scaling)."""
    linears: dict[str, HostRows] = {}
    total = 0
    for name, (a, b, scaling) in modules.items():
        units_a, units_b = (as_units(matrix.to(dtype)) for matrix in (a, b.T))
        linears[name] = HostRows(units_a, units_b, a.shape[0], scaling)
        total += 2 * (units_a.numel() + units_b.numel())
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


def as_units(matrix: Tensor) -> Tensor:
    """`[rank, width]` numbers -> int16 `[units, width]`, the same bytes."""
    matrix = matrix.contiguous()
    return matrix.view(torch.int16).view(-1, matrix.shape[1])


class _Placement(NamedTuple):
    """Columns of a segment table that do not depend on the step, one entry per linear."""

    windows: dict[str, int]  # kind -> first unit
    linears: list[int]  # indices of the linears it touches
    first_unit: np.ndarray  # int32 [L]
    rank: np.ndarray  # int32 [L], 0 where the adapter does not touch the linear
    scaling: np.ndarray  # fp32 [L]
    dtype: int


class Use(NamedTuple):
    """A run of a step's tokens that uses one resident adapter."""

    start: int
    end: int
    digest: str
    weight: float


class SegmentDeltas:
    """The adapters' part of one serving step: `Deltas` over the pool's rows.

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
        capacity: kind -> row units; under EXTRAS, how many units of EXTRAS_UNIT bytes adapters may take beside rows.
            The invariant per kind: free units + resident units = capacity.
    """

    def __init__(self, linears: Mapping[str, LinearSize], capacity: Mapping[str, int], device: torch.device) -> None:
        self.names = list(linears)
        self.kinds = {name: linear.kind for name, linear in linears.items()}
        self.device = device
        self.rows = {kind: RowAllocator(units) for kind, units in capacity.items()}
        self._index = {name: index for index, name in enumerate(self.names)}
        # On a GPU rows are filled by a stream of its own, beside the steps'.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._reserved: dict[str, torch.cuda.Event] = {}  # behind whatever used an adapter's rows before
        self._placements: dict[str, _Placement] = {}
        self._last: tuple[list[Use], SegmentDeltas] | None = None  # what `deltas` gave last, while that holds
        self.extras: dict[str, Extras] = {}  # by digest, of the resident adapters that have some
        self.invocations: dict[str, tuple[int, ...]] = {}  # likewise

        # Zeros, not empty: an unused row may be read (and multiplied by nothing) by a kernel that works in whole tiles.
        def storage(linear: LinearSize, width: int) -> Tensor:
            return zeros((self.rows[linear.kind].capacity, width), torch.int16, device)

        self.a = [storage(linear, linear.in_features) for linear in linears.values()]
        self.b = [storage(linear, linear.out_features) for linear in linears.values()]

    def __contains__(self, digest: str) -> bool:
        return digest in self._placements

    @property
    def capacity(self) -> dict[str, int]:
        return {kind: rows.capacity for kind, rows in self.rows.items()}

    @property
    def free(self) -> dict[str, int]:
        return {kind: rows.free for kind, rows in self.rows.items()}

    @property
    def resident(self) -> dict[str, int]:
        return {kind: rows.taken for kind, rows in self.rows.items()}

    def units_of(self, digest: str) -> dict[str, int]:
        """Units per kind that a resident adapter holds."""
        windows = self._placements[digest].windows
        return {kind: self.rows[kind].size_of(first) for kind, first in windows.items()}

    def insert(self, adapter: HostAdapter) -> bool:
        """Make an adapter resident; False when rows are lacking (nothing is changed then). See `reserve`."""
        if not self.reserve(adapter):
            return False
        self.fill(adapter)
        return True

    def reserve(self, adapter: HostAdapter, *, compact: bool = True) -> bool:
        """Give an adapter its rows, to be filled; False when rows are lacking (nothing is changed then).

        With `compact` it moves the others when free units suffice but no gap does, so it must run between steps, and
        while nobody fills rows. Without, rows are lacking then.
        """
        need = adapter.units(self.kinds)
        if any(rounded(units) > self.rows[kind].free for kind, units in need.items()):
            return False
        windows: dict[str, int] = {}
        for kind, units in need.items():
            first = self.rows[kind].allocate(units)
            if first is None and compact:
                self._compact(kind)
                first = self.rows[kind].allocate(units)
            if first is None:
                for taken, start in windows.items():
                    self.rows[taken].release(start)
                return False
            windows[kind] = first
        if adapter.extras is not None:
            self.extras[adapter.digest] = adapter.extras.to(self.device)
        if adapter.invocation:
            self.invocations[adapter.digest] = adapter.invocation
        count = len(self.names)
        placement = _Placement(
            windows,
            [self._index[name] for name in adapter.linears],
            np.zeros(count, np.int32),
            np.zeros(count, np.int32),
            np.zeros(count, np.float32),
            adapter.dtype,
        )
        for name, rows in adapter.linears.items():
            index, first = self._index[name], windows[self.kinds[name]]
            placement.first_unit[index] = first
            placement.rank[index] = rows.rank
            placement.scaling[index] = rows.scaling
        self._placements[adapter.digest] = placement
        self._last = None
        if self._stream is not None:
            self._reserved[adapter.digest] = torch.cuda.current_stream(self.device).record_event()
        return True

    def fill(self, adapter: HostAdapter) -> None:
        """Copy an adapter into its rows. May run beside steps, in another thread: nobody reads them yet.

        Raises OSError when its file cannot be read.
        """
        if self._stream is None:
            self._copy(adapter)
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._reserved.pop(adapter.digest))
            self._copy(adapter)
        self._stream.synchronize()  # whoever hears that rows are filled reads them on another stream

    def _copy(self, adapter: HostAdapter) -> None:
        windows = self._placements[adapter.digest].windows
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

    def fills_at_once(self, adapter: HostAdapter) -> bool:
        """Whether `fill` takes no time to speak of."""
        return adapter.bytes <= AT_ONCE_BYTES

    def remove(self, digest: str) -> None:
        """Give an adapter's rows back. Raises KeyError when it is not resident."""
        self._last = None
        self.extras.pop(digest, None)
        self.invocations.pop(digest, None)
        for kind, first in self._placements.pop(digest).windows.items():
            self.rows[kind].release(first)

    def factors(self, digest: str, name: str) -> tuple[Tensor, Tensor, float] | None:
        """Copies of a resident adapter's A [rank, in] and B [out, rank] at a linear, and its scaling; None without."""
        placement, index = self._placements[digest], self._index[name]
        rank, dtype = int(placement.rank[index]), _DTYPES[placement.dtype]
        if not rank:
            return None
        first = int(placement.first_unit[index])
        units = rank * dtype.itemsize // 2
        a, b = (rows[index][first : first + units].flatten().clone().view(dtype) for rows in (self.a, self.b))
        return a.view(rank, -1), b.view(rank, -1).T, float(placement.scaling[index])

    def deltas(self, uses: Sequence[Use]) -> SegmentDeltas | None:
        """Segment tables of one step, or None when no token uses an adapter."""
        if not uses:
            return None
        if self._last is not None and self._last[0] == uses:  # as while the same requests decode
            return self._last[1]
        count = len(self.names)
        table = np.empty((count, len(uses), 5), np.int32)
        scale = np.empty((count, len(uses)), np.float32)
        for column, use in enumerate(uses):
            placement = self._placements[use.digest]
            table[:, column, 0] = use.start
            table[:, column, 1] = use.end
            table[:, column, 2] = placement.first_unit
            table[:, column, 3] = placement.rank
            table[:, column, 4] = placement.dtype
            scale[:, column] = placement.scaling * np.float32(use.weight)
        touched = np.asarray(table[:, :, 3].any(axis=1)).tolist()
        deltas = SegmentDeltas(
            self, sent(torch.from_numpy(table), self.device), sent(torch.from_numpy(scale), self.device), touched
        )
        self._last = [*uses], deltas
        return deltas

    def _compact(self, kind: str) -> None:
        self._last = None
        moves = self.rows[kind].compact()
        moved = {move.source: move.target for move in moves}
        for name, index in self._index.items():
            if self.kinds[name] != kind:
                continue
            for storage in (self.a[index], self.b[index]):
                for source, target, units in moves:
                    # A window may slide onto a part of itself: copy through a temporary.
                    storage[target : target + units] = storage[source : source + units].clone()
        for placement in self._placements.values():
            first = placement.windows.get(kind)
            if first in moved:
                placement.windows[kind] = moved[first]
                for index in placement.linears:
                    if self.kinds[self.names[index]] == kind:
                        placement.first_unit[index] = moved[first]
