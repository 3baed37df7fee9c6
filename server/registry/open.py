"""The one way to a version of an adapter: found by name, leased, its files fetched.

    async with registry.open(caller, "support@3f8a2c11") as version: ...

A name stands for its current version or for its share of a split; `name@digest prefix` asks for one version. While it
is open its files stay, whatever happens to the name meanwhile.
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
from server.registry.following import Following
from server.registry.hub import Hub
from server.registry.pins import Fetch, Pins
from server.registry.publish import Publisher
from server.repeat import repeatedly
from server.settings import Settings
from server.tenants.caller import TENANT, Caller
from server.tenants.limits import NO_ROWS, Rows
from server.text.processor import TextProcessor

log = logging.getLogger(__name__)

T = TypeVar("T")

_HEX = frozenset("0123456789abcdef")


class Registry:
    """Names of adapters.

    Attributes:
        publisher: changes what they mean.
        hub: has some that may be fetched.
        discovery: finds them on this machine's disk, or on the hub.
        following: takes over what other servers change.
    """

    def __init__(
        self, settings: Settings, engine: EngineClient, store: AdapterStore, fetch: Fetch, publisher: Publisher
    ) -> None:
        self.publisher = publisher
        self.hub = Hub(settings, publisher)
        self.discovery = Discovery(settings, engine, publisher, self.hub)
        self.following = Following(settings, store, publisher)
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
        """The registry and its parts; see `Publisher` for what may be left out."""
        fetch = partial(_fetch, store, seconds=settings.adapter_store_seconds)
        pins = Pins(settings, engine, store, metrics, fetch)
        publisher = Publisher(settings, engine, store, metrics, pins, outline, text, checker)
        return cls(settings, engine, store, fetch, publisher)

    @asynccontextmanager
    async def open(
        self, caller: Caller, asked: str, *, user: str | None = None, param: str = "model", whole: bool = False
    ) -> AsyncIterator[Version]:
        """A version with its files, until the end.

        Args:
            asked: a name, or `name@digest prefix`.
            user: who asks; one user always gets the same version of a name whose requests are split.
            param: where the name came from, for the error.
            whole: see `hold`.

        Raises ModelNotFound (404), Conflict (409, an ambiguous digest prefix), InvalidRequest, RemoteUnavailable,
        AdapterDamaged, StorageFull.
        """
        name, prefix = split_reference(asked)
        if prefix is not None and not (len(prefix) >= SHORTEST_PREFIX and set(prefix.lower()) <= _HEX):
            raise InvalidRequest(
                f"A version is asked for as NAME@ and at least {SHORTEST_PREFIX} hexadecimal digits of its digest.",
                param=param,
            )
        async with AsyncExitStack() as held:
            while True:
                try:
                    pointer = await self._pointer(caller, name)
                    version = pointer.choose(user) if prefix is None else pointer.find(prefix)
                except UnknownAdapter:
                    raise ModelNotFound(asked, param=param) from None
                except AmbiguousDigest:
                    raise Conflict(f"Several versions of `{name}` start with {prefix}.", param=param) from None
                with suppress(UnknownAdapter):  # removed in this very moment: look again
                    await held.enter_async_context(self.hold(version, whole=whole))
                    break
            yield version

    def rows(self, caller: Caller, versions: Iterable[Version]) -> Rows:
        """What counts for the caller's limit of rows on the device: these versions and those that it has pinned."""
        if caller.allowance.limits.device_rows is None:
            return NO_ROWS
        pinned = [version for version in self._store.pinned_versions() if version.tenant == caller.tenant]
        return {
            version.digest: {kind: units for kind, units in row_units([version]).items() if kind != EXTRAS}
            for version in (*pinned, *versions)
        }

    @asynccontextmanager
    async def hold(self, version: Version, *, whole: bool = False) -> AsyncIterator[Version]:
        """A version that was found, with its files, until the end.

        The engine holds what it reads against the version's record by itself. `whole`: for who reads files without
        that, all are read and, where they are damaged, mended first.

        Raises UnknownAdapter when it was removed since, RemoteUnavailable, AdapterDamaged, StorageFull.
        """
        with self._store.lease(version):
            try:
                await self._fetch(version)
                if whole:
                    await self._mend(version)
                yield version
            except (DamagedAdapter, DamagedFile):
                raise AdapterDamaged(version.name, version.digest) from None

    async def read(self, version: Version, work: Callable[[], T]) -> T:
        """What `work` makes of a held version's files, in a thread; once more after mending, if they are damaged."""
        try:
            return await asyncio.to_thread(work)
        except DamagedFile:
            await self._mend(version)
            return await asyncio.to_thread(work)

    async def mend(self, adapters: Sequence[AdapterRef]) -> None:
        """The engine could not load one of these: see that their files are whole. Raises AdapterDamaged."""
        for adapter in adapters:
            version = self._store.named(adapter.digest)
            if version is not None:
                await self._mend(version)

    async def _mend(self, version: Version) -> None:
        try:
            try:
                with disk_faults():
                    await asyncio.to_thread(self._store.mend, version)
            except DamagedAdapter as fault:
                log.warning("adapter %s: %s", version.name, fault)
                await self.publisher.remake(version)
        except (DamagedAdapter, AdapterError, FileNotFoundError) as fault:
            log.error("adapter %s (%s) cannot be served: %s", version.name, version.digest, fault)
            raise AdapterDamaged(version.name, version.digest) from None

    async def find(self, caller: Caller, name: str, digest_prefix: str | None = None) -> Version:
        """A version's record, its files not asked for. Raises UnknownAdapter, AmbiguousDigest."""
        pointer = await self._pointer(caller, name)
        return pointer.current if digest_prefix is None else pointer.find(digest_prefix)

    async def _pointer(self, caller: Caller, name: str) -> Pointer:
        if caller.adapters is not None and name not in caller.adapters:
            raise UnknownAdapter(name)
        try:
            return await self._readable(caller.tenant, name)
        except UnknownAdapter:
            if caller.tenant != TENANT or not await self.discovery.discover(TENANT, name):  # the directory is theirs
                raise
            return self._store.pointer(TENANT, name)

    async def _readable(self, tenant: str, name: str) -> Pointer:
        with suppress(UnknownAdapter):
            return self._store.readable(tenant, name)
        await self.following.look(tenant, name)
        return self._store.readable(tenant, name)

    def list(self, caller: Caller) -> Sequence[Version]:
        """The current version of every name that there is for the caller, by name."""
        known = [*self._store.list(caller.tenant), *self._store.shared_with(caller.tenant)]
        named = sorted(((version.name_for(caller.tenant), version) for version in known), key=itemgetter(0))
        return [version for name, version in named if caller.sees(name)]

    async def own(self, caller: Caller, name: str) -> Version:
        """A version that the caller may change. Raises UnknownAdapter, PermissionDenied."""
        return _changeable(caller, await self._pointer(caller, name))

    async def delete(self, caller: Caller, name: str) -> Version:
        """Take the name away; requests that run keep their version. Raises UnknownAdapter."""
        if not caller.sees(name):
            raise UnknownAdapter(name)
        _changeable(caller, await self._readable(caller.tenant, name))
        version = await self.publisher.delete(caller.tenant, name)
        if caller.tenant == TENANT:
            await self.discovery.forget(name)
        return version

    async def collect_orphans(self) -> None:
        """Again and again, remove versions from the object store that no name has any more, or ever had: uploads that
        a crash cut short."""

        async def collect() -> None:
            if count := await self._store.remove_orphans(self._orphan_seconds):
                log.info("removed %d unnamed versions from the object store", count)

        if self._orphan_seconds:
            await repeatedly(collect, self._orphan_seconds, "removing unnamed versions", RemoteUnavailable, OSError)


def _changeable(caller: Caller, pointer: Pointer) -> Version:
    version = pointer.current
    if version.tenant != caller.tenant:
        message = f"`{version.name_for(caller.tenant)}` is shared with you: only its owner changes it."
        raise PermissionDenied(message, param="name", code="shared_adapter")
    return version


async def _fetch(store: AdapterStore, version: Version, seconds: float) -> None:
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
