"""Pinned names: their versions stay on the device, within a limit, and their files on this disk."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

from adapters.peft_format.sizes import device_bytes
from adapters.storage.store import AdapterStore
from adapters.storage.versions import DamagedAdapter, RemoteUnavailable, UnknownAdapter, Version
from server.client.engine import EngineClient
from server.errors import StorageFull
from server.messages.protocol import AdapterRef
from server.metrics import Metrics
from server.registry.capacity import PinLimit, first_that_fit
from server.settings import Settings

_RETRY_SECONDS = 10.0  # between attempts to fetch the files of a pinned adapter

Fetch = Callable[[Version], Awaitable[None]]  # waits until the files of a leased version are on this disk

log = logging.getLogger(__name__)


class Pins:
    """Leases of the pinned versions, and the engine's list of them."""

    def __init__(
        self, settings: Settings, engine: EngineClient, store: AdapterStore, metrics: Metrics, fetch: Fetch
    ) -> None:
        self._engine = engine
        self._store = store
        self._metrics = metrics
        self._limit = PinLimit(settings, engine)
        self._fetch_files = fetch
        self._leases: dict[str, contextlib.ExitStack] = {}  # by digest
        self._fetching: set[asyncio.Task[None]] = set()

    def renew(self) -> None:
        """Lease the versions pinned now and report them to the engine; missing files are reported once fetched."""
        versions = self._store.pinned_versions()
        base = self._engine.info
        if base is None or not (versions or self._leases):  # called again when the first engine is up
            return
        fitting = first_that_fit(versions, self._limit.room(base))
        for version in versions[len(fitting) :]:
            log.warning("%s: pinned beyond --adapter-pinned-bytes, so it may be evicted", version.name)
        wanted = {version.digest: version for version in fitting}
        for digest in self._leases.keys() - wanted.keys():
            self._leases.pop(digest).close()
        on_disk = []
        for digest, version in wanted.items():
            if digest not in self._leases:
                self._lease(version)
            if digest in self._leases and self._store.has(version):
                on_disk.append(AdapterRef(digest=digest, path=str(version.path)))
        self._engine.pin(on_disk)
        size = sum(device_bytes(version.receipt["rows"], base.linears) for version in fitting)
        self._metrics.set_pinned([(version.label, version.digest) for version in fitting], size)

    def _lease(self, version: Version) -> None:
        held = contextlib.ExitStack()
        with contextlib.suppress(UnknownAdapter):  # removed concurrently: that change calls `renew` again
            held.enter_context(self._store.lease(version))
            self._leases[version.digest] = held
            if not self._store.has(version):
                task = asyncio.create_task(self._fetch(version))
                self._fetching.add(task)
                task.add_done_callback(self._fetching.discard)

    async def _fetch(self, version: Version) -> None:
        while version.digest in self._leases:
            try:
                await self._fetch_files(version)
                self.renew()
                return
            except (RemoteUnavailable, DamagedAdapter, StorageFull):
                pass
            except Exception:
                log.exception("%s: the pinned adapter could not be fetched", version.name)
            await asyncio.sleep(_RETRY_SECONDS)
