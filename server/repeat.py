"""Periodic work that continues after faults, for as long as the server runs."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

log = logging.getLogger(__name__)


async def repeatedly(
    work: Callable[[], Awaitable[object]], seconds: float, title: str, *expected: type[Exception]
) -> None:
    """Do `work` every `seconds` until cancelled. Log a repeated fault once, with its traceback unless `expected`."""
    known = ""
    while True:
        try:
            await work()
            if known:
                log.info("%s: works again", title)
            known = ""
        except Exception as fault:
            if repr(fault) != known:
                log.warning("%s: %s", title, fault, exc_info=not isinstance(fault, expected))
            known = repr(fault)
        await asyncio.sleep(seconds)
