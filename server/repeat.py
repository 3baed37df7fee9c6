"""Periodic work that continues after faults, for as long as the server runs."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

log = logging.getLogger(__name__)


async def run_periodically(
    work: Callable[[], Awaitable[object]], seconds: float, title: str, *expected: type[Exception]
) -> None:
    """Do `work` every `seconds` until cancelled. Log a repeated fault once, with its traceback unless `expected`."""
    last_fault = ""
    while True:
        try:
            await work()
            if last_fault:
                log.info("%s: recovered", title)
            last_fault = ""
        except Exception as fault:
            if repr(fault) != last_fault:
                log.warning("%s: %s", title, fault, exc_info=not isinstance(fault, expected))
            last_fault = repr(fault)
        await asyncio.sleep(seconds)
