"""Calls that begin at the same time, and the end of those that were begun."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def together(*works: Callable[[], object]) -> list[Any]:
    """What each did, or the fault that it met, all at once."""
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


async def threads_at_rest() -> None:
    """Return when all is over that this event loop has given to threads: they go on when their task is cancelled."""
    loop = asyncio.get_running_loop()
    before: ThreadPoolExecutor | None = loop._default_executor  # type: ignore[attr-defined]
    loop.set_default_executor(ThreadPoolExecutor())
    if before is not None:
        await asyncio.to_thread(before.shutdown)
