"""Threads for what nobody should notice: reading adapters, receiving and checking uploads.

Linux has priorities per thread, and no privilege is needed to give way. Elsewhere they are threads like others. Knows
nothing of the work.
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

_NICENESS = 10  # a tenth of what a thread that serves gets


def threads(count: int, name: str, priority: Priority) -> ThreadPoolExecutor:
    """Threads that get processor time as `priority` says: what others leave, little, or as much as others."""
    return ThreadPoolExecutor(count, name, partial(give_way, priority))


async def run_in(pool: ThreadPoolExecutor | None, work: Callable[[], T]) -> T:
    """Let one of the threads do it; None: of the event loop's own. Whoever is cancelled meanwhile waits for its
    end: it may still need what its caller is about to clear away."""
    future = asyncio.get_running_loop().run_in_executor(pool, work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await asyncio.wait([future])
        raise


def give_way(priority: Priority, process: int | None = None) -> None:
    """Let this thread, or a process that has just begun, and what it starts have processor time as `priority` says.
    Never more than before."""
    if sys.platform != "linux":
        return
    thread = process or threading.get_native_id()
    with suppress(OSError):  # a container that forbids it gets the work done all the same
        if priority == "idle":
            # Not only a smaller share: whoever wakes up with work to do takes the core at once, not at the next tick.
            os.sched_setscheduler(thread, os.SCHED_IDLE, os.sched_param(0))
        elif priority == "low":
            os.setpriority(os.PRIO_PROCESS, thread, _NICENESS)
