"""Allocation of one module kind's rows: first-fit windows over a fixed number of row units.

Bookkeeping only; it holds no tensor. Windows start and end on even row units, so that fp32 rows are always aligned.
"""

from typing import NamedTuple

GRANULE = 2


class Move(NamedTuple):
    """A copy of `units` rows from `source` down to `target`, which may overlap `source`."""

    source: int
    target: int
    units: int


def round_up(units: int) -> int:
    """Return the units that a window of this size occupies."""
    return -(-units // GRANULE) * GRANULE


class RowAllocator:
    """Windows of consecutive row units.

    Invariant: `free + sum of windows = capacity`, and no two windows overlap.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity // GRANULE * GRANULE
        self._windows: dict[int, int] = {}  # first unit -> units

    @property
    def used(self) -> int:
        return sum(self._windows.values())

    @property
    def free(self) -> int:
        return self.capacity - self.used

    def size_of(self, first: int) -> int:
        """Return the units of the window that starts at `first`."""
        return self._windows[first]

    def allocate(self, units: int) -> int | None:
        """Return the first unit of a new window; None if no gap is large enough (after `compact`, `free` units fit)."""
        if units <= 0:
            raise ValueError(f"a window needs at least one unit, not {units}")
        units = round_up(units)
        start = 0
        for first in sorted(self._windows):
            if first - start >= units:
                break
            start = first + self._windows[first]
        if self.capacity - start < units:
            return None
        self._windows[start] = units
        return start

    def release(self, first: int) -> None:
        """Free a window. Raises KeyError if none starts at `first`."""
        del self._windows[first]

    def compact(self) -> list[Move]:
        """Slide every window down. Returns the moves, ordered so that no copy overwrites rows still to be copied."""
        moves: list[Move] = []
        packed: dict[int, int] = {}
        target = 0
        for source in sorted(self._windows):
            units = self._windows[source]
            if source != target:
                moves.append(Move(source, target, units))
            packed[target] = units
            target += units
        self._windows = packed
        return moves
