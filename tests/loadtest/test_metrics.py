"""Metric definitions, on timelines whose numbers can be checked by hand."""

import pytest

from loadtest import metrics
from loadtest.client import Timeline
from loadtest.scenario import Slo


def timeline(sent: float, arrivals: list[float], *, error: str | None = None, adapter: str | None = None) -> Timeline:
    """One token an event."""
    return Timeline(
        scheduled=sent - 0.25,
        sent=sent,
        expected_tokens=len(arrivals),
        adapter=adapter,
        tokens=[(arrival, i + 1) for i, arrival in enumerate(arrivals)],
        prompt_tokens=10,
        output_tokens=len(arrivals),
        finished=(arrivals[-1] if arrivals else sent) + 0.5,
        error=error,
    )


A = timeline(0.0, [1.0, 1.5, 2.5], adapter="a")
B = timeline(1.0, [1.5, 2.0, 3.0, 4.0], adapter="b")
BROKEN = timeline(2.0, [], error="HTTP 500: x")


def test_one_request() -> None:
    assert metrics.ttft(A) == 1.0
    assert metrics.e2e(A) == 2.5
    assert metrics.tpot(A) == 0.75
    assert metrics.itl(A) == [0.5, 1.0]
    assert metrics.tpot(timeline(0.0, [1.0])) is None


def test_a_run() -> None:
    summary = metrics.summarise([A, B, BROKEN], Slo(ttft=0.5), client_cpu=0.125)
    assert summary.duration == 4.5  # 0.0 .. B's end at 4.5
    assert (summary.requests, summary.errors, summary.error_messages) == (3, 1, {"HTTP 500: x": 1})
    assert summary.output_tokens == 7
    assert summary.output_throughput == pytest.approx(7 / 4.5)
    assert summary.request_throughput == pytest.approx(2 / 4.5)
    assert summary.goodput == pytest.approx(1 / 4.5)  # only B's first token came in time
    assert summary.ttft is not None
    assert (summary.ttft.mean, summary.ttft.p50, summary.ttft.max) == (0.75, 0.75, 1.0)
    assert summary.itl is not None
    assert summary.itl.mean == pytest.approx((0.5 + 1.0 + 0.5 + 1.0 + 1.0) / 5)
    assert summary.lateness is not None
    assert summary.lateness.max == 0.25
    assert summary.adapters == 2
    assert summary.client_cpu == 0.125


def test_no_slo_no_goodput() -> None:
    assert metrics.summarise([A], Slo()).goodput is None


def test_only_errors() -> None:
    summary = metrics.summarise([BROKEN], Slo(e2e=1.0))
    assert (summary.ttft, summary.output_throughput, summary.goodput) == (None, 0, 0)


@pytest.mark.parametrize(
    ("slo", "good"),
    [
        (Slo(ttft=1.0, tpot=0.75, e2e=2.5), True),
        (Slo(ttft=0.9), False),
        (Slo(tpot=0.7), False),
        (Slo(e2e=2.4), False),
        (Slo(ttft=1.0, e2e=2.4), False),
    ],
)
def test_a_request_must_meet_every_limit(slo: Slo, good: bool) -> None:
    assert metrics.meets(A, slo) is good


def test_decode_rate_of_one_stream() -> None:
    assert metrics.decode_rate([A]) == pytest.approx(2 / 1.5)


def test_decode_rate_counts_the_common_window() -> None:
    # The window is (1.5, 2.5]: A brings one token in it (2.5), B one (2.0).
    assert metrics.decode_rate([A, B]) == pytest.approx(2 / 1.0)


def test_decode_rate_without_a_common_window() -> None:
    # One after another: A decodes from 1.0 to 2.5 and the other from 4.0 to 5.0, two tokens and one.
    assert metrics.decode_rate([A, timeline(3.0, [4.0, 5.0])]) == pytest.approx(3 / 2.5)
    # Overlapping in pairs only: no moment counts twice.
    chain = [timeline(0.0, [1.0, 2.0]), timeline(0.0, [1.5, 3.0]), timeline(0.0, [2.5, 4.0])]
    assert metrics.decode_rate(chain) == pytest.approx(3 / 3.0)


def test_single_tokens_have_no_decode_rate() -> None:
    assert metrics.decode_rate([timeline(0.0, [1.0]), timeline(0.0, [2.0])]) is None


def test_events_that_carry_several_tokens() -> None:
    pairs = Timeline(0.0, 0.0, 6, tokens=[(1.0, 2), (2.0, 4), (3.0, 6)], output_tokens=6)
    assert metrics.decode_rate([pairs]) == pytest.approx(4 / 2.0)
    assert metrics.tpot(pairs) == pytest.approx(2.0 / 5)
