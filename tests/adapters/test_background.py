"""Low-priority threads run at low priority, and a cancelled caller waits for its work to finish."""

import asyncio
import os
import sys
import threading
from contextlib import suppress

import pytest

from adapters.background import Priority, run_in, thread_pool


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux only")
@pytest.mark.parametrize(("priority", "scheduled"), [("idle", "idle"), ("low", 10), ("normal", None)])
def test_a_thread_runs_when_it_is_told_to(priority: Priority, scheduled: str | int | None) -> None:
    def seen() -> str | int:
        thread = threading.get_native_id()
        return "idle" if os.sched_getscheduler(thread) == os.SCHED_IDLE else os.getpriority(os.PRIO_PROCESS, thread)

    here = seen()
    with thread_pool(1, "test", priority) as pool:
        assert pool.submit(seen).result() == (here if scheduled is None else scheduled)
    assert seen() == here


async def test_a_cancelled_caller_waits_for_the_work_to_finish() -> None:
    begun, done = threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        done.wait(0.05)
        done.set()

    with thread_pool(1, "test", "normal") as pool:
        waiting = asyncio.create_task(run_in(pool, work))
        await asyncio.to_thread(begun.wait)
        waiting.cancel()
        with suppress(asyncio.CancelledError):
            await waiting
        assert waiting.cancelled()
        assert done.is_set()
