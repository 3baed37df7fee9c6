"""A scenario's requests: their times, lengths and adapters, drawn at random.

All draws follow from the scenario's seed, so that two servers can get the same work.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loadtest import scenario as sc

Rng = np.random.Generator


@dataclass(frozen=True, slots=True)
class Request:
    """One request to be sent: `at` seconds after the start (0 in a closed loop)."""

    at: float
    prompt: list[int]
    output_tokens: int
    adapter: str | None


def plan(scenario: sc.Scenario, adapters: Sequence[str]) -> list[Request]:
    """Draw the scenario's requests. `adapters`: the names to draw from (empty: the base model)."""
    # One stream each, so that a change of one distribution does not change the others' draws.
    arrival, length, choice, token = (np.random.default_rng([scenario.seed, k]) for k in range(4))
    load = scenario.load
    count = load.requests
    times = arrival_times(load, arrival) if isinstance(load, sc.Open) else np.zeros(count)
    lengths = request_lengths(scenario.lengths, count, length)
    chosen = popularity(scenario.adapters.popularity, count, len(adapters), choice) if adapters else None
    low, high = scenario.token_ids
    return [
        Request(
            at=float(times[i]),
            prompt=token.integers(low, high, size=prompt, endpoint=True).tolist(),
            output_tokens=output,
            adapter=None if chosen is None else adapters[chosen[i]],
        )
        for i, (prompt, output) in enumerate(lengths)
    ]


def arrival_times(load: sc.Open, rng: Rng) -> NDArray[np.float64]:
    """Draw the seconds from the start to each request, the first at 0. Gaps: gamma(shape=burstiness, mean 1 / rate)."""
    gaps = rng.gamma(shape=load.burstiness, scale=1.0 / (load.rate * load.burstiness), size=load.requests)
    gaps[0] = 0.0
    return np.cumsum(gaps)


def request_lengths(lengths: sc.Fixed | sc.Uniform | sc.TraceFile, count: int, rng: Rng) -> list[tuple[int, int]]:
    """Draw (prompt, output) tokens of each request. Raises `ScenarioError` for an unreadable trace."""
    match lengths:
        case sc.Fixed(prompt=prompt, output=output):
            return [(prompt, output)] * count
        case sc.Uniform():
            prompts = rng.integers(*lengths.prompt, size=count, endpoint=True)
            outputs = rng.integers(*lengths.output, size=count, endpoint=True)
            return list(zip(prompts.tolist(), outputs.tolist(), strict=True))
        case sc.TraceFile(file=file):
            rows = read_trace(Path(file))
            return [rows[i % len(rows)] for i in range(count)]


def read_trace(path: Path) -> list[tuple[int, int]]:
    """Read (prompt, output) tokens from each line of a CSV file with these columns. Raises `ScenarioError`."""
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            rows = [(int(row["prompt"]), int(row["output"])) for row in csv.DictReader(stream)]
    except OSError as error:
        raise sc.ScenarioError(f"{path}: {error.strerror}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise sc.ScenarioError(f"{path}: expected a CSV file with integer columns `prompt` and `output`") from error
    if not rows or min(min(row) for row in rows) < 1:
        raise sc.ScenarioError(f"{path}: needs at least one line, and lengths of at least 1")
    return rows


def popularity(
    law: sc.Identical | sc.Distinct | sc.UniformChoice | sc.Zipf | sc.Power, count: int, adapters: int, rng: Rng
) -> NDArray[np.int64]:
    """Draw the adapter's index, in [0, adapters), of each of `count` requests; lower indices are more popular."""
    match law:
        case sc.Identical():
            return np.zeros(count, dtype=np.int64)
        case sc.Distinct():
            return np.arange(count, dtype=np.int64) % adapters
        case sc.UniformChoice():
            return rng.integers(adapters, size=count)
        case sc.Zipf(a=a):
            weights = np.arange(1, adapters + 1, dtype=np.float64) ** -a
            return rng.choice(adapters, size=count, p=weights / weights.sum())
        case sc.Power(a=a):
            return (rng.power(a, size=count) * adapters).astype(np.int64)
