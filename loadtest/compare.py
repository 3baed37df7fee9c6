"""The same work for every side, in interleaved rounds: medians and spread.

A *case* is a burst of equal requests sent at once: their number, adapters and lengths. A *cell* is one side's
measurements of one case. Rounds go through all cases and, within a case, through all sides in rotating order, so that
a slower period of the machine affects all sides. Every request must return its full token count; a cell with an error
has no figures. `peers` has the sides, `claims` the verdicts.
"""

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from loadtest import machine, metrics
from loadtest.client import Timeline
from loadtest.peers.base import AdapterId, Kit, Side, SideError, Work
from loadtest.synthetic import Dtype, random_prompts

PROMPT_TOKENS = 64
QUIET_CORES = 0.2  # most busy cores before the first round; beyond it the figures are unreliable


@dataclass(frozen=True, slots=True)
class Case:
    """One burst: concurrent `requests` without an adapter, with one for all, or with a different one each."""

    name: str
    title: str
    requests: int
    adapters: Literal["none", "one", "distinct"]
    dtype: Dtype
    output_tokens: int
    sides: tuple[str, ...]
    prompt_tokens: int = PROMPT_TOKENS

    def works(self, seed: int) -> list[Work]:
        """Return the burst's requests; prompts follow from the seed, so all sides get the same."""
        prompts = random_prompts(self.requests, self.prompt_tokens, seed)
        return [Work(prompt, self.output_tokens, self._adapter(i)) for i, prompt in enumerate(prompts)]

    def _adapter(self, index: int) -> AdapterId | None:
        if self.adapters == "none":
            return None
        return self.dtype, index if self.adapters == "distinct" else 0


@dataclass(frozen=True, slots=True)
class Figure:
    """One quantity of a cell over the rounds."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Figure | None":
        """Summarise values; None if there are none."""
        return cls(statistics.median(values), min(values), max(values), len(values)) if values else None


@dataclass(slots=True)
class Cell:
    """One side's figures in one case."""

    decode: list[float] = field(default_factory=list)  # tokens/s, see metrics.decode_rate
    whole: list[float] = field(default_factory=list)  # output tokens / (seconds from first sending to last end)
    ttft: list[float] = field(default_factory=list)  # seconds, mean over the burst
    seconds: float = 0.0  # spent in all rounds
    error: str | None = None

    def add(self, timelines: Sequence[Timeline]) -> None:
        """Add one round."""
        sent = min(timeline.sent for timeline in timelines)
        self.seconds += max(timeline.finished for timeline in timelines) - sent
        if errors := [timeline.error for timeline in timelines if timeline.error]:
            self.error = f"{len(errors)} of {len(timelines)} requests: {errors[0]}"
            return
        if (rate := metrics.decode_rate(timelines)) is not None:
            self.decode.append(rate)
        last = max(timeline.tokens[-1][0] for timeline in timelines)
        self.whole.append(sum(timeline.output_tokens for timeline in timelines) / (last - sent))
        self.ttft.append(statistics.fmean(metrics.ttft(timeline) for timeline in timelines))

    def latest(self) -> str:
        """Return a short text about the newest round."""
        rate = f"{self.decode[-1]:.1f} tokens/s" if self.decode else "no second token"
        return self.error or rate

    def to_json(self) -> dict[str, Any]:
        """Return figures (median, low, high, rounds) with their raw values; no figures after an error."""
        if self.error is not None:
            return {"error": self.error}
        raw = {"decode": self.decode, "whole": self.whole, "ttft": self.ttft}
        figures = {name: asdict(figure) for name, values in raw.items() if (figure := Figure.of(values))}
        return figures | {"raw": raw}


