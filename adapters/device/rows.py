"""Which rows of one module kind are taken: first-fit windows over a fixed number of row units.

Pure bookkeeping; holds no tensor and knows no adapter. Windows start and end on even row
units, which keeps an fp32 row aligned wherever it lands.
"""

from typing import NamedTuple

GRANULE = 2


class Move(NamedTuple):
    """Copy `units` rows from `source` down to `target`; windows never overlap each other, a move may overlap itself."""

    source: int
    target: int
    units: int


def rounded(units: int) -> int:
    """Units that a window of this size really takes."""
    return -(-units // GRANULE) * GRANULE


class RowAllocator:
    """Windows of consecutive row units.

    Invariant: `free + sum of windows = capacity`, and no two windows overlap.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity // GRANULE * GRANULE
        self._windows: dict[int, int] = {}  # first unit -> units

    @property
    def taken(self) -> int:
        return sum(self._windows.values())

    @property
    def free(self) -> int:
        return self.capacity - self.taken

    def size_of(self, first: int) -> int:
        """Units of the window that starts at `first`."""
        return self._windows[first]

    def allocate(self, units: int) -> int | None:
        """First unit of a new window, or None when no gap is wide enough (`free` may still suffice: `compact`)."""
        if units <= 0:
            raise ValueError(f"a window needs at least one unit, not {units}")
        units = rounded(units)
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
        """Give a window back. Raises KeyError when none starts there."""
        del self._windows[first]

    def compact(self) -> list[Move]:
        """Slide every window down; the moves are in an order in which no copy overwrites rows still to be copied."""
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
