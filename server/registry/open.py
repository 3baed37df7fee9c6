"""Opening a version of an adapter, in one place: found by name, leased, its files fetched.

    async with registry.open(caller, "support@3f8a2c11") as version: ...

A name stands for its current version, or for one chosen by its split; `name@digest prefix` selects one version. The
files of an open version stay, even if its name is changed or deleted in the meantime.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from operator import itemgetter
from typing import TypeVar

from adapters.peft_format.fields import AdapterError
from adapters.peft_format.outline import Outline
from adapters.peft_format.record import DamagedFile
from adapters.peft_format.sizes import EXTRAS
from adapters.storage.store import AdapterStore
from adapters.storage.versions import (
    SHORTEST_PREFIX,
    AmbiguousDigest,
    DamagedAdapter,
    Pointer,
    RemoteUnavailable,
    UnknownAdapter,
    Version,
    split_reference,
)
from server.children.helper import Helpers
from server.client.engine import EngineClient
from server.errors import (
    AdapterDamaged,
    Conflict,
    InvalidRequest,
    ModelNotFound,
    PermissionDenied,
    disk_faults,
)
from server.messages.protocol import AdapterRef
from server.metrics import Metrics
from server.registry.capacity import row_units
from server.registry.discovery import Discovery
from server.registry.following import StoreFollower
from server.registry.hub import Hub
from server.registry.pins import Fetch, Pins
from server.registry.publish import Publisher
from server.repeat import run_periodically
from server.settings import Settings
from server.tenants.caller import TENANT, Caller
from server.tenants.limits import NO_ROWS, Rows
from server.text.processor import TextProcessor

log = logging.getLogger(__name__)

T = TypeVar("T")

_HEX = frozenset("0123456789abcdef")


class Registry:
    """Names of adapters, and access to the versions that they mean.

    Attributes:
        publisher: changes of names.
        hub: repositories that may be fetched.
        discovery: import from this machine's disk, or from the hub.
        following: changes of other servers.
    """

    def __init__(
        self, settings: Settings, engine: EngineClient, store: AdapterStore, fetch: Fetch, publisher: Publisher
    ) -> None:
        self.publisher = publisher
        self.hub = Hub(settings, publisher)
        self.discovery = Discovery(settings, engine, publisher, self.hub)
        self.following = StoreFollower(settings, store, publisher)
        self._store = store
        self._fetch = fetch
        self._orphan_seconds = settings.orphan_seconds

    @classmethod
    def make(
        cls,
        settings: Settings,
        engine: EngineClient,
        store: AdapterStore,
        metrics: Metrics,
        outline: Outline | None = None,
        text: TextProcessor | None = None,
        checker: Helpers | None = None,
    ) -> "Registry":
        """Make a registry and its parts; see `Publisher` for the optional ones."""
        fetch = partial(_fetch, store, seconds=settings.adapter_store_seconds)
        pins = Pins(settings, engine, store, metrics, fetch)
        publisher = Publisher(settings, engine, store, metrics, pins, outline, text, checker)
        return cls(settings, engine, store, fetch, publisher)

    @asynccontextmanager
    async def open(
        self, caller: Caller, reference: str, *, user: str | None = None, param: str = "model", verify: bool = False
    ) -> AsyncIterator[Version]:
        """Find a version and hold its files until the context ends.

        Args:
            reference: a name, or `name@digest prefix`.
            user: the user; a split name resolves to the same version for one user.
            param: the request's field with the name, for errors.
            verify: see `hold`.

        Raises ModelNotFound (404), Conflict (409, an ambiguous digest prefix), InvalidRequest, RemoteUnavailable,
        AdapterDamaged, StorageFull.
        """
        name, prefix = split_reference(reference)
        if prefix is not None and not (len(prefix) >= SHORTEST_PREFIX and set(prefix.lower()) <= _HEX):
            raise InvalidRequest(
                f"A version is written as NAME@ and at least {SHORTEST_PREFIX} hexadecimal digits of its digest.",
                param=param,
            )
        async with AsyncExitStack() as held:
            while True:
                try:
                    pointer = await self._pointer(caller, name)
                    version = pointer.choose(user) if prefix is None else pointer.find(prefix)
                except UnknownAdapter:
                    raise ModelNotFound(reference, param=param) from None
                except AmbiguousDigest:
                    raise Conflict(f"Several versions of `{name}` start with {prefix}.", param=param) from None
                with suppress(UnknownAdapter):  # removed concurrently: look again
                    await held.enter_async_context(self.hold(version, verify=verify))
                    break
            yield version

    def rows(self, caller: Caller, versions: Iterable[Version]) -> Rows:
        """Return the rows that count towards the caller's limit on the device: of these versions and of its pinned
        ones."""
        if caller.allowance.limits.device_rows is None:
            return NO_ROWS
        pinned = [version for version in self._store.pinned_versions() if version.tenant == caller.tenant]
        return {
            version.digest: {kind: units for kind, units in row_units([version]).items() if kind != EXTRAS}
            for version in (*pinned, *versions)
        }

    @asynccontextmanager
    async def hold(self, version: Version, *, verify: bool = False) -> AsyncIterator[Version]:
        """Hold a found version and its files until the context ends.

        Args:
            verify: verify all files first, and mend damaged ones. The engine needs no `verify`: it compares the files
                with the version's record as it reads them.

        Raises UnknownAdapter when it was removed in the meantime, RemoteUnavailable, AdapterDamaged, StorageFull.
        """
        with self._store.lease(version):
            try:
                await self._fetch(version)
                if verify:
                    await self._mend(version)
                yield version
            except (DamagedAdapter, DamagedFile):
                raise AdapterDamaged(version.name, version.digest) from None

    async def read(self, version: Version, work: Callable[[], T]) -> T:
        """Return the result of `work`, which reads a held version's files, run in a thread. If it raises DamagedFile,
        mend the files and run it once more."""
        try:
            return await asyncio.to_thread(work)
        except DamagedFile:
            await self._mend(version)
            return await asyncio.to_thread(work)

    async def mend(self, adapters: Sequence[AdapterRef]) -> None:
        """Check and mend the files of adapters, one of which the engine failed to load. Raises AdapterDamaged."""
        for adapter in adapters:
            version = self._store.version_by_digest(adapter.digest)
            if version is not None:
                await self._mend(version)

    async def _mend(self, version: Version) -> None:
        try:
            try:
                with disk_faults():
                    await asyncio.to_thread(self._store.mend, version)
            except DamagedAdapter as fault:
                log.warning("adapter %s: %s", version.name, fault)
                await self.publisher.rebuild(version)
        except (DamagedAdapter, AdapterError, FileNotFoundError) as fault:
            log.error("adapter %s (%s) cannot be served: %s", version.name, version.digest, fault)
            raise AdapterDamaged(version.name, version.digest) from None

    async def find(self, caller: Caller, name: str, digest_prefix: str | None = None) -> Version:
        """Find a version, without a lease and without its files. Raises UnknownAdapter, AmbiguousDigest."""
        pointer = await self._pointer(caller, name)
        return pointer.current if digest_prefix is None else pointer.find(digest_prefix)

    async def _pointer(self, caller: Caller, name: str) -> Pointer:
        if caller.adapters is not None and name not in caller.adapters:
            raise UnknownAdapter(name)
        try:
            return await self._readable(caller.tenant, name)
        except UnknownAdapter:
            # adapters of `--adapter-dir` and `--adapter-hub` belong to the default tenant
            if caller.tenant != TENANT or not await self.discovery.discover(TENANT, name):
                raise
            return self._store.pointer(TENANT, name)

    async def _readable(self, tenant: str, name: str) -> Pointer:
        with suppress(UnknownAdapter):
            return self._store.readable_pointer(tenant, name)
        await self.following.look_up(tenant, name)
        return self._store.readable_pointer(tenant, name)

    def list(self, caller: Caller) -> Sequence[Version]:
        """Return the current version of every name visible to the caller, sorted by name."""
        known = [*self._store.list(caller.tenant), *self._store.shared_with(caller.tenant)]
        named = sorted(((version.name_for(caller.tenant), version) for version in known), key=itemgetter(0))
        return [version for name, version in named if caller.sees(name)]

    async def find_owned(self, caller: Caller, name: str) -> Version:
        """Return the current version of a name that the caller may change. Raises UnknownAdapter, PermissionDenied."""
        return _check_owner(caller, await self._pointer(caller, name))

    async def delete(self, caller: Caller, name: str) -> Version:
        """Delete the name; running requests keep their version. Raises UnknownAdapter."""
        if not caller.sees(name):
            raise UnknownAdapter(name)
        _check_owner(caller, await self._readable(caller.tenant, name))
        version = await self.publisher.delete(caller.tenant, name)
        if caller.tenant == TENANT:
            await self.discovery.ignore(name)
        return version

    async def collect_orphans(self) -> None:
        """Periodically remove versions without a name from the object store: deleted ones, and uploads interrupted by a
        crash."""

        async def collect() -> None:
            if count := await self._store.remove_orphans(self._orphan_seconds):
                log.info("removed %d unnamed versions from the object store", count)

        if self._orphan_seconds:
            await run_periodically(
                collect, self._orphan_seconds, "removal of unnamed versions", RemoteUnavailable, OSError
            )


def _check_owner(caller: Caller, pointer: Pointer) -> Version:
    version = pointer.current
    if version.tenant != caller.tenant:
        message = f"`{version.name_for(caller.tenant)}` is shared with you: only its owner changes it."
        raise PermissionDenied(message, param="name", code="shared_adapter")
    return version


async def _fetch(store: AdapterStore, version: Version, seconds: float) -> None:
    """Wait until a leased version's files are on this disk.

    Args:
        seconds: the longest wait (`--adapter-store-seconds`).

    Raises RemoteUnavailable, DamagedAdapter, StorageFull.
    """
    if store.has(version):
        return
    try:
        with disk_faults():
            async with asyncio.timeout(seconds):
                await store.wait_until_ready(version)
    except TimeoutError:
        log.warning("%s: not fetched within --adapter-store-seconds (%g s)", version.digest, seconds)
        raise RemoteUnavailable("its files did not arrive in time") from None
    except (RemoteUnavailable, DamagedAdapter) as fault:
        log.warning("adapter %s (%s) cannot be served: %s", version.name, version.digest, fault)
        raise
