"""Pacing of training between inference steps."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.training.pacing import Pacer


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def beside(pacer: Pacer, clock: Clock, *, step: float, piece: float, steps: int) -> tuple[float, float]:
    """Alternate inference steps with all allowed pieces. Returns training seconds and the longest gap."""
    trained = longest = 0.0
    for _ in range(steps):
        clock.now += step
        pacer.served(step)
        gap = 0.0
        while pacer.allows(piece):
            clock.now += piece
            pacer.spent(piece)
            gap += piece
        trained += gap
        longest = max(longest, gap)
    return trained, longest


@given(
    step=st.floats(0.005, 0.1),
    piece=st.floats(0.001, 0.02),
    share=st.floats(0.05, 0.6),
    max_stall=st.floats(0.02, 0.05),
)
def test_gaps_and_share_are_bounded(step: float, piece: float, share: float, max_stall: float) -> None:
    clock = Clock()
    trained, longest = beside(Pacer(max_stall, share, clock), clock, step=step, piece=piece, steps=400)
    assert longest <= max_stall + 1e-9
    assert trained / clock.now <= share + 0.02
    assert trained > 0


def test_the_share_is_reached_when_gaps_allow_it() -> None:
    clock = Clock()
    trained, _ = beside(Pacer(0.05, 0.4, clock), clock, step=0.02, piece=0.004, steps=1000)
    assert trained / clock.now == pytest.approx(0.4, rel=0.02)


def test_a_piece_too_long_for_any_gap_runs_once_a_second() -> None:
    clock = Clock()
    trained, longest = beside(Pacer(0.01, 0.5, clock), clock, step=0.02, piece=0.08, steps=500)
    assert longest == 0.08
    assert trained / 0.08 == pytest.approx(clock.now / 1.08, rel=0.1)


def test_no_share_means_no_training_beside_requests() -> None:
    clock = Clock()
    assert beside(Pacer(0.05, 0.0, clock), clock, step=0.02, piece=0.001, steps=500) == (0.0, 0.0)
