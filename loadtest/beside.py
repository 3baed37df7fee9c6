"""The cost of training to concurrent requests, and of serving to training.

One server: the request rate that keeps 8 clients busy is measured, then Poisson arrivals at half of it, without and
with a fine-tuning job, with the same requests. The job's speed beside them is compared with its speed alone.
"""

import asyncio
import json
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
from rich.table import Table

from loadtest import metrics
from loadtest.client import Client, Timeline
from loadtest.drive import drive
from loadtest.peers.base import Kit
from loadtest.peers.lorakeet import Lorakeet, adapter_name
from loadtest.scenario import Adapters, Closed, Fixed, Open, Scenario
from loadtest.workload import plan

SLOTS = 8
PROMPT, OUTPUT = 64, 64
RANK = 16
WORDS = ("order", "lamp", "chair", "blue", "green", "send", "Monday", "Friday", "Oslo", "Rome", "two", "five", "vase")
MAX_SLOWDOWN, MIN_KEPT = 1.25, 0.15

Report = Callable[[str], None]


@dataclass(frozen=True)
class _Window:
    """A period of serving, training, or both."""

    timelines: list[Timeline]
    seconds: float
    trained_tokens: float

    @property
    def tokens_per_second(self) -> float:
        """Training speed."""
        return self.trained_tokens / self.seconds

    @property
    def gaps(self) -> list[float]:
        return [gap for timeline in self.timelines for gap in metrics.itl(timeline)]


async def measure(kit: Kit, *, minutes: float, flags: list[str], report: Report) -> dict[str, Any]:
    """Run all measurements; return JSON values."""
    side = Lorakeet(flags=flags)
    names = [adapter_name(adapter) for adapter in kit.adapters][:SLOTS]
    try:
        await side.start(kit)
        async with httpx.AsyncClient(base_url=side.url, timeout=60) as http:
            client = Client(side.url)
            rate = await _saturation(client, names)
            report(f"{SLOTS} clients are kept busy by {rate:.2f} requests/s; Poisson at {rate / 2:.2f}/s from here on")
            count = max(10, round(rate / 2 * minutes * 60))
            load = Open(rate=rate / 2, requests=count)
            quiet = await _serve(client, http, names, load)
            report(f"without training: ITL P99 {_p99(quiet):.1f} ms over {len(quiet.gaps)} gaps")
            job = await _start_job(http)
            alone = await _watch(http, min(60.0, minutes * 60))
            report(f"training alone: {alone.tokens_per_second:.1f} tokens/s")
            busy = await _serve(client, http, names, load)
            report(f"with training: ITL P99 {_p99(busy):.1f} ms; {busy.tokens_per_second:.1f} tokens/s trained")
            await http.post(f"/v1/fine_tuning/jobs/{job}/cancel")
    finally:
        await side.stop()
    slower, kept = _p99(busy) / _p99(quiet), busy.tokens_per_second / alone.tokens_per_second
    return {
        "flags": flags,
        "rate": rate / 2,
        "requests": count,
        "errors": sum(t.error is not None for t in (*quiet.timelines, *busy.timelines)),
        "itl_ms": {"without": _spread(quiet), "with": _spread(busy)},
        "training_tokens_per_second": {"alone": alone.tokens_per_second, "beside": busy.tokens_per_second},
        "verdicts": [
            {"claim": f"P99 ITL within {MAX_SLOWDOWN} x", "value": round(slower, 3), "holds": slower <= MAX_SLOWDOWN},
            {"claim": f"training keeps {MIN_KEPT:.0%}", "value": round(kept, 3), "holds": kept >= MIN_KEPT},
        ],
    }


async def _saturation(client: Client, names: list[str]) -> float:
    """Measure the requests per second of `SLOTS` clients in a closed loop."""
    load = Closed(concurrency=SLOTS, requests=6 * SLOTS)
    begin = time.perf_counter()
    await drive(client, plan(_scenario(load, seed=1), names), load, base="base")
    return load.requests / (time.perf_counter() - begin)


async def _serve(client: Client, http: httpx.AsyncClient, names: list[str], load: Open) -> _Window:
    """Serve the standing load once: the same requests each time, with other tokens, so that no prefix is cached."""
    seed = time.monotonic_ns() % 2**31
    requests = plan(_scenario(load, seed=7), names)
    words = plan(_scenario(load, seed=seed), names)
    for request, other in zip(requests, words, strict=True):
        request.prompt[:] = other.prompt
    begin, tokens = time.perf_counter(), await _trained(http)
    done = await drive(client, requests, load, base="base")
    return _Window(done.timelines, time.perf_counter() - begin, await _trained(http) - tokens)


async def _watch(http: httpx.AsyncClient, seconds: float) -> _Window:
    """Watch the training alone for a while."""
    begin, tokens = time.perf_counter(), await _trained(http)
    await asyncio.sleep(seconds)
    return _Window([], time.perf_counter() - begin, await _trained(http) - tokens)


def _scenario(load: Open | Closed, seed: int) -> Scenario:
    return Scenario(
        name="beside", load=load, lengths=Fixed(prompt=PROMPT, output=OUTPUT), adapters=Adapters(), seed=seed
    )


async def _start_job(http: httpx.AsyncClient) -> str:
    """Start a job that outlasts the measurement; return its id after its first step."""
    choose = random.Random(0)
    lines = [
        json.dumps(
            {"prompt": " ".join(choose.choices(WORDS, k=24)), "completion": " ".join(choose.choices(WORDS, k=24))}
        )
        for _ in range(400)
    ]
    file = {"file": ("data.jsonl", "\n".join(lines).encode())}
    uploaded = (await http.post("/v1/files", data={"purpose": "fine-tune"}, files=file)).raise_for_status().json()
    body = {
        "model": "base",
        "training_file": uploaded["id"],
        "hyperparameters": {"n_epochs": 1000, "batch_size": 2},
        "lora": {"r": RANK, "lora_alpha": 2 * RANK},
        "training": {"checkpoint_every": 10**6},
    }
    job: str = (await http.post("/v1/fine_tuning/jobs", json=body)).raise_for_status().json()["id"]
    while not await _trained(http):  # noqa: ASYNC110  # the server is another process
        await asyncio.sleep(0.2)
    return job


async def _trained(http: httpx.AsyncClient) -> float:
    """Return the tokens trained so far, from the server's metrics."""
    text = (await http.get("/metrics")).text
    found = re.search(r"^lorakeet:finetune_trained_tokens_total (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def _p99(window: _Window) -> float:
    return float(np.percentile(window.gaps, 99)) * 1e3


def _spread(window: _Window) -> dict[str, float]:
    """Return percentiles of the inter-token latency, in milliseconds."""
    p50, p90, p99 = np.percentile(window.gaps, [50, 90, 99]).tolist()
    return {"p50": p50 * 1e3, "p90": p90 * 1e3, "p99": p99 * 1e3}


def table(result: dict[str, Any]) -> Table:
    """The result for a terminal."""
    shown = Table("", "ITL P50", "P90", "P99", "trained tokens/s", title=f"{result['rate']:.2f} requests/s, Poisson")
    speeds = result["training_tokens_per_second"]
    for name, speed in (("without", "-"), ("with", f"{speeds['beside']:.1f} of {speeds['alone']:.1f} alone")):
        spread = result["itl_ms"][name]
        shown.add_row(f"{name} training", *(f"{spread[p]:.1f} ms" for p in ("p50", "p90", "p99")), speed)
    return shown
