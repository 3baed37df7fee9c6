"""Immutable adapter versions on disk, and the names that point at them.

A version is a directory `versions/<digest>`, complete before it gets that name and never changed after. What points at
it is a name's `Pointer`, kept by `adapters.names` and changed at once, after the files are safe, so that `kill -9` at
any moment leaves the old state or the new one. With a `Remote` the files are kept there and this disk is a cache of
them: a version that is not here is fetched when somebody leases it. Knows nothing of validation: it publishes what
`adapters.format.inspect` has passed. One process at a time may use a store.
"""

import asyncio
import errno
import logging
import shutil
import sqlite3
import threading
import time
import uuid
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from operator import attrgetter
from pathlib import Path
from types import TracebackType
from typing import Protocol

from adapters.fields import shorten
from adapters.format import AdapterError, AdapterSpec, digest_of, sync
from adapters.names import Names
from adapters.receipt import receipt_of
from adapters.versions import (
    SHORTEST_PREFIX,
    AmbiguousDigest,
    DamagedAdapter,
    Pointer,
    RemoteUnavailable,
    UnknownAdapter,
    Version,
    check_name,
)

__all__ = [
    "SHORTEST_PREFIX",
    "AdapterStore",
    "AmbiguousDigest",
    "DamagedAdapter",
    "Moved",
    "Pointer",
    "Remote",
    "RemoteUnavailable",
    "Staging",
    "StorageFull",
    "UnknownAdapter",
    "Version",
    "check_name",
]

RETAINED_VERSIONS = 5
_FETCHERS = 8  # versions fetched at once

log = logging.getLogger(__name__)


class StorageFull(OSError):
    """The disk is full, and nothing was kept."""


class Moved(Exception):
    """The name means something else than the caller expected. `etag`: what it means."""

    def __init__(self, etag: str) -> None:
        super().__init__(f"the name means {etag} by now")
        self.etag = etag


class Remote(Protocol):
    """Files of versions, kept elsewhere. Everything here waits for a network, and raises RemoteUnavailable."""

    def put(self, digest: str, directory: Path) -> None:
        """Keep a version's files."""

    def get(self, digest: str, directory: Path) -> None:
        """Copy a version's files into an empty directory. Raises DamagedAdapter when there are none."""

    def remove(self, digest: str) -> None:
        """Keep them no longer."""


