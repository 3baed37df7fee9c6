"""Waiting for the files of a leased version: from the object store where they are kept there, within one time limit."""

import asyncio
import logging

from adapters.storage.store import AdapterStore
from adapters.storage.versions import DamagedAdapter, RemoteUnavailable, Version
from server.errors import disk_faults

log = logging.getLogger(__name__)


async def fetch(store: AdapterStore, version: Version, seconds: float) -> None:
    """Return once a leased version's files are on this disk.

    Args:
        seconds: the longest wait (`--adapter-store-seconds`).

    Raises RemoteUnavailable, DamagedAdapter, StorageFull.
    """
    if store.has(version):
        return
    try:
        with disk_faults():
            async with asyncio.timeout(seconds):
                await store.ready(version)
    except TimeoutError:
        log.warning("%s: not fetched within --adapter-store-seconds (%g s)", version.digest, seconds)
        raise RemoteUnavailable("its files have not come in time") from None
    except (RemoteUnavailable, DamagedAdapter) as fault:
        log.warning("adapter %s (%s) cannot be served: %s", version.name, version.digest, fault)
        raise
