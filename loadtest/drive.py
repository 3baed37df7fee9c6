"""Running of planned requests against a server: an open loop by the clock, a closed loop by its clients.

`metrics` has the definitions of the figures, `report` their display.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from loadtest.client import Client, Timeline
from loadtest.scenario import Closed, Open
from loadtest.workload import Request


@dataclass(frozen=True, slots=True)
class Run:
    """The timelines of one run, in the order of the plan, and the client's own CPU seconds."""

    timelines: list[Timeline]
    client_cpu: float


async def drive(
    client: Client,
    requests: Sequence[Request],
    load: Open | Closed,
    *,
    base: str,
    ignore_eos: bool = True,
    on_end: Callable[[Timeline], None] = lambda timeline: None,
) -> Run:
    """Send all requests and wait for them.

    `base`: the model name for requests without an adapter. `on_end`: called at each request's end, for a progress bar;
    at that time, the timeline has only the transport's error, if any.
    """
    extra: dict[str, Any] = {"ignore_eos": True} if ignore_eos else {}
    cpu = time.process_time()
    start = time.perf_counter()

    async def send(request: Request, scheduled: float | None) -> Timeline:
        timeline = await client.complete(
            request.adapter or base, request.prompt, request.output_tokens, scheduled=scheduled, **extra
        )
        timeline.adapter = request.adapter
        on_end(timeline)
        return timeline

    async def send_at(request: Request) -> Timeline:
        await asyncio.sleep(start + request.at - time.perf_counter())
        return await send(request, start + request.at)

    if isinstance(load, Open):
        timelines = list(await asyncio.gather(*map(send_at, requests)))
    else:
        ended: dict[int, Timeline] = {}
        waiting = iter(enumerate(requests))

        async def one_client() -> None:
            for index, request in waiting:
                ended[index] = await send(request, None)

        await asyncio.gather(*(one_client() for _ in range(load.concurrency)))
        timelines = [ended[index] for index in range(len(requests))]
    client.read_all()
    return Run(timelines, time.process_time() - cpu)
