"""Sending of this server's usage and audit entries to the object store, for all servers to show."""

import asyncio
import logging
from collections.abc import Callable

from adapters.storage.database import DatabaseBusy
from adapters.storage.versions import RemoteUnavailable

_EXPECTED = (RemoteUnavailable, DatabaseBusy, OSError)

log = logging.getLogger(__name__)


async def keep_sending(seconds: float, *sends: Callable[[], None]) -> None:
    """Call `sends` periodically, and once more when cancelled. After a fault the next call sends the rest, also after a
    restart."""
    outage = False
    try:
        while True:
            try:
                await _send(*sends)
                outage = False
            except Exception as fault:
                if not outage:
                    unexpected = not isinstance(fault, _EXPECTED)
                    log.warning(
                        "other servers do not see what is used and changed here: %s", fault, exc_info=unexpected
                    )
                outage = True
            await asyncio.sleep(seconds)
    finally:
        if not outage:
            try:
                await _send(*sends)
            except _EXPECTED as fault:
                log.warning("what was used and changed here last goes to the object store at the next start: %s", fault)


async def _send(*sends: Callable[[], None]) -> None:
    for send in sends:
        await asyncio.to_thread(send)
