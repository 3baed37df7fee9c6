"""Latencies and throughput from timelines. The definitions are those of vLLM's benchmark; times are in seconds.

For one request with n output tokens:

- TTFT, time to first token: sending the request (connecting included) -> arrival of the event with the first token.
- E2E, end-to-end latency: sending -> arrival of the event with the last token.
- TPOT, time per output token: (E2E - TTFT) / (n - 1); undefined for n = 1.
- ITL, inter-token latencies: the gaps between successive events with tokens.

For a run, from the first request's sending to the last request's end:

- output throughput: all output tokens of successful requests / duration.
- goodput: successful requests that meet every limit of the SLO / duration (requests per second).
- an error: a refused, broken or timed-out request, or one without its full token count. Errors have no latencies and
  appear in the error count only.
- lateness: actual minus planned sending time; if it is large, the client was the limit, not the server.

Decode rate: see `decode_rate`.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from loadtest.client import Timeline
from loadtest.scenario import Slo


def ttft(timeline: Timeline) -> float:
    """Return the time to first token, in seconds."""
    return timeline.tokens[0][0] - timeline.sent


def e2e(timeline: Timeline) -> float:
    """Return the end-to-end latency, in seconds."""
    return timeline.tokens[-1][0] - timeline.sent


def tpot(timeline: Timeline) -> float | None:
    """Return the time per output token after the first, in seconds; None for a single token."""
    if timeline.output_tokens < 2:
        return None
    return (e2e(timeline) - ttft(timeline)) / (timeline.output_tokens - 1)


def itl(timeline: Timeline) -> list[float]:
    """Return the gaps between successive events with tokens, in seconds."""
    arrivals = [arrival for arrival, _ in timeline.tokens]
    return [later - earlier for earlier, later in itertools.pairwise(arrivals)]


def meets(timeline: Timeline, slo: Slo) -> bool:
    """Whether a successful request meets all limits. A single token has no TPOT and meets that limit."""
    return (
        (slo.ttft is None or ttft(timeline) <= slo.ttft)
        and (slo.tpot is None or (tpot(timeline) or 0.0) <= slo.tpot)
        and (slo.e2e is None or e2e(timeline) <= slo.e2e)
    )


def decode_rate(timelines: Sequence[Timeline]) -> float | None:
    """Return the tokens per second over all streams, in the window in which all streams decode.

    The window starts at the last arrival of a first token and ends at the first arrival of a last token. Tokens after
    its start count, so every stream's first token, which belongs to prefill, does not.
    For one stream: (tokens after the first) / (time after the first).

    A server that runs requests one after another has no such window. Then the window is the time in which any stream
    decodes, without the prefill between them. None if no stream has a second token.
    """
    start = max(timeline.tokens[0][0] for timeline in timelines)
    end = min(timeline.tokens[-1][0] for timeline in timelines)
    if end > start:
        return sum(_arrived(timeline, end) - _arrived(timeline, start) for timeline in timelines) / (end - start)
    seconds = _covered([(timeline.tokens[0][0], timeline.tokens[-1][0]) for timeline in timelines])
    return sum(timeline.tokens[-1][1] - timeline.tokens[0][1] for timeline in timelines) / seconds if seconds else None


def _covered(spans: Sequence[tuple[float, float]]) -> float:
    """Return the total time covered by the spans."""
    total, until = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def _arrived(timeline: Timeline, moment: float) -> float:
    """Return the number of tokens that had arrived by `moment`."""
    count = 0.0
    for arrival, total in timeline.tokens:
        if arrival > moment:
            break
        count = total
    return count


@dataclass(frozen=True, slots=True)
class Spread:
    """A distribution in a few numbers (seconds)."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread | None":
        """Summarise values; None if there are none."""
        array = np.fromiter(values, dtype=np.float64)
        if not array.size:
            return None
        p50, p90, p99 = np.percentile(array, [50, 90, 99]).tolist()
        return cls(float(array.mean()), p50, p90, p99, float(array.max()))


@dataclass(frozen=True, slots=True)
class Summary:
    """The figures of one run; units and definitions as in the module's docstring."""

    requests: int
    errors: int
    error_messages: dict[str, int]
    duration: float
    prompt_tokens: int
    output_tokens: int
    request_throughput: float
    output_throughput: float
    goodput: float | None  # None: no SLO was given
    ttft: Spread | None
    tpot: Spread | None
    itl: Spread | None
    e2e: Spread | None
    lateness: Spread | None
    adapters: int  # distinct ones named by requests
    client_cpu: float  # CPU seconds of this client

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


def summarise(timelines: Sequence[Timeline], slo: Slo, client_cpu: float = 0.0) -> Summary:
    """Compute the figures of one run. Raises ValueError for a run without requests."""
    if not timelines:
        raise ValueError("a run without requests has no numbers")
    good = [t for t in timelines if t.error is None]
    messages: dict[str, int] = {}
    for timeline in timelines:
        if timeline.error is not None:
            messages[timeline.error] = messages.get(timeline.error, 0) + 1
    duration = max(t.finished for t in timelines) - min(t.sent for t in timelines)
    output_tokens = sum(t.output_tokens for t in good)
    limited = slo != Slo()
    return Summary(
        requests=len(timelines),
        errors=len(timelines) - len(good),
        error_messages=messages,
        duration=duration,
        prompt_tokens=sum(t.prompt_tokens for t in good),
        output_tokens=output_tokens,
        request_throughput=len(good) / duration,
        output_throughput=output_tokens / duration,
        goodput=sum(meets(t, slo) for t in good) / duration if limited else None,
        ttft=Spread.of(map(ttft, good)),
        tpot=Spread.of(value for t in good if (value := tpot(t)) is not None),
        itl=Spread.of(gap for t in good for gap in itl(t)),
        e2e=Spread.of(map(e2e, good)),
        lateness=Spread.of(t.sent - t.scheduled for t in timelines),
        adapters=len({t.adapter for t in good if t.adapter is not None}),
        client_cpu=client_cpu,
    )
