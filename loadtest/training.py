"""Training speed and memory: our trainer in both memory modes compared with PEFT, and two joint jobs with one.

Every configuration is a process of its own with its base loaded; rounds go through them in turn, so that a busy period
of the machine affects all. Medians of the rounds are compared.
"""

import contextlib
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from loadtest.workers import worker

OUR_TRAINER = "server.training.bench"
PEFT = "loadtest.peers.peft_training"
RANK = 16
WIDE: dict[str, Any] = {"batch_size": 4, "length": 128, "micro_batch_tokens": 512}
NARROW: dict[str, Any] = {"batch_size": 4, "length": 32, "micro_batch_tokens": 32}


@dataclass
class Configuration:
    """One row: a configuration and its measurements so far."""

    name: str
    module: str
    settings: dict[str, Any]
    speeds: list[float] = field(default_factory=list)  # tokens per second, one value a round
    peak: int = 0  # bytes above the base

    @property
    def speed(self) -> float:
        return statistics.median(self.speeds)


def configurations() -> list[Configuration]:
    """Return PEFT and our trainer at 4 x 128 tokens, and one and two jobs of ours at micro-batches of 32 tokens."""

    def ours(name: str, memory: str, jobs: int, shape: dict[str, Any]) -> Configuration:
        return Configuration(name, OUR_TRAINER, {"memory": memory, "jobs": jobs, **shape})

    return [
        Configuration("PEFT", PEFT, {"checkpointing": False, **WIDE}),
        Configuration("PEFT, gradient checkpointing", PEFT, {"checkpointing": True, **WIDE}),
        ours("keep", "keep", 1, WIDE),
        ours("recompute", "recompute", 1, WIDE),
        ours("32 tokens, one job, keep", "keep", 1, NARROW),
        ours("32 tokens, one job, recompute", "recompute", 1, NARROW),
        ours("32 tokens, two jobs, keep", "keep", 2, NARROW),
        ours("32 tokens, two jobs, recompute", "recompute", 2, NARROW),
    ]


def run(model: Path, cache_dir: Path, *, threads: int, rounds: int, steps: int) -> dict[str, Any]:
    """Measure all configurations; return JSON values."""
    rows = configurations()
    common = {"model": str(model), "cache_dir": str(cache_dir), "threads": threads, "rank": RANK}
    with contextlib.ExitStack() as stack:
        environment = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
        workers = [stack.enter_context(worker(row.module, common | row.settings, environment)) for row in rows]
        for round_ in range(rounds + 1):
            for row, (ask, _) in zip(rows, workers, strict=True):
                answer = ask({"steps": steps})
                if round_:  # round 0 warms up
                    row.speeds.append(len(answer["seconds"]) * answer["tokens"] / sum(answer["seconds"]))
                row.peak = max(row.peak, answer["peak"])
    return {
        "rank": RANK,
        "attention": "torch scaled_dot_product_attention",
        "rounds": rounds,
        "rows": [{"name": r.name, "tokens_per_second": r.speed, "all": r.speeds, "peak": r.peak} for r in rows],
        "verdicts": _verdicts(rows),
    }


def _verdicts(rows: Sequence[Configuration]) -> list[dict[str, Any]]:
    """Return the promises with their verdicts."""
    row = {row.name: row for row in rows}
    peft, checkpointed = row["PEFT"], row["PEFT, gradient checkpointing"]
    keep, recompute = row["keep"], row["recompute"]
    alone = max(row[f"32 tokens, one job, {mode}"].speed for mode in ("keep", "recompute"))
    together = max(row[f"32 tokens, two jobs, {mode}"].speed for mode in ("keep", "recompute"))

    def verdict(text: str, value: float, holds: bool) -> dict[str, Any]:
        return {"claim": text, "value": round(value, 3), "holds": holds}

    speed = recompute.speed / checkpointed.speed
    keep_speed = keep.speed / peft.speed
    return [
        verdict("recompute: at least 1.0 x PEFT with gradient checkpointing", speed, speed >= 1.0),
        verdict(
            "recompute: a lower peak above the base",
            recompute.peak / checkpointed.peak,
            recompute.peak < checkpointed.peak,
        ),
        verdict("keep: at least 0.95 x PEFT without checkpointing", keep_speed, keep_speed >= 0.95),
        verdict("keep: no higher peak above the base", keep.peak / peft.peak, keep.peak <= peft.peak),
        verdict("two jobs together: at least 1.2 x one after the other", together / alone, together >= 1.2 * alone),
    ]


def table(result: dict[str, Any]) -> Table:
    """Return the result as a table for the terminal."""
    shown = Table(
        "Configuration", "tokens/s", "peak above the base", title=f"Training, rank {result['rank']}, all linears"
    )
    for row in result["rows"]:
        shown.add_row(row["name"], f"{row['tokens_per_second']:.0f}", f"{row['peak'] / 2**20:.0f} MiB")
    return shown