class Staging:
    """A private directory to write an adapter's files into, gone on exit unless published. See `AdapterStore.stage`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(mode=0o700)

    def __enter__(self) -> "Staging":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


class AdapterStore:
    """Names, their versions, and the directories of these.

    Reading (`get`, `versions`, `list`, `lease`) never waits for a disk; `publish` and whatever else changes something
    does, or for the network, and belongs in a worker thread. Creating a store removes what an earlier process left
    unfinished.

    Args:
        root: directory of its own, made if missing, on one file system.
        names: what every name means, durably.
        remote: where the files are kept, if not here.
        disk_bytes: with `remote`, how much of it may be here; what is leased stays beyond that.
        retain: how many versions of a name are kept, the current one included.
    """

    def __init__(
        self,
        root: Path,
        names: Names,
        *,
        remote: Remote | None = None,
        disk_bytes: int | None = None,
        retain: int = RETAINED_VERSIONS,
    ) -> None:
        if retain < 1:
            raise ValueError(f"retain must be at least 1, for the current version, not {retain}")
        self._staging = root / "staging"
        self._versions = root / "versions"
        self._kept = names
        self._remote = remote
        self._disk_bytes = disk_bytes
        self._retain = retain
        # `_changing` is held through all of a name's change, `_placing` while a directory gets its name, `_counting`
        # for moments only.
        self._changing = threading.Lock()
        self._placing = threading.Lock()
        self._counting = threading.Condition()
        self._names: dict[str, dict[str, Pointer]] = {}  # tenant -> name -> what it means
        self._pins: dict[tuple[str, str], Pointer] = {}  # those of the names that are pinned
        self._answering: Counter[str] = Counter()  # digest -> names whose requests it may get
        self._references: Counter[str] = Counter()  # digest -> retained versions of any name that have it
        self._leases: Counter[str] = Counter()
        self._stored: OrderedDict[str, int] = OrderedDict()  # digest -> bytes here, the least recently leased first
        self._disk_used = 0  # bytes of `_stored`; like them, counted only with a remote
        self._removing: set[str] = set()  # digests whose files are on their way out
        self._fetching: dict[str, Future[None]] = {}
        self._fetchers = ThreadPoolExecutor(_FETCHERS, thread_name_prefix="adapter-fetcher")
        self.check_pins: Callable[[list[Version]], None] = lambda versions: None
        """Called before these become all versions that answer for pinned names; raises to forbid the change."""
        self._recover()

    def close(self) -> None:
        """Fetch nothing more, so that the process can end."""
        self._fetchers.shutdown(wait=False, cancel_futures=True)

    # --- reading ---------------------------------------------------------------------------------

    def get(self, tenant: str, name: str, digest_prefix: str | None = None) -> Version:
        """The current version of a name, or the retained one whose digest begins with `digest_prefix` (hex digits).

        Raises:
            UnknownAdapter: no such name or version, or a prefix of fewer than 8 digits.
            AmbiguousDigest: several retained versions begin so.
        """
        pointer = self.pointer(tenant, name)
        return pointer.current if digest_prefix is None else pointer.find(digest_prefix)

    def pointer(self, tenant: str, name: str) -> Pointer:
        """What a name means. Raises UnknownAdapter."""
        try:
            return self._names[tenant][name]
        except KeyError:
            raise UnknownAdapter(f"there is no adapter '{shorten(name)}'") from None

    def versions(self, tenant: str, name: str) -> list[Version]:
        """The retained versions of a name, the current one first. Raises UnknownAdapter."""
        return list(self.pointer(tenant, name).versions)

    def answers(self, digest: str) -> bool:
        """Whether requests for any name may get this content."""
        with self._counting:
            return digest in self._answering

    def pinned(self, tenant: str, name: str) -> bool:
        """Whether what the name means shall stay on the device."""
        return (tenant, name) in self._pins

    def pinned_versions(self) -> list[Version]:
        """Every content that answers for a pinned name, once."""
        return _answering_all(list(self._pins.values()))

    @contextmanager
    def lease(self, version: Version) -> Iterator[Version]:
        """Keep a version's files while this is open, whatever becomes of its name.

        Raises:
            UnknownAdapter: the version was removed since `get` answered it.
        """
        digest = version.digest
        with self._counting:
            here = digest in self._stored
            if not here and not (self._remote and digest in self._references):
                raise UnknownAdapter(f"the version {digest} of '{version.name}' was removed")
            self._leases[digest] += 1
            if here and self._remote:
                self._stored.move_to_end(digest)
        try:
            yield version
        finally:
            unused = self._let_go(digest)
            # A lease may end where nobody can wait, and removing gigabytes takes a while.
            if unused or self._excess > 0:
                threading.Thread(target=self._collect, args=(digest,), name="adapter-collector").start()

    def has(self, version: Version) -> bool:
        """Whether a version's files are here; as long as it is leased, that lasts."""
        return version.digest in self._stored

    async def ready(self, version: Version) -> None:
        """Wait until the files of a leased version are here. Only who needs them waits.

        Raises:
            RemoteUnavailable: they cannot be had now.
            DamagedAdapter: what the remote has is not this version.
            StorageFull: there is no room for them.
        """
        if not self.has(version):
            # Several may wait for one: whoever stops waiting must not stop it.
            await asyncio.shield(asyncio.wrap_future(self._fetch_soon(version.digest)))

    # --- changing --------------------------------------------------------------------------------

    def stage(self) -> Staging:
        """A new private directory, to be used as a context manager. Raises StorageFull."""
        with _disk_faults():
            return Staging(self._staging / uuid.uuid4().hex)

    def publish(
        self,
        tenant: str,
        name: str,
        staging: Staging,
        spec: AdapterSpec,
        *,
        fine_tuned: bool = False,
        promote: bool = True,
    ) -> tuple[Version, bool]:
        """Make the staged files, which `inspect` described by `spec`, the current content of `name`.

        Durable when it returns. Content that is stored already is not stored twice. Without `promote` a name that
        exists goes on meaning what it means, and the content waits among its versions.

        Returns:
            The version, and whether the name changed.

        Raises:
            AdapterError: the name is not allowed.
            StorageFull: nothing was kept.
        """
        check_name(name, fine_tuned=fine_tuned)
        with _disk_faults():
            _make_durable(staging.path, spec)
            with self._held(spec.digest) as kept:
                if self._remote and not kept:
                    self._remote.put(spec.digest, staging.path)
                with self._changing:
                    return self._publish(tenant, name, staging, spec, promote)

    def _publish(
        self, tenant: str, name: str, staging: Staging, spec: AdapterSpec, promote: bool
    ) -> tuple[Version, bool]:
        before = self._names.get(tenant, {}).get(name)
        known = {version.digest: version for version in before.versions} if before else {}
        current = before is None or promote
        if before and spec.digest in known and (not current or before.shares == {spec.digest: 1.0}):
            return known[spec.digest], False
        path = self._path(spec.digest)
        version = Version(tenant, name, spec.digest, path, time.time(), receipt_of(spec), staged=not current)
        others = tuple(old for old in known.values() if old.digest != spec.digest)
        if before is None:
            after = Pointer((version,))
        elif promote:
            after = replace(before, versions=(version, *others), split=())
        else:
            after = replace(before, versions=(before.current, version, *others[1:]))
        self._place(staging.path, spec.digest)
        self._change(before, after, keep=version)
        return version, True

    def promote(self, tenant: str, name: str, digest: str, expected: Collection[str] | None = None) -> Pointer:
        """Let a name mean one of its versions, named by its digest or enough of its digits.

        Durable when it returns, as are `divide` and `roll_back`. `expected`: the change is made only while the name's
        etag is one of these. Returns what the name means now.

        Raises:
            UnknownAdapter: no such name or version. AmbiguousDigest.
            Moved: the name's etag is another.
            StorageFull: nothing changed.
        """

        def change(pointer: Pointer) -> Pointer:
            return pointer.promoted(pointer.find(digest.removeprefix("sha256:")).digest)

        return self._repoint(tenant, name, change, expected)

    def divide(
        self, tenant: str, name: str, shares: Mapping[str, float], expected: Collection[str] | None = None
    ) -> Pointer:
        """Split a name's requests between its versions: digest -> share. See `Pointer.divided` and `promote`."""
        return self._repoint(tenant, name, lambda pointer: pointer.divided(shares), expected)

    def roll_back(self, tenant: str, name: str, expected: Collection[str] | None = None) -> Pointer:
        """Undo the last change of what a name means: end its split, or else go back to the version before.

        Raises what `promote` does; UnknownAdapter when there is no version before.
        """

        def change(pointer: Pointer) -> Pointer:
            if pointer.split:
                return replace(pointer, split=())
            if pointer.previous is None:
                raise UnknownAdapter(f"'{shorten(name)}' has no version before the current one")
            return pointer.promoted(pointer.previous.digest)

        return self._repoint(tenant, name, change, expected)

    def pin(self, tenant: str, name: str, pinned: bool) -> Pointer:
        """Say whether what the name means, now and later, shall stay on the device. Raises as `promote` does."""
        return self._repoint(tenant, name, lambda pointer: replace(pointer, pinned=pinned), None)

    def delete(self, tenant: str, name: str) -> Version:
        """Take a name away with all its versions; files that are leased go with their last lease.

        Returns the version that was current. Raises UnknownAdapter.
        """
        with _disk_faults(), self._changing:
            pointer = self.pointer(tenant, name)
            self._change(pointer, None)
        return pointer.current

    # --- names, with `_changing` held ------------------------------------------------------------------

    def _repoint(
        self, tenant: str, name: str, change: Callable[[Pointer], Pointer], expected: Collection[str] | None
    ) -> Pointer:
        with _disk_faults(), self._changing:
            before = self.pointer(tenant, name)
            if expected is not None and before.etag not in expected:
                raise Moved(before.etag)
            after = change(before)
            if after != before:
                self._change(before, after, keep=after.current)
            return after

    def _change(self, before: Pointer | None, after: Pointer | None, keep: Version | None = None) -> None:
        """Let a name mean `after`, less what is beyond retention; `keep` is not."""
        owner = (after or before).current  # type: ignore[union-attr]  # one of them is there
        if after is not None and keep is not None:
            after = replace(after, versions=after.retained(self._retain, keep.digest))
        if after is not None and after.pinned:
            others = [pin for name, pin in self._pins.items() if name != (owner.tenant, owner.name)]
            self.check_pins(_answering_all([*others, after]))
        self._kept.save(owner.tenant, owner.name, after)
        self._point(owner.tenant, owner.name, after)
        for version in before.versions if before else ():
            self._remove_unused(version.digest)

    def _point(self, tenant: str, name: str, pointer: Pointer | None) -> None:
        """Let a name mean this from now on."""
        names = self._names.setdefault(tenant, {})
        before = names.get(name)
        if pointer:
            names[name] = pointer
        else:
            del names[name]
        self._pins.pop((tenant, name), None)
        if pointer and pointer.pinned:
            self._pins[tenant, name] = pointer
        with self._counting:
            if pointer:
                self._references.update(version.digest for version in pointer.versions)
                self._answering.update(pointer.shares.keys())
            if before:
                for version in before.versions:
                    _count_down(self._references, version.digest)
                for digest in before.shares:
                    _count_down(self._answering, digest)

    # --- files -----------------------------------------------------------------------------------------

    def _path(self, digest: str) -> Path:
        return self._versions / digest.removeprefix("sha256:")

    @contextmanager
    def _held(self, digest: str) -> Iterator[bool]:
        """Let nobody remove a content that is about to get a name. Tells whether it has one already."""
        with self._counting:
            self._counting.wait_for(lambda: digest not in self._removing)
            self._leases[digest] += 1
            known = digest in self._references
        try:
            yield known
        finally:
            self._let_go(digest)
            self._collect(digest)

    def _let_go(self, digest: str) -> bool:
        """End a lease; whether nobody wants the files any more."""
        with self._counting:
            _count_down(self._leases, digest)
            return digest not in self._leases and digest not in self._references

    def _place(self, staged: Path, digest: str) -> None:
        """Move staged files to where their digest says, unless the same are there."""
        size = _size(staged) if self._remote else 0
        with self._placing:
            with self._counting:
                self._counting.wait_for(lambda: digest not in self._removing)
                if digest in self._stored:
                    return
            staged.rename(self._path(digest))
            with self._counting:
                self._stored[digest] = size
                self._disk_used += size
        sync(self._versions)

    def _fetch_soon(self, digest: str) -> Future[None]:
        with self._counting:
            if digest not in self._fetching:
                self._fetching[digest] = self._fetchers.submit(self._fetch, digest)
            return self._fetching[digest]

    def _fetch(self, digest: str) -> None:
        assert self._remote is not None, "without one, whatever can be leased is here"
        try:
            with _disk_faults(), self.stage() as staging:
                if digest in self._stored:  # since it was asked for
                    return
                self._remote.get(digest, staging.path)
                _check_digest(staging.path, digest)
                _sync_all(staging.path)
                self._place(staging.path, digest)
        finally:
            with self._counting:
                del self._fetching[digest]
        self._collect(digest)  # its name may be gone by now

    @property
    def _excess(self) -> int:
        """Bytes on this disk that are too many."""
        return 0 if self._disk_bytes is None else self._disk_used - self._disk_bytes

    def _collect(self, digest: str) -> None:
        """Remove a version if nobody needs it, and others from this disk as long as it holds too much."""
        self._remove_unused(digest)
        self._trim()

    def _trim(self) -> None:
        if self._excess <= 0:
            return
        with self._counting:
            excess = self._excess
            victims = []
            for candidate, size in self._stored.items():
                if excess <= 0:
                    break
                if candidate not in self._leases and candidate not in self._removing:
                    victims.append(candidate)
                    excess -= size
            for victim in victims:
                self._disk_used -= self._stored.pop(victim)
            self._removing.update(victims)
        for victim in victims:
            self._take_away(victim)

    def _remove_unused(self, digest: str) -> None:
        """Remove a version's files unless a name or a lease holds them."""
        with self._counting:
            if digest in self._references or digest in self._leases or digest in self._removing:
                return
            size = self._stored.pop(digest, None)
            if size is None and self._remote is None:
                return
            self._disk_used -= size or 0
            self._removing.add(digest)
        self._take_away(digest, self._remote)

    def _take_away(self, digest: str, remote: Remote | None = None) -> None:
        """Remove files from here, and from `remote`. By way of staging, so that half a directory is never found."""
        try:
            doomed = self._staging / uuid.uuid4().hex
            with suppress(FileNotFoundError):
                self._path(digest).rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True)
            if remote is not None:
                remote.remove(digest)
        except RemoteUnavailable as fault:
            log.warning("the files of %s, which nobody needs, stay in the object store: %s", digest, fault)
        finally:
            with self._counting:
                self._removing.remove(digest)
                self._counting.notify_all()

    def _recover(self) -> None:
        """Read the names, and remove what no name has: unfinished uploads, and versions placed but never named."""
        for directory in (self._staging, self._versions):
            directory.mkdir(parents=True, exist_ok=True)
        sync(self._versions.parent)
        for left in self._staging.iterdir():
            shutil.rmtree(left)
        here = sorted(self._versions.iterdir(), key=_age) if self._remote else self._versions.iterdir()
        self._stored.update((f"sha256:{path.name}", _size(path) if self._remote else 0) for path in here)
        known: set[str] = set()
        for pointer in self._kept.load(self._path):
            owner = pointer.current
            known.update(version.digest for version in pointer.versions)
            missing = set() if self._remote else {owner.digest, *pointer.shares} - self._stored.keys()
            if missing:  # nothing here does that; an older version would be a lie
                log.error("the files of adapter %s (%s) are missing; it is not served", owner.name, ", ".join(missing))
                continue
            present = tuple(version for version in pointer.versions if self._remote or version.digest in self._stored)
            self._point(owner.tenant, owner.name, replace(pointer, versions=present))
        for digest in self._stored.keys() - known:
            del self._stored[digest]
            self._removing.add(digest)
            self._take_away(digest)  # from here only: another server may be about to name it
        self._disk_used = sum(self._stored.values())
        self._trim()

    # Last, because its name hides the type of that name from what follows.
    def list(self, tenant: str) -> list[Version]:
        """The current version of every name, by name."""
        current = [pointer.current for pointer in list(self._names.get(tenant, {}).values())]
        return sorted(current, key=attrgetter("name"))


