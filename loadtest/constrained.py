"""The cost and the gain of answers under a grammar, and of compiling it, compared with free answers.

One server. First eight streams on eight adapters, beside requests for one token each, without a schema and with a new
one of 10 kB every time. Then eight requests on eight adapters; free and constrained bursts alternate, and adjacent
bursts are compared. If llama.cpp's server is installed, both answer the same schema on the base, in turns.
"""

import asyncio
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
from rich.table import Table

from loadtest.peers.base import Kit, ServerSide
from loadtest.peers.llama import Llama
from loadtest.peers.lorakeet import Lorakeet, adapter_name

TOGETHER = 8
TOKENS = 96  # of an answer under a grammar without an end
MIN_DECODE, MIN_FORCED, MAX_SLOWDOWN = 0.95, 1.4, 1.1
SCHEMA_BYTES = 10_000
STREAMED = 400  # tokens of each stream during which schemas are compiled
PAUSE = 0.25  # seconds between schemas
WORDS = ("order", "customer", "delivery", "address", "quantity", "article", "priority", "remark", "storage", "invoice")

# No token is forced, and nearly every token is allowed, as within a string.
OPEN = {"structured_outputs": {"regex": r"[^\x00]{4000}"}}
# About half of the tokens are forced: names and punctuation, but not values.
_VALUE = {"type": "string", "pattern": "^[a-z]{12}$"}
_NAMES = (
    *("name_of_customer", "city_of_delivery", "article_number", "preferred_colour", "contact_person"),
    *("street_of_delivery", "way_of_payment", "name_of_carrier", "article_category", "remark_of_customer"),
)
RECORD: dict[str, Any] = {
    "type": "object",
    "properties": dict.fromkeys(_NAMES, _VALUE),
    "required": list(_NAMES),
    "additionalProperties": False,
}
_MESSAGES = [{"role": "user", "content": "Write down an order of a customer as JSON."}]

Report = Callable[[str], None]
Body = dict[str, Any]


def of_schema(schema: Body) -> Body:
    """Return a request's field for an answer under a JSON Schema."""
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}}


def large_schema(seed: int) -> Body:
    """Return a schema of about `SCHEMA_BYTES`, different for each seed."""
    draws = random.Random(seed)
    schema: Body = {"type": "object", "properties": {}, "required": []}
    while len(json.dumps(schema)) < SCHEMA_BYTES:
        name = f"{draws.choice(WORDS)}_{draws.choice(WORDS)}_{draws.randrange(10**6)}"
        schema["properties"][name] = draws.choice(
            (
                {"type": "string", "maxLength": draws.randrange(10, 90)},
                {"type": "integer", "minimum": 0, "maximum": draws.randrange(10, 9999)},
                {"enum": draws.sample(WORDS, 4)},
                {"type": "array", "items": {"type": "number"}, "maxItems": draws.randrange(2, 9)},
            )
        )
        schema["required"].append(name)
    return schema


