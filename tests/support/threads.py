"""Concurrent calls, client threads that work in the background, and waiting for threads to finish."""

import asyncio
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx


def together(*works: Callable[[], object]) -> list[Any]:
    """Run the calls concurrently; return the result or exception of each."""
    results: list[Any] = [None] * len(works)
    barrier = threading.Barrier(len(works))

    def run(i: int) -> None:
        barrier.wait()
        try:
            results[i] = works[i]()
        except Exception as fault:
            results[i] = fault

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


class ClientThreads:
    """Threads that work while the context lasts; at its end `stop` is set. They share an HTTP client.

    No connection is reused, since the server may have died.
    """

    def __init__(self, stop: threading.Event, works: Sequence[Callable[[], None]], timeout: float) -> None:
        self._stop = stop
        self._client = httpx.Client(timeout=timeout, limits=httpx.Limits(max_keepalive_connections=0))
        self._threads = [threading.Thread(target=work) for work in works]

    def __enter__(self) -> None:
        for thread in self._threads:
            thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._client.close()


async def threads_at_rest() -> None:
    """Wait until all work that this event loop gave to threads is finished; it continues when its task is cancelled."""
    loop = asyncio.get_running_loop()
    before: ThreadPoolExecutor | None = loop._default_executor  # type: ignore[attr-defined]
    loop.set_default_executor(ThreadPoolExecutor())
    if before is not None:
        await asyncio.to_thread(before.shutdown)
