"""Adapters on this machine's disk: those that `--adapter` names, and whatever lies in `--adapter-dir`."""

import asyncio
import logging
from pathlib import Path

from starlette.concurrency import run_in_threadpool

from adapters.peft_format.directory import CONFIG_NAME, WEIGHTS_NAME
from adapters.peft_format.fields import AdapterError
from adapters.storage.database import DatabaseBusy
from adapters.storage.versions import RemoteUnavailable
from server.client.engine import EngineClient
from server.errors import Conflict, LorakeetError
from server.registry.publish import Publisher
from server.settings import SettingError, Settings

_POLL_SECONDS = 0.1
_FAULTS = (AdapterError, OSError, LorakeetError, DatabaseBusy, RemoteUnavailable)

log = logging.getLogger(__name__)


class Discovery:
    """Brings in adapters from directories, at start and when an unknown name is asked for.

    Attributes:
        pending: adapters of the command line are not all there yet.
    """

    def __init__(self, settings: Settings, engine: EngineClient, publisher: Publisher) -> None:
        self.pending = bool(settings.adapter)
        self._settings = settings
        self._engine = engine
        self._publisher = publisher
        self._importing = asyncio.Lock()
        self._unwanted: dict[str, object] = {}  # name -> signature of the files refused or deleted

    async def discover(self, tenant: str, name: str) -> bool:
        """Look for an unknown name in `adapter_dir`; whether it is in the store now."""
        root = self._settings.adapter_dir
        if root is None:
            return False
        try:
            self._publisher.check_name(name)
        except AdapterError:
            return False
        async with self._importing:
            return await self._import(tenant, name, root)

    async def forget(self, name: str) -> None:
        """A name was deleted: its directory is not brought in again until its files change."""
        if self._settings.adapter_dir is not None:
            self._unwanted[name] = await run_in_threadpool(_signature, self._settings.adapter_dir / name)

    async def import_configured(self, tenant: str) -> None:
        """Once an engine is up, bring in `adapter` and everything in `adapter_dir`.

        Raises SettingError when an adapter named by `--adapter` is refused: the server must not start without it.
        """
        while self._engine.info is None:  # noqa: ASYNC110 - the engine's interface has no event
            await asyncio.sleep(_POLL_SECONDS)
        self._publisher.pins.renew()
        for name, directory in self._settings.adapter_directories.items():
            try:
                version, changed = await self._publisher.import_directory(tenant, name, directory)
            except _FAULTS as error:
                raise SettingError(f"--adapter {name}: {error}") from None
            log.info("adapter %s is %s%s", name, version.digest, "" if changed else " (unchanged)")
        self.pending = False
        if (root := self._settings.adapter_dir) is None:
            return
        try:
            directories = sorted(path for path in root.iterdir() if path.is_dir())
        except OSError as fault:  # it may come later
            log.warning("--adapter-dir: nothing is read from it yet: %s", fault)
            return
        for directory in directories:
            async with self._importing:
                await self._import(tenant, directory.name, root)

    async def _import(self, tenant: str, name: str, root: Path) -> bool:
        directory = root / name
        signature = await run_in_threadpool(_signature, directory)
        if signature is None or self._unwanted.get(name) == signature:
            return False
        try:
            # Whoever gave the name another version since, over HTTP, meant it: the same old files do not undo that.
            await self._publisher.import_directory(tenant, name, directory, root=root, again=False)
        except _FAULTS as error:
            if isinstance(error, AdapterError | Conflict):
                self._unwanted[name] = signature  # until its files change
            log.warning("--adapter-dir: %s is not served: %s", name, error)
            return False
        self._unwanted.pop(name, None)
        return True


def _signature(directory: Path) -> tuple[tuple[int, int], ...] | None:
    """Changes whenever the directory's files do; None when it is no adapter at all."""
    try:
        stats = [(directory / name).stat() for name in (CONFIG_NAME, WEIGHTS_NAME)]
    except OSError:
        return None
    return tuple((stat.st_mtime_ns, stat.st_size) for stat in stats)
