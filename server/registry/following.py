"""Changes that other servers make in the object store, applied here: by polling, and at once for an unknown name."""

import asyncio
import logging

from adapters.storage.store import AdapterStore
from adapters.storage.versions import RemoteUnavailable
from server.registry.publish import Publisher
from server.repeat import repeatedly
from server.settings import Settings
from server.tenants.caller import tenant_of

_LOOKS = 64  # look-ups of unknown names between two polls; the next poll finds names beyond that

log = logging.getLogger(__name__)


class Following:
    """Follower of the names in `--adapter-store`; does nothing without an object store."""

    def __init__(self, settings: Settings, store: AdapterStore, publisher: Publisher) -> None:
        self._shared = settings.adapter_store is not None
        self._seconds = settings.store_poll_seconds / 2  # so that each change is seen within the full interval
        self._patience = settings.adapter_store_seconds
        self._store = store
        self._publisher = publisher
        self._looks: dict[tuple[str, str], asyncio.Task[None]] = {}  # since the last poll
        self._outage = False

    async def run(self) -> None:
        """Poll until cancelled."""
        if self._shared:
            await repeatedly(self.poll, self._seconds, "taking over changes of other servers")

    async def poll(self) -> None:
        """Apply other servers' changes once. While the store fails, known names stay as they are."""
        try:
            changes = await asyncio.to_thread(self._store.import_changes)
        except (RemoteUnavailable, OSError) as fault:  # network, or local disk
            if not self._outage:
                log.warning("changes of other servers are not seen: %s", fault)
            self._outage = True
            return
        if self._outage:
            log.info("changes of other servers are seen again")
            self._publisher.pins.renew()  # some changes may have been applied before the fault
        self._outage = False
        self._looks.clear()
        self._publisher.follow(changes)

    async def look(self, tenant: str, name: str) -> None:
        """Look for an unknown name in the object store, once between two polls. Raises RemoteUnavailable."""
        if not self._shared:
            return
        owner, slash, rest = name.partition("/")
        for key in [(tenant, name), (tenant_of(owner), rest)] if slash else [(tenant, name)]:
            if key not in self._looks and len(self._looks) < _LOOKS:
                self._looks[key] = asyncio.create_task(self._look(*key))
            if key in self._looks:
                await asyncio.shield(self._looks[key])

    async def _look(self, tenant: str, name: str) -> None:
        if self._outage:
            raise RemoteUnavailable("it did not answer just now")
        try:
            async with asyncio.timeout(self._patience):
                change = await asyncio.to_thread(self._store.import_change, tenant, name)
        except TimeoutError:
            raise RemoteUnavailable("it has not said in time whether there is such a name") from None
        if change is not None:
            self._publisher.follow([change])
