"""A tenant that floods the server beside one with a request a second.

The flood is a closed loop of ten times as many requests as can run at once. Each round measures the quiet tenant alone,
the flood alone, and both together. A step full of prompt tokens is timed, too: an arrival may have to wait for one.
"""

import asyncio
import statistics
import time
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
from rich.table import Table

from loadtest import metrics
from loadtest.client import Client, Timeline
from loadtest.peers.base import Kit
from loadtest.peers.lorakeet import Lorakeet
from loadtest.synthetic import random_prompts

PLACES = 16  # sequences that run at once
STEP_TOKENS = 256  # of one step
FLOOD = 10 * PLACES
PROMPT, ANSWER = 64, 32  # tokens of every request of the flood
QUIET_PROMPT, QUIET_ANSWER = 32, 4  # tokens of every request of the quiet tenant; they reduce the flood's share
INTERVAL = 1.0  # seconds between the quiet tenant's requests
MAX_SLOWDOWN, MIN_KEPT = 1.3, 0.9
_ADMIN = "loadtest-admin"

Report = Callable[[str], None]


class Fair(Lorakeet):
    """Our server with keys."""

    name = "lorakeet-fair"
    flags = (
        *("--api-key", _ADMIN),
        *("--max-num-seqs", str(PLACES)),
        *("--max-num-batched-tokens", str(STEP_TOKENS)),
    )

    def __init__(self) -> None:
        super().__init__(upload=False)


async def measure(kit: Kit, *, rounds: int, seconds: float, report: Report) -> dict[str, Any]:
    """Run all measurements; return JSON values."""
    side = Fair()
    try:
        await side.start(kit)
        flood, quiet = [Client(side.url, api_key=await _key(side.url, name)) for name in ("flood", "quiet")]
        await _ask(flood, seed=1)
        await _ask(quiet, seed=2)
        step = await _full_step(quiet)
        alone: list[float] = []
        beside: list[float] = []
        kept: list[float] = []
        rates: dict[str, list[float]] = {"alone": [], "beside": []}
        for index in range(rounds):
            seed = 10_000 * (index + 1)
            alone += await _quiet_load(quiet, seconds, seed)
            rates["alone"].append(await _flood_rate(flood, seconds, seed + 1000))
            found, rate = await _quiet_load_during_flood(quiet, flood, seconds, seed + 5000)
            beside += found
            rates["beside"].append(rate)
            kept.append(rate / rates["alone"][-1])
            report(
                f"round {index + 1}/{rounds}  TTFT P99 {_p99(alone) * 1e3:.0f} ms alone, {_p99(beside) * 1e3:.0f} ms "
                f"beside the flood, which keeps {kept[-1]:.2f} of its {rates['alone'][-1]:.0f} tokens/s"
            )
    finally:
        await side.stop()
    return summary(alone, beside, rates, kept, step)


async def _key(url: str, tenant: str) -> str:
    """Create a tenant and return a key for it."""
    headers = {"Authorization": f"Bearer {_ADMIN}"}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=30) as http:
        (await http.post("/v1/admin/tenants", json={"id": tenant})).raise_for_status()
        answer = await http.post("/v1/admin/keys", json={"tenant": tenant, "roles": ["serve"]})
        answer.raise_for_status()
        return str(answer.json()["secret"])


async def _ask(client: Client, seed: int, prompt: int = PROMPT, answer: int = ANSWER) -> Timeline:
    (tokens,) = random_prompts(1, prompt, seed=seed)
    timeline = await client.complete("base", tokens, answer, ignore_eos=True)
    client.read_all()
    if timeline.error is not None:
        raise RuntimeError(timeline.error)
    return timeline


async def _full_step(client: Client) -> float:
    """Return the seconds of a step full of prompt tokens, overhead included."""
    return statistics.median([metrics.ttft(await _ask(client, 100 + n, STEP_TOKENS, 1)) for n in range(5)])


