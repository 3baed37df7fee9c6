"""Background threads that do not slow down serving: reading adapters, receiving and checking uploads.

Linux has priorities per thread, and lowering one needs no privilege. Elsewhere these are ordinary threads.
"""

import asyncio
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Literal, TypeVar

Priority = Literal["idle", "low", "normal"]
PRIORITIES: tuple[Priority, ...] = ("idle", "low", "normal")

T = TypeVar("T")

_NICENESS = 10  # a tenth of a serving thread's processor time


def thread_pool(count: int, name: str, priority: Priority) -> ThreadPoolExecutor:
    """A pool of threads with processor time by `priority`: only idle time, little, or as much as others."""
    return ThreadPoolExecutor(count, name, partial(lower_priority, priority))


async def run_in(pool: ThreadPoolExecutor | None, work: Callable[[], T]) -> T:
    """Run `work` in a thread of the pool; None: of the event loop's own. A cancelled caller waits for it to finish,
    since the work may use resources that the caller frees."""
    future = asyncio.get_running_loop().run_in_executor(pool, work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait([future])
        raise


def lower_priority(priority: Priority, process: int | None = None) -> None:
    """Give this thread, or a process that has just started, and its children processor time by `priority`. Never more
    than before."""
    if sys.platform != "linux":
        return
    thread = process or threading.get_native_id()
    with suppress(OSError):  # if a container forbids it, the work is still done
        if priority == "idle":
            # Not only a smaller share: a waking thread takes the core from this one at once, not at the next tick.
            os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
        elif priority == "low":
            os.setpriority(os.PRIO_PROCESS, thread, _NICENESS)
