"""The row allocator against a reference model: a list of cells with the owner of each."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from adapters.device.rows import GRANULE, RowAllocator, round_up

CAPACITY = 24


class RowsMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.rows = RowAllocator(CAPACITY)
        self.cells: list[int | None] = [None] * CAPACITY  # owner of each unit
        self.windows: dict[int, int] = {}  # owner -> first unit
        self.owners = 0

    @rule(units=st.integers(1, 10))
    def allocate(self, units: int) -> None:
        width = round_up(units)
        first = self.rows.allocate(units)
        gaps = "".join("." if cell is None else "#" for cell in self.cells)
        if first is None:
            assert "." * width not in gaps, "a wide enough gap existed"
            return
        assert first % GRANULE == 0
        assert gaps[first : first + width] == "." * width
        self.owners += 1
        self.cells[first : first + width] = [self.owners] * width
        self.windows[self.owners] = first

    @precondition(lambda self: self.windows)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(sorted(self.windows)))
        self.rows.release(self.windows.pop(owner))
        self.cells = [None if cell == owner else cell for cell in self.cells]

    @rule()
    def compact(self) -> None:
        for source, target, units in self.rows.compact():
            moved = self.cells[source : source + units]
            assert len(set(moved)) == 1
            assert moved[0] is not None, "only owned rows are moved, and each window as a whole"
            self.cells[source : source + units] = [None] * units
            assert self.cells[target : target + units] == [None] * units, "nothing is overwritten"
            self.cells[target : target + units] = moved
            self.windows[moved[0]] = target
        assert None not in self.cells[: self.rows.used], "all free units are at the end"

    @invariant()
    def accounts(self) -> None:
        assert self.rows.free == self.cells.count(None)
        assert self.rows.free + self.rows.used == self.rows.capacity == CAPACITY
        for owner, first in self.windows.items():
            assert self.rows.size_of(first) == self.cells.count(owner)


TestRows = RowsMachine.TestCase


@given(st.integers(-3, 0))
def test_a_window_has_units(units: int) -> None:
    with pytest.raises(ValueError, match="at least one unit"):
        RowAllocator(8).allocate(units)


def test_an_odd_capacity_loses_its_last_unit() -> None:
    assert RowAllocator(7).capacity == 6