async def _quiet_load(client: Client, seconds: float, seed: int) -> list[float]:
    """Send a request every second, without waiting for the previous one; return their TTFTs."""
    asked = []
    for n in range(round(seconds / INTERVAL)):
        asked.append(asyncio.create_task(_ask(client, seed + n, QUIET_PROMPT, QUIET_ANSWER)))
        await asyncio.sleep(INTERVAL)
    return [metrics.ttft(timeline) for timeline in await asyncio.gather(*asked)]


async def _flood_rate(client: Client, seconds: float, seed: int) -> float:
    """Return the tokens/s of the flood, without its beginning and end."""
    return (await _during_flood(client, seed, asyncio.sleep(seconds)))[1]


async def _quiet_load_during_flood(
    quiet: Client, flood: Client, seconds: float, seed: int
) -> tuple[list[float], float]:
    return await _during_flood(flood, seed, _quiet_load(quiet, seconds, seed + 100_000))


async def _during_flood(client: Client, seed: int, work: Any) -> tuple[Any, float]:
    """Await `work` in the middle of a flood; return its result, and the flood's tokens/s in the meantime."""
    timelines: list[Timeline] = []
    ended = False
    number = seed

    async def one() -> None:
        nonlocal number
        while not ended:
            number += 1
            timelines.append(await _ask(client, number))

    loops = [asyncio.create_task(one()) for _ in range(FLOOD)]
    await asyncio.sleep(3)  # until all places are taken
    begin = time.perf_counter()
    result = await work
    end = time.perf_counter()
    ended = True
    await asyncio.gather(*loops)
    tokens = 0.0
    for timeline in timelines:
        before = 0.0
        for arrival, count in timeline.tokens:
            tokens += (count - before) * (begin <= arrival < end)
            before = count
    return result, tokens / (end - begin)


def _p99(values: list[float]) -> float:
    return float(np.percentile(values, 99))


def summary(
    alone: list[float], beside: list[float], rates: dict[str, list[float]], kept: list[float], step: float
) -> dict[str, Any]:
    """Return figures and verdicts."""
    slower, part = (_p99(beside) - step) / _p99(alone), statistics.median(kept)
    work = (PROMPT + ANSWER) / ANSWER  # computed tokens per output token of the flood
    quiet = (QUIET_PROMPT + QUIET_ANSWER) / INTERVAL
    return {
        "places": PLACES,
        "flood": FLOOD,
        "step_ms": step * 1e3,
        "ttft_ms": {"alone": [1e3 * one for one in alone], "beside": [1e3 * one for one in beside]},
        "flood_tokens_per_second": rates,
        # With prompts, since on a slow machine the quiet tenant's tokens are a larger part.
        "all_tokens_per_second": {
            "alone": [rate * work for rate in rates["alone"]],
            "beside": [rate * work + quiet for rate in rates["beside"]],
        },
        "verdicts": [
            {
                "claim": f"P99 TTFT beside a flood, less a whole prompt step: within {MAX_SLOWDOWN} x of alone",
                "value": round(slower, 3),
                "holds": slower <= MAX_SLOWDOWN,
            },
            {
                "claim": f"the flood keeps {MIN_KEPT} of its tokens/s",
                "value": round(part, 3),
                "holds": part >= MIN_KEPT,
            },
        ],
    }


def table(result: dict[str, Any]) -> Table:
    """Return the result as a table for the terminal."""
    shown = Table("", "alone", "together", title=f"{result['flood']} requests at once beside one a second")
    times, rates = result["ttft_ms"], result["flood_tokens_per_second"]
    for name, part in (("P50", 50), ("P99", 99)):
        cells = (f"{np.percentile(times[which], part):.0f} ms" for which in ("alone", "beside"))
        shown.add_row(f"quiet tenant's TTFT {name}", *cells)
    shown.add_row("flood", *(f"{statistics.median(rates[which]):.0f} tokens/s" for which in ("alone", "beside")))
    everything = result["all_tokens_per_second"]
    cells = (f"{statistics.median(everything[which]):.0f} tokens/s" for which in ("alone", "beside"))
    shown.add_row("both, prompts too", *cells)
    shown.add_row("a whole prompt step", f"{result['step_ms']:.0f} ms", "")
    return shown
