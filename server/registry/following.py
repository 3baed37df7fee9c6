"""Changes that other servers make in the object store, applied here: by polling, and at once for an unknown name."""

import asyncio
import logging

from adapters.storage.store import AdapterStore
from adapters.storage.versions import RemoteUnavailable
from server.registry.publish import Publisher
from server.repeat import run_periodically
from server.settings import Settings
from server.tenants.caller import tenant_of

_MAX_LOOKUPS = 64  # look-ups of unknown names between two polls; the next poll finds names beyond that

log = logging.getLogger(__name__)


class StoreFollower:
    """Follower of the names in `--adapter-store`; does nothing without an object store."""

    def __init__(self, settings: Settings, store: AdapterStore, publisher: Publisher) -> None:
        self._shared = settings.adapter_store is not None
        self._seconds = settings.store_poll_seconds / 2  # so that each change is seen within the full interval
        self._timeout = settings.adapter_store_seconds
        self._store = store
        self._publisher = publisher
        self._lookups: dict[tuple[str, str], asyncio.Task[None]] = {}  # since the last poll
        self._outage = False

    async def run(self) -> None:
        """Poll until cancelled."""
        if self._shared:
            await run_periodically(self.poll, self._seconds, "polling the object store")

    async def poll(self) -> None:
        """Apply other servers' changes once. While the store fails, known names stay as they are."""
        try:
            changes = await asyncio.to_thread(self._store.import_changes)
        except (RemoteUnavailable, OSError) as fault:  # network, or local disk
            if not self._outage:
                log.warning("other servers' changes cannot be read: %s", fault)
            self._outage = True
            return
        if self._outage:
            log.info("other servers' changes can be read again")
            self._publisher.pins.renew()  # some changes may have been applied before the fault
        self._outage = False
        self._lookups.clear()
        self._publisher.apply_remote_changes(changes)

    async def look_up(self, tenant: str, name: str) -> None:
        """Look for an unknown name in the object store, once between two polls. Raises RemoteUnavailable."""
        if not self._shared:
            return
        owner, slash, rest = name.partition("/")
        for key in [(tenant, name), (tenant_of(owner), rest)] if slash else [(tenant, name)]:
            if key not in self._lookups and len(self._lookups) < _MAX_LOOKUPS:
                self._lookups[key] = asyncio.create_task(self._look_up(*key))
            if key in self._lookups:
                await asyncio.shield(self._lookups[key])

    async def _look_up(self, tenant: str, name: str) -> None:
        if self._outage:
            raise RemoteUnavailable("it did not answer just now")
        try:
            async with asyncio.timeout(self._timeout):
                change = await asyncio.to_thread(self._store.import_change, tenant, name)
        except TimeoutError:
            raise RemoteUnavailable("no answer within --adapter-store-seconds") from None
        if change is not None:
            self._publisher.apply_remote_changes([change])
