"""The cost of loading adapters to concurrent requests, and the time to a cold adapter's first token.

One server with device memory for the adapters of some steady streams and little more, and no host memory for others.
In interleaved rounds the streams run alone, beside loads from disk, beside uploads, and beside uploads loaded at once;
the gaps between their tokens are compared round by round. Then, on the idle server, first tokens with a resident
adapter and with one on disk.
"""

import asyncio
import http.client
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from rich.table import Table

from loadtest import metrics
from loadtest.client import Client, Timeline
from loadtest.peers.base import Kit, SideError
from loadtest.peers.lorakeet import Lorakeet, adapter_name
from loadtest.synthetic import random_prompts

STREAMS = 4
SPARE = 2  # adapters that fit on the device beside those of the streams
PROMPT, OUTPUT = 64, 160
MAX_SLOWDOWN, MAX_COLD_START = 1.1, 1.15
MODES = ("alone", "loads", "uploads", "both")

Report = Callable[[str], None]


class Uploads:
    """Uploads of distinct adapters made from one, by changing its last number each time. They share one request body,
    so that the client, on the same machine, has almost nothing to do."""

    def __init__(self, url: str, folder: Path) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self._address = (parts.hostname, parts.port)
        self._boundary = "lorakeet-loadtest"
        config = (folder / "adapter_config.json").read_bytes()
        weights = (folder / "adapter_model.safetensors").read_bytes()
        head = b"".join(
            f'--{self._boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'.encode() + content + b"\r\n"
            for name, content in (("config", config), ("name", b"fresh"))
        )
        head += f'--{self._boundary}\r\nContent-Disposition: form-data; name="weights"\r\n\r\n'.encode()
        self._body = bytearray(head + weights + f"\r\n--{self._boundary}--\r\n".encode())
        self._end = len(head) + len(weights)
        self._numbers = itertools.count(1)

    def post(self, path: str, body: bytes | bytearray = b"", kind: str = "application/json") -> dict[str, Any]:
        """Send a request on its own connection. Blocks, mostly without the interpreter's lock."""
        connection = http.client.HTTPConnection(*self._address, timeout=120)
        try:
            connection.request("POST", path, body, {"Content-Type": kind})
            response = connection.getresponse()
            answer = json.loads(response.read())
        finally:
            connection.close()
        if response.status not in (200, 201):
            raise SideError(f"POST {path}: HTTP {response.status}: {answer}")
        result: dict[str, Any] = answer
        return result

    def upload_new(self) -> None:
        """Upload an adapter new to the server."""
        self._body[self._end - 4 : self._end] = np.float32(next(self._numbers) * 1e-4).tobytes()
        self.post("/v1/adapters", self._body, f"multipart/form-data; boundary={self._boundary}")

    def upload_and_warm(self) -> None:
        """Upload a new adapter and bring it onto the device."""
        self.upload_new()
        self.warm("fresh")

    def warm(self, name: str) -> float:
        """Bring an adapter onto the device; return the seconds taken."""
        return float(self.post(f"/v1/adapters/{name}/warm")["seconds"])


async def measure(kit: Kit, *, rounds: int, every: float, flags: list[str], report: Report) -> dict[str, Any]:
    """Run all measurements; return JSON values. `every`: seconds from the start of one load to that of the next."""
    names = [adapter_name(adapter) for adapter in kit.adapters]
    streams, cold = names[:STREAMS], names[STREAMS:]
    size = (next(iter(kit.adapters.values())) / "adapter_model.safetensors").stat().st_size
    room = ["--adapter-bytes", str(int((STREAMS + SPARE + 0.5) * size)), "--adapter-host-bytes", "0", *flags]
    side = Lorakeet(flags=room)
    gaps: dict[str, list[list[float]]] = {mode: [] for mode in MODES}  # round by round
    took: dict[str, list[float]] = {mode: [] for mode in MODES}
    try:
        await side.start(kit)
        client, uploads = Client(side.url), Uploads(side.url, next(iter(kit.adapters.values())))
        next_cold = itertools.cycle(cold)
        work: dict[str, Callable[[], object] | None] = {
            "alone": None,
            "loads": lambda: uploads.warm(next(next_cold)),
            "uploads": uploads.upload_new,
            "both": uploads.upload_and_warm,
        }
        await _stream(client, streams, seed=0)  # warms up
        for turn in range(rounds):
            for mode in MODES:
                with _repeat_in_thread(work[mode], every) as seconds:
                    timelines = await _stream(client, streams, seed=1 + turn)
                took[mode] += seconds
                gaps[mode].append([gap for timeline in timelines for gap in metrics.itl(timeline)])
            report(
                f"round {turn + 1}: P99 "
                + ", ".join(f"{mode} {_percentile_ms(gaps[mode][-1], 99):.1f} ms" for mode in MODES)
            )
        first = await _first_tokens(client, uploads, names, trials=2 * rounds)
    finally:
        await side.stop()
    itl = {mode: {f"p{q}": [_percentile_ms(one, q) for one in gaps[mode]] for q in (50, 90, 99)} for mode in MODES}
    slower = {mode: np.median(itl[mode]["p99"]) / np.median(itl["alone"]["p99"]) for mode in MODES[1:]}
    late = first["cold"] / (first["warm"] + first["load"])
    return {
        "flags": room,
        "streams": STREAMS,
        "adapter_bytes": size,
        "every_seconds": every,
        "rounds": rounds,
        "adapters": {mode: len(took[mode]) for mode in MODES},
        "took_ms": {mode: _percentile_ms(took[mode], 50) for mode in MODES[1:]},
        "gaps": {mode: sum(map(len, gaps[mode])) for mode in MODES},
        "itl_ms": {mode: {p: float(np.median(values)) for p, values in spread.items()} for mode, spread in itl.items()},
        "itl_p99_ms_by_round": {mode: itl[mode]["p99"] for mode in MODES},
        "first_token_ms": {name: seconds * 1e3 for name, seconds in first.items()},
        "verdicts": [
            _verdict(f"P99 ITL beside loads within {MAX_SLOWDOWN} x", slower["loads"], MAX_SLOWDOWN),
            _verdict(f"P99 ITL beside uploads within {MAX_SLOWDOWN} x", slower["uploads"], MAX_SLOWDOWN),
            _verdict(f"P99 ITL beside uploads that are loaded within {MAX_SLOWDOWN} x", slower["both"], MAX_SLOWDOWN),
            _verdict(f"cold first token within {MAX_COLD_START} x of warm + load", late, MAX_COLD_START),
        ],
    }


