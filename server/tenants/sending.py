"""Sending of this server's usage and audit entries to the object store, for all servers to show."""

import asyncio
import logging
from collections.abc import Callable

from adapters.storage.database import DatabaseBusy
from adapters.storage.versions import RemoteUnavailable

_EXPECTED = (RemoteUnavailable, DatabaseBusy, OSError)

log = logging.getLogger(__name__)


async def send_periodically(seconds: float, *send_functions: Callable[[], None]) -> None:
    """Call the functions periodically, and once more when cancelled. After a fault the next call sends the rest, also
    after a restart."""
    outage = False
    try:
        while True:
            try:
                await _send(*send_functions)
                outage = False
            except Exception as fault:
                if not outage:
                    unexpected = not isinstance(fault, _EXPECTED)
                    log.warning("usage and audit log are not sent to the object store: %s", fault, exc_info=unexpected)
                outage = True
            await asyncio.sleep(seconds)
    finally:
        if not outage:
            try:
                await _send(*send_functions)
            except _EXPECTED as fault:
                log.warning(
                    "the last usage and audit entries are sent to the object store at the next start: %s", fault
                )


async def _send(*send_functions: Callable[[], None]) -> None:
    for send in send_functions:
        await asyncio.to_thread(send)