@dataclass
class Pairs:
    """Output tokens/s of adjacent bursts."""

    free: list[float] = field(default_factory=list)
    constrained: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Constrained speed as a multiple of free speed: the median over pairs."""
        return statistics.median(mine / other for mine, other in zip(self.constrained, self.free, strict=True))


@dataclass
class Streams:
    """Seconds between the streams' tokens, and to the other requests' only token."""

    gaps: list[float] = field(default_factory=list)
    answers: list[float] = field(default_factory=list)

    @property
    def p99(self) -> float:
        return float(np.percentile(self.gaps, 99))


async def measure(kit: Kit, *, rounds: int, flags: Sequence[str], report: Report) -> dict[str, Any]:
    """Run all measurements; return JSON values."""
    side = Lorakeet(flags=flags)
    names = [adapter_name(adapter) for adapter in kit.adapters][:TOGETHER]
    try:
        await side.start(kit)
        async with httpx.AsyncClient(base_url=side.url, timeout=300) as http:
            without, with_schema = await beside_streams(http, names, rounds=rounds, report=report)
            pairs = {
                kind: await decode(http, names, fields, rounds=rounds, report=report)
                for kind, fields in (("nothing forced", OPEN), ("half forced", of_schema(RECORD)))
            }
    finally:
        await side.stop()
    peers = await beside_llama(kit, rounds=rounds, flags=flags, report=report)
    return summary(pairs, without, with_schema) | {"flags": list(flags), "peers": peers}


async def decode(http: httpx.AsyncClient, names: Sequence[str], fields: Body, *, rounds: int, report: Report) -> Pairs:
    """Run bursts under a grammar, alternating with free ones of as many tokens."""
    bodies = [{"model": name, "messages": _MESSAGES, "temperature": 1.0, "seed": 1} for name in names]
    ended = fields is not OPEN
    most = [4 * TOKENS if ended else TOKENS] * len(bodies)
    for body in bodies:
        await _ask(http, body | fields | {"max_tokens": 1})  # caches its prompt and compiles its grammar
    pairs = Pairs()
    for index in range(rounds):
        constrained, tokens = await _burst(http, [body | fields for body in bodies], most, ended=ended)
        free, _ = await _burst(http, [body | {"ignore_eos": True} for body in bodies], tokens, ended=False)
        pairs.constrained.append(constrained)
        pairs.free.append(free)
        report(
            f"round {index + 1}/{rounds}  {'half' if ended else 'nothing'} forced: "
            f"{constrained:.1f} tokens/s, free ones {free:.1f}"
        )
    return pairs


async def _burst(
    http: httpx.AsyncClient, bodies: Sequence[Body], limits: Sequence[int], *, ended: bool | None
) -> tuple[float, list[int]]:
    """Send all bodies at once; return output tokens/s, and the tokens of each answer.

    Args:
        ended: whether the grammar (True) or the limit (False) must have ended the answers; None: either.
    """
    begin = time.perf_counter()
    limited = [body | {"max_tokens": limit} for body, limit in zip(bodies, limits, strict=True)]
    answers = await asyncio.gather(*(_ask(http, body) for body in limited))
    seconds = time.perf_counter() - begin
    reasons = {answer["choices"][0]["finish_reason"] for answer in answers}
    assert reasons <= ({"stop", "length"} if ended is None else {"stop" if ended else "length"}), reasons
    tokens = [answer["usage"]["completion_tokens"] for answer in answers]
    return sum(tokens) / seconds, tokens


async def beside_streams(
    http: httpx.AsyncClient, names: Sequence[str], *, rounds: int, report: Report
) -> tuple[Streams, Streams]:
    """Measure streams beside requests for one token: without a schema, then with a new one each time."""
    without, with_schema = Streams(), Streams()
    for index in range(rounds):
        for kind, found in (("without", without), ("with", with_schema)):
            ended = asyncio.Event()
            others = asyncio.create_task(
                _others(http, names[0], found, ended, schemas=kind == "with", seed=1000 * index)
            )
            await asyncio.gather(*(_stream(http, name, found) for name in names))
            ended.set()
            await others
            first = statistics.median(found.answers)
            report(
                f"round {index + 1}/{rounds}  streams {kind} new schemas: ITL P99 {found.p99 * 1e3:.1f} ms so far, "
                f"the others' first token after {first * 1e3:.0f} ms"
            )
    return without, with_schema


async def _others(
    http: httpx.AsyncClient, name: str, found: Streams, ended: asyncio.Event, *, schemas: bool, seed: int
) -> None:
    while not ended.is_set():
        fields = of_schema(large_schema(seed := seed + 1)) if schemas else {}
        begin = time.perf_counter()
        await _ask(http, {"model": name, "messages": _MESSAGES, "max_tokens": 1} | fields)
        found.answers.append(time.perf_counter() - begin)
        await asyncio.sleep(PAUSE)


async def _stream(http: httpx.AsyncClient, name: str, found: Streams) -> None:
    body = {"model": name, "messages": _MESSAGES, "max_tokens": STREAMED, "ignore_eos": True, "stream": True}
    async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        answer.raise_for_status()
        last: float | None = None
        async for line in answer.aiter_lines():
            if not line.startswith("data: {"):
                continue
            now = time.perf_counter()
            if last is not None:
                found.gaps.append(now - last)
            last = now


async def beside_llama(kit: Kit, *, rounds: int, flags: Sequence[str], report: Report) -> dict[str, Any]:
    """Measure output tokens/s of one and of eight requests under one schema on the base, on both servers in turn."""
    sides: list[ServerSide] = [Lorakeet(upload=False, flags=flags), Llama()]
    if missing := sides[1].missing_reason():
        return {"missing": missing}
    rates: dict[str, dict[int, list[float]]] = {side.name: {1: [], TOGETHER: []} for side in sides}
    try:
        for side in sides:
            await side.start(kit)
        for index in range(rounds):
            for side in sides if index % 2 else sides[::-1]:
                async with httpx.AsyncClient(base_url=side.url, timeout=300) as http:
                    body = {"model": "base", "messages": _MESSAGES, "temperature": 1.0} | of_schema(RECORD)
                    await _ask(http, body | {"max_tokens": 1})
                    for count, found in rates[side.name].items():
                        bodies = [body | {"seed": seed} for seed in range(count)]
                        # Tokens/s are compared, so an answer of many short tokens may reach the limit.
                        rate, _ = await _burst(http, bodies, [4 * TOKENS] * count, ended=None)
                        found.append(rate)
                        report(f"round {index + 1}/{rounds}  {side.name}, {count} at once: {rate:.1f} tokens/s")
    finally:
        for side in sides:
            await side.stop()
    return {"tokens_per_second": rates}


async def _ask(http: httpx.AsyncClient, body: Body) -> Any:
    answer = await http.post("/v1/chat/completions", json=body)
    answer.raise_for_status()
    return answer.json()


def summary(pairs: dict[str, Pairs], without: Streams, with_schema: Streams) -> dict[str, Any]:
    """Return figures and verdicts."""
    least = {"nothing forced": MIN_DECODE, "half forced": MIN_FORCED}
    slower = with_schema.p99 / without.p99
    first, usual = statistics.median(with_schema.answers), statistics.median(without.answers)
    return {
        "requests": TOGETHER,
        "decode": {kind: {"free": each.free, "constrained": each.constrained} for kind, each in pairs.items()},
        "itl_p99_ms": {"without": without.p99 * 1e3, "with": with_schema.p99 * 1e3},
        "first_token_ms": {"without": usual * 1e3, "with": first * 1e3, "schemas": len(with_schema.answers)},
        "verdicts": [
            *(
                {
                    "claim": f"{kind}: at least {least[kind]} x the speed of free answers",
                    "value": round(each.ratio, 3),
                    "holds": each.ratio >= least[kind],
                }
                for kind, each in pairs.items()
            ),
            {
                "claim": f"others' P99 ITL within {MAX_SLOWDOWN} x while new schemas of 10 kB are compiled",
                "value": round(slower, 3),
                "holds": slower <= MAX_SLOWDOWN,
            },
        ],
    }


def table(result: dict[str, Any]) -> Table:
    """Return the result as a table for the terminal."""
    shown = Table("", "free", "constrained", title=f"Output tokens/s of {result['requests']} requests, medians")
    for kind, rates in result["decode"].items():
        shown.add_row(kind, *(f"{statistics.median(rates[which]):.1f}" for which in ("free", "constrained")))
    first = result["first_token_ms"]
    shown.add_row("ms to a first token", f"{first['without']:.0f}", f"{first['with']:.0f} with a new schema of 10 kB")
    for name, rates in result.get("peers", {}).get("tokens_per_second", {}).items():
        shown.add_row(f"{name}, half forced", "", ", ".join(f"{statistics.median(r):.1f}" for r in rates.values()))
    return shown