@contextmanager
def _repeat_in_thread(work: Callable[[], object] | None, every: float) -> Iterator[list[float]]:
    """Repeat `work` in a thread during the block; yield the list of its durations, complete after the block."""
    stop = threading.Event()
    faults: list[Exception] = []
    took: list[float] = []

    def repeat() -> None:
        while work is not None and not stop.is_set():
            begin = time.perf_counter()
            try:
                work()
            except Exception as fault:
                faults.append(fault)
                return
            took.append(time.perf_counter() - begin)
            stop.wait(max(0.0, every - took[-1]))

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield took
    finally:
        stop.set()
        thread.join()
    if faults:
        raise faults[0]


async def _stream(client: Client, names: list[str], seed: int) -> list[Timeline]:
    """Request one long answer per name, all at once."""
    prompts = random_prompts(len(names), PROMPT, seed=seed + int(time.time()))
    timelines = list(
        await asyncio.gather(
            *(
                client.complete(name, prompt, OUTPUT, ignore_eos=True)
                for name, prompt in zip(names, prompts, strict=True)
            )
        )
    )
    client.read_all()
    if errors := [timeline.error for timeline in timelines if timeline.error]:
        raise SideError(f"a stream broke: {errors[0]}")
    return timelines


async def _first_tokens(client: Client, uploads: Uploads, names: list[str], trials: int) -> dict[str, float]:
    """Return median seconds to the first token with a resident adapter and with one on disk, and of a load alone.

    More adapters than fit are requested in turn, so the next one is always evicted.
    """
    seconds: dict[str, list[float]] = {"warm": [], "cold": [], "load": []}
    turn = itertools.cycle(names)
    for trial in range(trials):
        name = next(turn)
        for kind in ("cold", "warm"):
            prompts = random_prompts(1, PROMPT, seed=10_000 + 2 * trial + (kind == "warm"))
            timeline = await client.complete(name, prompts[0], 2, ignore_eos=True)
            client.read_all()
            if timeline.error:
                raise SideError(f"a request broke: {timeline.error}")
            seconds[kind].append(metrics.ttft(timeline))
        seconds["load"].append(await asyncio.to_thread(uploads.warm, next(turn)))
    return {kind: float(np.median(values)) for kind, values in seconds.items()}


def _percentile_ms(gaps: list[float], q: float) -> float:
    return float(np.percentile(gaps, q)) * 1e3


def _verdict(claim: str, value: float, most: float) -> dict[str, Any]:
    return {"claim": claim, "value": round(float(value), 3), "holds": bool(value <= most)}


def table(result: dict[str, Any]) -> Table:
    """Return the result as a table for the terminal."""
    size, every = result["adapter_bytes"] / 1e6, result["every_seconds"]
    title = f"{result['streams']} streams, an adapter of {size:.0f} MB every {every:g} s; medians of rounds"
    shown = Table("", "ITL P50", "P90", "P99", "adapters", "each took", title=title)
    for mode, spread in result["itl_ms"].items():
        each = f"{result['took_ms'][mode]:.0f} ms" if mode in result["took_ms"] else ""
        counted = str(result["adapters"][mode])
        shown.add_row(mode, *(f"{spread[p]:.1f} ms" for p in ("p50", "p90", "p99")), counted, each)
    first = result["first_token_ms"]
    shown.caption = (
        f"first token: warm {first['warm']:.1f} ms, cold {first['cold']:.1f} ms; a load {first['load']:.1f} ms"
    )
    return shown
