"""How an adapter gets in, and out: checked against the base, sure to fit, published under a name, forgotten when gone.

Uploads, directories named on the command line, vLLM's load endpoint and finished fine-tunes all come through here, so
whatever the store holds can be served. It knows neither HTTP nor what a request is.
"""

import asyncio
import contextlib
import dataclasses
import errno
import logging
import shutil
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

from starlette.concurrency import run_in_threadpool

from adapters.fields import shorten
from adapters.format import CONFIG_NAME, EXTRAS, WEIGHTS_NAME, AdapterError, AdapterSpec, Outline, inspect
from adapters.store import AdapterStore, Pointer, Staging, UnknownAdapter, Version, check_name
from server.engine.client import EngineClient, EngineUnavailable
from server.engine.protocol import Ready
from server.errors import StorageFull
from server.logs import FIELDS
from server.metrics import Metrics
from server.settings import SettingError, Settings

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_POLL_SECONDS = 0.1

MAX_CUDA_RANK = 512  # of one adapter in the grouped LoRA kernels

log = logging.getLogger(__name__)
audit_log = logging.getLogger("server.audit")  # one line per change of what a name means


class AdapterIntake:
    """The one door through which stored adapters change.

    Args:
        settings: `adapter`, `adapter_dir`, `max_uploads` and the base's names are read.
        outline: the base's parameters beside its linears; without, adapters may touch nothing but linears.
    """

    def __init__(
        self,
        settings: Settings,
        engine: EngineClient,
        store: AdapterStore,
        metrics: Metrics,
        outline: Outline | None = None,
    ) -> None:
        self._settings = settings
        self._engine = engine
        self._store = store
        self._metrics = metrics
        self._outline = outline
        self._discovering = asyncio.Lock()
        self._unwanted: dict[str, object] = {}  # name in `adapter_dir` -> signature of the files refused or deleted
        self._background: set[asyncio.Task[None]] = set()
        self.upload_slots = asyncio.Semaphore(settings.max_uploads)
        self.pending = bool(settings.adapter)  # adapters of the command line are not all there yet

    def check_name(self, name: str, *, fine_tuned: bool = False) -> None:
        """Raises AdapterError when an adapter may not be called so."""
        check_name(name, fine_tuned=fine_tuned)
        if name in self._settings.base_aliases:
            raise AdapterError(f"'{name}' is the base model's name.", "name")

    @property
    def base(self) -> Ready:
        """What adapters are checked against. Raises EngineUnavailable before the first engine has come up."""
        info = self._engine.info
        if info is None:
            raise EngineUnavailable(self._engine.unready_reason or "The engine is starting.")
        return info

    @contextlib.asynccontextmanager
    async def stage(self) -> AsyncIterator[Staging]:
        """A private directory for files on their way in; gone afterwards unless `admit` took them. StorageFull."""
        clean_up = contextlib.ExitStack()
        with disk_faults():
            staging = clean_up.enter_context(self._store.stage())
        try:
            yield staging
        finally:
            await run_in_threadpool(clean_up.close)  # removing gigabytes takes a while

    async def admit(
        self, tenant: str, name: str, staging: Staging, *, fine_tuned: bool = False, promote: bool = True
    ) -> tuple[Version, bool]:
        """Validate what lies in `staging` and make it the current content of `name`, or with `promote=False` a version
        of it that waits.

        Returns the version and whether the name changed. Raises AdapterError (its fault), StorageFull,
        EngineUnavailable.
        """
        base = self.base
        self.check_name(name, fine_tuned=fine_tuned)
        spec = await run_in_threadpool(inspect, staging.path, base.linears, base.architecture, self._outline)
        check_fit(spec, base)
        spec = self._with_warnings(spec)
        before = self._shares(tenant, name)
        publish = partial(self._store.publish, tenant, name, staging, spec, fine_tuned=fine_tuned, promote=promote)
        with disk_faults():
            version, changed = await run_in_threadpool(publish)
        if changed:
            _audit(name, "upload" if promote or not before else "stage", before, version.digest)
            self._forget_unused(before)
        return version, changed

    async def import_directory(self, tenant: str, name: str, directory: Path) -> tuple[Version, bool]:
        """Copy a PEFT directory of this machine and admit the copy."""
        self.check_name(name)
        async with self.stage() as staging:
            with disk_faults():
                await run_in_threadpool(_copy, directory, staging.path)
            return await self.admit(tenant, name, staging)

    async def promote(self, tenant: str, name: str, digest: str, expected: Collection[str] | None) -> Pointer:
        """Let the name mean one of its versions. Raises what `AdapterStore.promote` does, and StorageFull."""
        return await self._repoint(
            "promote", tenant, name, partial(self._store.promote, tenant, name, digest, expected)
        )

    async def divide(
        self, tenant: str, name: str, shares: Mapping[str, float], expected: Collection[str] | None
    ) -> Pointer:
        """Split the name's requests between its versions. Raises what `AdapterStore.divide` does, and StorageFull."""
        return await self._repoint("split", tenant, name, partial(self._store.divide, tenant, name, shares, expected))

    async def roll_back(self, tenant: str, name: str, expected: Collection[str] | None) -> Pointer:
        """Undo the last change of the name. Raises what `AdapterStore.roll_back` does, and StorageFull."""
        return await self._repoint("rollback", tenant, name, partial(self._store.roll_back, tenant, name, expected))

    async def _repoint(self, action: str, tenant: str, name: str, change: Callable[[], Pointer]) -> Pointer:
        before = self._shares(tenant, name)
        with disk_faults():
            pointer = await run_in_threadpool(change)
        if before != pointer.shares:
            _audit(name, action, before, pointer.etag, split=dict(pointer.split) or None)
            self._forget_unused(before)
        return pointer

    async def delete(self, tenant: str, name: str) -> Version:
        """Take the name away; requests that run keep their version. Raises UnknownAdapter."""
        before = self._shares(tenant, name)
        with disk_faults():
            version = await run_in_threadpool(self._store.delete, tenant, name)
        if self._settings.adapter_dir is not None:  # or the next request would bring it back
            self._unwanted[name] = await run_in_threadpool(_signature, self._settings.adapter_dir / name)
        self._metrics.adapter_deleted(name)
        _audit(name, "delete", before, None)
        self._forget_unused(before)
        return version

    async def find(self, tenant: str, name: str, digest_prefix: str | None = None) -> Version:
        """A stored version, if need be after a look into `adapter_dir`. Raises UnknownAdapter, AmbiguousDigest."""
        try:
            return self._store.get(tenant, name, digest_prefix)
        except UnknownAdapter:
            if not await self.discover(tenant, name):
                raise
            return self._store.get(tenant, name, digest_prefix)

    async def discover(self, tenant: str, name: str) -> bool:
        """Look for an unknown name in `adapter_dir`; whether it is in the store now."""
        root = self._settings.adapter_dir
        if root is None:
            return False
        try:
            self.check_name(name)
        except AdapterError:
            return False
        async with self._discovering:
            return await self._import_found(tenant, name, root / name)

    async def import_configured(self, tenant: str) -> None:
        """Once an engine is up, bring in `adapter` and everything in `adapter_dir`.

        Raises SettingError when an adapter named by `--adapter` is refused: the server must not start without it.
        """
        while self._engine.info is None:  # noqa: ASYNC110 - the engine's interface has no event
            await asyncio.sleep(_POLL_SECONDS)
        for name, directory in self._settings.adapter_directories.items():
            try:
                version, changed = await self.import_directory(tenant, name, directory)
            except (AdapterError, OSError) as error:
                raise SettingError(f"--adapter {name}: {error}") from None
            log.info("adapter %s is %s%s", name, version.digest, "" if changed else " (unchanged)")
        self.pending = False
        root = self._settings.adapter_dir
        for directory in sorted(root.iterdir()) if root is not None and root.is_dir() else ():
            if directory.is_dir():
                async with self._discovering:
                    await self._import_found(tenant, directory.name, directory)

    async def _import_found(self, tenant: str, name: str, directory: Path) -> bool:
        signature = await run_in_threadpool(_signature, directory)
        if signature is None or self._unwanted.get(name) == signature:
            return False
        try:
            await self.import_directory(tenant, name, directory)
        except (AdapterError, OSError, StorageFull) as error:
            self._unwanted[name] = signature  # until its files change
            log.warning("--adapter-dir: %s is not served: %s", name, error)
            return False
        self._unwanted.pop(name, None)
        return True

    def _with_warnings(self, spec: AdapterSpec) -> AdapterSpec:
        """Tell the owner when the config names another base than the one that serves."""
        named = spec.config["base_model_name_or_path"]
        ours = {Path(name).name.lower() for name in self._settings.base_aliases}
        if not isinstance(named, str) or not named or Path(named).name.lower() in ours:
            return spec
        warning = f"the config names the base '{shorten(named)}'; this server serves '{self._settings.base_name}'"
        return dataclasses.replace(spec, warnings=(*spec.warnings, warning))

    def _shares(self, tenant: str, name: str) -> dict[str, float]:
        try:
            return self._store.pointer(tenant, name).shares
        except UnknownAdapter:
            return {}

    def _forget_unused(self, digests: Iterable[str]) -> None:
        """Let the engine drop versions that answer for no name any more; it does so once their last request ends.

        A digest that slips through when one name changes twice at once, or is wanted again, costs a little memory or
        time: the engine evicts and loads by itself.
        """
        for digest in digests:
            if not self._store.answers(digest):
                task = asyncio.create_task(self._engine.forget(digest))
                self._background.add(task)
                task.add_done_callback(self._background.discard)