@dataclass(slots=True)
class Comparison:
    """All measurements of a comparison."""

    cases: list[Case]
    sides: dict[str, dict[str, Any]]  # name -> describe()
    missing: dict[str, str]  # name -> reason why it did not take part
    cells: dict[str, dict[str, Cell]]  # case -> side -> cell
    answers: dict[str, int] = field(default_factory=dict)  # side -> distinct answers of all adapters to one prompt
    extras: dict[str, Any] = field(default_factory=dict)
    busy_cores: float = 0.0  # the machine's load while all sides were idle
    client_cpu_share: float = 0.0  # of one core, while bursts ran

    def to_json(self) -> dict[str, Any]:
        """Return the comparison's part of the result file."""
        return {
            "cases": [asdict(case) for case in self.cases],
            "sides": self.sides,
            "missing": self.missing,
            "cells": {case: {side: c.to_json() for side, c in row.items()} for case, row in self.cells.items()},
            "distinct_answers": self.answers,
            "busy_cores_when_idle": self.busy_cores,
            "client_cpu_share": self.client_cpu_share,
        } | self.extras


Report = Callable[[str], None]


async def compare(
    sides: Sequence[Side],
    cases: Sequence[Case],
    kit: Kit,
    *,
    rounds: int,
    cell_seconds: float,
    report: Report,
    idle_seconds: float = 2.0,
) -> Comparison:
    """Start all installed sides, measure, and stop them.

    A cell gets `rounds` rounds, or fewer (at least one) if these would take more than `cell_seconds` in total, so that
    a slow side does not delay the others; its count of rounds is part of its figures. Before the first round, the
    machine's load is measured for `idle_seconds`: sides and other programs should be idle.
    """
    running: dict[str, Side] = {}
    result = Comparison(list(cases), {}, {}, {case.name: {} for case in cases})
    try:
        for side in sides:
            reason = side.missing_reason()
            if reason is None:
                report(f"starting {side.name}")
                running[side.name] = side  # before the start, so that it is stopped in any case
                try:
                    await side.start(kit)
                    result.sides[side.name] = side.describe()
                except SideError as error:
                    await running.pop(side.name).stop()
                    reason = f"did not start: {error}"
            if reason is not None:
                report(f"{side.name}: {reason}")
                result.missing[side.name] = reason
        for name, side in list(running.items()):
            report(f"warming up {name}")
            try:
                await _warm_up(side, cases, kit, result)
            except SideError as error:
                report(f"{name}: {error}")
                result.missing[name] = f"failed in its warm-up: {error}"
                await running.pop(name).stop()
        result.busy_cores = await asyncio.to_thread(machine.busy_cores, idle_seconds)
        if result.busy_cores > QUIET_CORES:
            report(f"WARNING: something else keeps {result.busy_cores:.1f} cores busy; figures will be too low")
        cpu, start = time.process_time(), time.perf_counter()
        for index in range(rounds):
            for case in cases:
                await _one_round(case, index, running, result.cells[case.name], rounds, cell_seconds, report)
        result.client_cpu_share = (time.process_time() - cpu) / (time.perf_counter() - start)
        for name, side in running.items():
            result.extras |= {f"{name}_{key}": value for key, value in (await side.extras()).items()}
    finally:
        for side in running.values():
            await side.stop()
    return result


async def _warm_up(side: Side, cases: Sequence[Case], kit: Kit, result: Comparison) -> None:
    """Run a few tokens of every case, for lazy loading and compiling, and count distinct answers.

    All adapters answer the same prompt: a side with equal answers applies no adapters.
    """
    for case in cases:
        if side.name in case.sides:
            await side.burst([Work(w.prompt, 4, w.adapter) for w in case.works(seed=0)])
    if side.per_request_adapters:
        prompt = random_prompts(1, PROMPT_TOKENS, seed=1)[0]
        probes = [Work(prompt, 16, adapter) for adapter in kit.adapters if adapter[0] == "float32"]
        result.answers[side.name] = len({timeline.text for timeline in await side.burst(probes)})


async def _one_round(
    case: Case,
    index: int,
    running: dict[str, Side],
    cells: dict[str, Cell],
    rounds: int,
    cell_seconds: float,
    report: Report,
) -> None:
    names = [name for name in running if name in case.sides]
    works = case.works(seed=1000 + index)
    for offset in range(len(names)):
        name = names[(offset + index) % len(names)]
        cell = cells.setdefault(name, Cell())
        if cell.error is not None or (index and cell.seconds * (index + 1) / index > cell_seconds):
            continue
        try:
            cell.add(await running[name].burst(works))
        except SideError as error:
            cell.error = str(error)
        report(f"round {index + 1}/{rounds}  {case.title}  {name}: {cell.latest()}")
