"""Adapters without an upload: from `--adapter`, the directories in `--adapter-dir`, and the hub's repositories in
`--adapter-hub`."""

import asyncio
import logging
import time
from pathlib import Path

from starlette.concurrency import run_in_threadpool

from adapters.peft_format.directory import CONFIG_NAME, WEIGHTS_NAME
from adapters.peft_format.fields import AdapterError
from adapters.storage.database import DatabaseBusy
from adapters.storage.versions import RemoteUnavailable
from server.client.engine import EngineClient
from server.errors import Conflict, LorakeetError
from server.hub import Reference
from server.registry.hub import Hub
from server.registry.publish import Publisher
from server.settings import SettingError, Settings

_POLL_SECONDS = 0.1
_IMPORT_ERRORS = (AdapterError, OSError, LorakeetError, DatabaseBusy, RemoteUnavailable)

log = logging.getLogger(__name__)


class Discovery:
    """Import of adapters from directories and from the hub, at start and when an unknown name is requested.

    Attributes:
        pending: whether adapters of the command line are still to be imported.
    """

    def __init__(self, settings: Settings, engine: EngineClient, publisher: Publisher, hub: Hub) -> None:
        self.pending = bool(settings.adapter)
        self._settings = settings
        self._engine = engine
        self._publisher = publisher
        self._hub = hub
        self._import_lock = asyncio.Lock()
        self._ignored: dict[str, object] = {}  # name -> signature of the files refused or deleted
        self._fetching: dict[str, asyncio.Task[bool]] = {}  # by name
        self._retry_at: dict[str, float] = {}  # name -> time of the next attempt on the hub

    async def discover(self, tenant: str, name: str) -> bool:
        """Look for an unknown name in `adapter_dir` and among `adapter_hub`; return whether it is in the store now."""
        root, reference = self._settings.adapter_dir, self._hub.reference_of(name)
        if root is None and reference is None:
            return False
        try:
            self._publisher.check_name(name)
        except AdapterError:
            return False
        async with self._import_lock:
            if root is not None and await self._import(tenant, name, root):
                return True
        return reference is not None and await self._fetch(tenant, name, reference)

    async def ignore(self, name: str) -> None:
        """Do not import a deleted name again: from its directory until its files change, from the hub until the next
        start of the server."""
        if self._settings.adapter_dir is not None:
            self._ignored[name] = await run_in_threadpool(_signature, self._settings.adapter_dir / name)
        if self._hub.reference_of(name) is not None:
            self._retry_at[name] = float("inf")

    async def import_configured(self, tenant: str) -> None:
        """Import the adapters of `adapter` and `adapter_dir` once an engine is up.

        Raises SettingError when an adapter of `--adapter` is refused: the server must not start without it.
        """
        while self._engine.info is None:  # noqa: ASYNC110 - the engine's interface has no event
            await asyncio.sleep(_POLL_SECONDS)
        self._publisher.pins.renew()
        for name, source in self._settings.adapter_sources.items():
            try:
                if isinstance(source, Reference):
                    version, changed = await self._hub.fetch_and_publish(tenant, name, source)
                else:
                    version, changed = await self._publisher.import_directory(tenant, name, source)
            except _IMPORT_ERRORS as error:
                raise SettingError(f"--adapter {name}: {error}") from None
            log.info("adapter %s is %s%s", name, version.digest, "" if changed else " (unchanged)")
        self.pending = False
        if (root := self._settings.adapter_dir) is None:
            return
        try:
            directories = sorted(path for path in root.iterdir() if path.is_dir())
        except OSError as fault:  # the directory may appear later
            log.warning("--adapter-dir: the directory cannot be read yet: %s", fault)
            return
        for directory in directories:
            async with self._import_lock:
                await self._import(tenant, directory.name, root)

    async def _fetch(self, tenant: str, name: str, reference: Reference) -> bool:
        """Fetch once for all concurrent requests; the cancellation of one does not stop it."""
        if time.monotonic() < self._retry_at.get(name, 0.0):
            return False
        if name not in self._fetching:
            task = self._fetching[name] = asyncio.create_task(self._fetch_and_publish(tenant, name, reference))
            task.add_done_callback(lambda _: self._fetching.pop(name))
        return await asyncio.shield(self._fetching[name])

    async def _fetch_and_publish(self, tenant: str, name: str, reference: Reference) -> bool:
        try:
            await self._hub.fetch_and_publish(tenant, name, reference, republish=False)
        except _IMPORT_ERRORS as error:
            self._retry_at[name] = time.monotonic() + self._settings.adapter_hub_retry_seconds
            log.warning("--adapter-hub: %s is not served: %s", name, error)
            return False
        return True

    async def _import(self, tenant: str, name: str, root: Path) -> bool:
        directory = root / name
        signature = await run_in_threadpool(_signature, directory)
        if signature is None or self._ignored.get(name) == signature:
            return False
        try:
            # A version given to the name over HTTP since then was intended: unchanged files do not undo it.
            await self._publisher.import_directory(tenant, name, directory, root=root, republish=False)
        except _IMPORT_ERRORS as error:
            if isinstance(error, AdapterError | Conflict):
                self._ignored[name] = signature  # until its files change
            log.warning("--adapter-dir: %s is not served: %s", name, error)
            return False
        self._ignored.pop(name, None)
        return True


def _signature(directory: Path) -> tuple[tuple[int, int], ...] | None:
    """Return the files' times and sizes, which change with the files; None for a directory without an adapter."""
    try:
        stats = [(directory / name).stat() for name in (CONFIG_NAME, WEIGHTS_NAME)]
    except OSError:
        return None
    return tuple((stat.st_mtime_ns, stat.st_size) for stat in stats)