def _audit(name: str, action: str, before: Mapping[str, float], after: str | None, **more: object) -> None:
    """Who asked is in the access log's line of the same moment."""
    was = ", ".join(before) or "nothing"
    fields = {"action": action, "adapter": name, "before": dict(before), "after": after, **more}
    audit_log.info("%s %s: %s -> %s", action, name, was, after or "nothing", extra={FIELDS: fields})


def check_fit(spec: AdapterSpec, base: Ready) -> None:
    """Raises AdapterError when the adapter would not fit into an empty device pool, or the kernels of its device."""
    if base.device.startswith("cuda") and spec.rank > MAX_CUDA_RANK:
        raise AdapterError(
            f"rank {spec.rank} is more than the {MAX_CUDA_RANK} that the GPU's kernels take", "r", "adapter_too_large"
        )
    for kind, rows in spec.rows(base.linears).items():
        capacity = base.pool_rows.get(kind, 0)
        if rows > capacity and kind == EXTRAS:
            raise AdapterError(
                f"besides its rank rows the adapter needs {rows} KiB on the device, and {capacity} KiB are there for "
                "that (see --adapter-bytes)",
                "weights",
                "adapter_too_large",
            )
        if rows > capacity:
            largest = capacity * spec.rank // rows
            raise AdapterError(
                f"rank {spec.rank} in {spec.dtype} needs {rows} rows of {kind}, and the device's pool has {capacity}: "
                f"the largest rank that can be served is {largest} (see --adapter-bytes)",
                "r",
                "adapter_too_large",
            )


@contextlib.contextmanager
def disk_faults() -> Iterator[None]:
    """A full disk, whoever met it, becomes the HTTP side's StorageFull."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise StorageFull("The disk is full; nothing was kept.") from None
        raise


def _copy(directory: Path, target: Path) -> None:
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if (directory / name).is_file():  # what is missing is named by the validation
            shutil.copyfile(directory / name, target / name)


def _signature(directory: Path) -> tuple[tuple[int, int], ...] | None:
    """Changes whenever the directory's files do; None when it is no adapter at all."""
    try:
        stats = [(directory / name).stat() for name in (CONFIG_NAME, WEIGHTS_NAME)]
    except OSError:
        return None
    return tuple((stat.st_mtime_ns, stat.st_size) for stat in stats)