def _count_down(counter: Counter[str], key: str) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]


def _answering_all(pointers: Collection[Pointer]) -> list[Version]:
    return list({version.digest: version for pointer in pointers for version in pointer.answering}.values())


def _age(path: Path) -> float:
    return path.stat().st_mtime


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


def _check_digest(directory: Path, digest: str) -> None:
    try:
        found = digest_of(directory)
    except (AdapterError, ValueError, LookupError, TypeError) as fault:
        raise DamagedAdapter(f"the object store's files of {digest} are damaged: {fault}") from None
    if found != digest:
        raise DamagedAdapter(f"the object store's files of {digest} are damaged: their digest is {found}")


def _make_durable(directory: Path, spec: AdapterSpec) -> None:
    """Complete a version's directory with its spec, and see all of it onto the disk."""
    spec.save(directory)
    _sync_all(directory)


def _sync_all(directory: Path) -> None:
    for path in directory.iterdir():
        sync(path)
    sync(directory)


@contextmanager
def _disk_faults() -> Iterator[None]:
    """A full disk, in the system's words or SQLite's, becomes StorageFull."""
    try:
        yield
    except OSError as fault:
        if fault.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull(fault.errno, "the disk is full; nothing was kept") from None
        raise
    except sqlite3.OperationalError as fault:
        if fault.sqlite_errorcode == sqlite3.SQLITE_FULL:
            raise StorageFull(errno.ENOSPC, "the disk is full; nothing was kept") from None
        raise
