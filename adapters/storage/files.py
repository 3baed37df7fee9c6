"""The files of adapter versions: complete directories by digest, on this disk while a name or a lease needs them.

A version is a directory `versions/<digest>`, complete before it gets that name and never changed after. With an object
store this disk is a cache: missing files are fetched when they are leased, and unneeded ones are removed from this disk
only. One process at a time may use a directory.
"""

import asyncio
import logging
import shutil
import threading
import uuid
from collections import Counter, OrderedDict
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from adapters.disk import full_disk_named, sync
from adapters.peft_format import record
from adapters.peft_format.directory import AdapterSpec
from adapters.storage import entries, lost, mending
from adapters.storage.lost import Pending
from adapters.storage.versions import DamagedAdapter, Pointer, UnknownAdapter, Version

if TYPE_CHECKING:
    from adapters.storage.remote import RemoteStore

_FETCHERS = 8  # versions fetched at once

log = logging.getLogger(__name__)


class VersionFiles:
    """The directories of versions, and their leases.

    `lease` and `has` never wait for a disk; the other methods wait for the disk or the network. Creating one removes
    uploads that an earlier process left unfinished; `settle` then removes the other unwanted files.

    Args:
        root: directory of its own, made if missing, on one file system.
        remote: the object store of the files, if there is one.
        disk_bytes: with `remote`, the bytes allowed on this disk; leased files may exceed them.
    """

    def __init__(self, root: Path, remote: "RemoteStore | None" = None, disk_bytes: int | None = None) -> None:
        self._staging = root / "staging"
        self._versions = root / "versions"
        self._remote = remote
        self._disk_bytes = disk_bytes
        # `_placing` is held while a directory gets its name, `_counting` only briefly.
        self._placing = threading.Lock()
        self._counting = threading.Condition()
        self._wanted: Counter[str] = Counter()  # digest -> number of names with it
        self._leases: Counter[str] = Counter()
        self._stored: OrderedDict[str, int] = OrderedDict()  # digest -> bytes here, the least recently leased first
        self._disk_used = 0  # bytes of `_stored`; like them, counted only with a remote
        self._removing: set[str] = set()  # digests of versions being removed
        self._fetching: dict[str, Future[None]] = {}
        self._mending = threading.Lock()
        self._beyond_mending: dict[str, str] = {}  # digest -> the fault of its files
        self._pending = Pending(root)  # marks of versions being added or removed
        self._aside = root.parent / lost.LOST_AND_FOUND / "versions"
        self._fetchers = ThreadPoolExecutor(_FETCHERS, thread_name_prefix="adapter-fetcher")
        self._closed = False
        self._recover()

    def close(self) -> None:
        """Stop fetching, so that the process can exit."""
        self._closed = True
        self._fetchers.shutdown(wait=False, cancel_futures=True)

    # --- names and leases ----------------------------------------------------------------------------

    def path(self, digest: str) -> Path:
        """The directory of a version's files, whether or not they are there."""
        return self._versions / _key(digest)

    def want(self, more: Collection[str], less: Collection[str]) -> None:
        """Count these digests as wanted once more, and those in `less` once less. Removes nothing."""
        with self._counting:
            self._wanted.update(more)
            for digest in less:
                _count_down(self._wanted, digest)

    @contextmanager
    def renaming(self, before: Pointer | None, after: Pointer | None) -> Iterator[None]:
        """Wrap the change of a name's pointer: mark it as pending, then update the entries in the versions'
        directories."""
        if self._remote is not None:  # the names are there, too
            yield
            return
        concerned = {version.digest for pointer in (before, after) if pointer for version in pointer.versions}
        self._pending.mark(*map(_key, concerned))
        try:
            yield
        finally:  # versions without a name keep their mark until they are removed
            self._pending.clear(*(_key(digest) for digest in concerned & self._wanted.keys()))
        entries.note(before, after)

    def complete(self, pointer: Pointer) -> None:
        """Write the entries of a name that are missing from its versions' directories."""
        if self._remote is None:
            entries.complete(pointer)

    def has(self, digest: str) -> bool:
        """Whether the files are on this disk and not damaged beyond mending. A lease keeps them there."""
        return digest in self._stored and digest not in self._beyond_mending

    def obtainable(self, digest: str) -> bool:
        """Whether the files are on this disk or can be fetched."""
        return self._remote is not None or self.has(digest)

    @contextmanager
    def lease(self, version: Version) -> Iterator[Version]:
        """Keep a version's files while the context is open, even if its name changes or is deleted.

        Raises:
            UnknownAdapter: the version was removed.
        """
        digest = version.digest
        with self._counting:
            here = digest in self._stored
            if not here and not (self._remote and digest in self._wanted):
                raise UnknownAdapter(f"the version {digest} of '{version.name}' was removed")
            self._leases[digest] += 1
            if here and self._remote:
                self._stored.move_to_end(digest)
        try:
            yield version
        finally:
            unused = self._let_go(digest)
            # In a thread: a lease may end on the event loop, and removing gigabytes takes a while.
            if unused or self._excess > 0:
                threading.Thread(target=self._collect, args=(digest,), name="adapter-collector").start()

    async def ready(self, digest: str) -> None:
        """Wait until the files of a leased version are on this disk.

        Raises:
            RemoteUnavailable: they cannot be fetched now.
            DamagedAdapter: the object store's files do not match the digest.
            StorageFull: there is no room for them.
        """
        if digest in self._beyond_mending:
            raise DamagedAdapter(self._beyond_mending[digest])
        if not self.has(digest):
            # Several callers may wait for one fetch: a cancelled one must not cancel it.
            await asyncio.shield(asyncio.wrap_future(self._fetch_soon(digest)))

    # --- damage --------------------------------------------------------------------------------------

    def mend(self, digest: str) -> None:
        """Check all of a leased version's files against their record, and rebuild or fetch again the damaged ones.

        Raises DamagedAdapter when they cannot be mended (the version is not served until uploaded again),
        RemoteUnavailable.
        """
        directory = self.path(digest)
        with self._mending, full_disk_named():
            try:
                record.check(directory)
                return
            except record.DamagedFile as fault:
                log.warning("%s: %s", digest, fault)
            try:
                mending.mend(directory, digest)
            except DamagedAdapter as fault:
                if self._remote is None:
                    self._beyond_mending[digest] = str(fault)
                    raise
                with self.stage() as staging:
                    self._receive(digest, staging)
                    mending.replace_files(staging, directory)
            log.warning("%s: mended", digest)

    def repair(self, staging: Path, spec: AdapterSpec) -> None:
        """If this version is on the disk and damaged, replace its files by the staged ones, which are whole."""
        with self._mending:
            if spec.digest not in self._stored:
                return
            try:
                record.check(self.path(spec.digest))
            except record.DamagedFile as fault:
                spec.save(staging)
                mending.replace_files(staging, self.path(spec.digest))
                log.warning("%s: %s; replaced by what was uploaded", spec.digest, fault)
            self._beyond_mending.pop(spec.digest, None)

    # --- adding --------------------------------------------------------------------------------------

    @contextmanager
    def stage(self) -> Iterator[Path]:
        """A private directory to write an adapter's files into, removed on exit unless placed. Raises StorageFull."""
        with full_disk_named():
            for directory in (self._staging, self._versions):  # `_recover` may have failed to make them
                directory.mkdir(parents=True, exist_ok=True)
            staging = self._staging / uuid.uuid4().hex
            staging.mkdir(mode=0o700)
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    @contextmanager
    def coming(self, staging: Path, spec: AdapterSpec) -> Iterator[None]:
        """Complete staged files, described by `spec`, and make them durable, in the object store if there is one.

        `place` them before the context ends.
        """
        spec.save(staging)
        _sync_all(staging)
        with self._counting:
            self._counting.wait_for(lambda: spec.digest not in self._removing)
            self._leases[spec.digest] += 1
            kept = spec.digest in self._wanted and spec.digest not in self._beyond_mending
        try:
            if self._remote:
                self._remote.put(spec.digest, staging, known=kept)
            self.repair(staging, spec)
            yield
        finally:
            self._let_go(spec.digest)
            self._collect(spec.digest)

    def place(self, staged: Path, digest: str) -> None:
        """Move staged files to the directory of their digest, unless it exists already."""
        size = _size(staged) if self._remote else 0
        with self._placing:
            with self._counting:
                self._counting.wait_for(lambda: digest not in self._removing)
                if digest in self._stored:
                    return
            if self._remote is None:
                self._pending.mark(_key(digest))
            staged.rename(self.path(digest))
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
            with full_disk_named(), self.stage() as staging:
                if digest in self._stored:  # placed in the meantime
                    return
                self._receive(digest, staging)
                _sync_all(staging)
                self.place(staging, digest)
        finally:
            with self._counting:
                del self._fetching[digest]
        self._collect(digest)  # perhaps unwanted in the meantime

    def _receive(self, digest: str, directory: Path) -> None:
        """Fetch a version from the object store and verify it. Raises DamagedAdapter."""
        assert self._remote is not None
        self._remote.get(digest, directory)
        try:
            mending.complete(directory, mending.verified(directory, digest))
        except DamagedAdapter as fault:
            raise DamagedAdapter(f"in the object store, {fault}") from None

    # --- removing ------------------------------------------------------------------------------------

    def remove_unused(self, digest: str) -> None:
        """Remove a version's files from this disk unless a name or a lease needs them."""
        with self._counting:
            if digest in self._wanted or digest in self._leases or digest in self._removing:
                return
            size = self._stored.pop(digest, None)
            if size is None:
                return
            self._disk_used -= size
            self._removing.add(digest)
        self._take_away(digest)

    async def remove_orphans(self, seconds: float) -> int:
        """Remove versions from the object store that have no name there and no file written in the last `seconds`;
        return the count.

        Raises RemoteUnavailable.
        """
        if self._remote is None:
            return 0
        work = self._fetchers.submit(self._remote.remove_orphans, seconds, self._held)
        return await asyncio.wrap_future(work)

    def _held(self, digest: str) -> bool:
        """Whether this server needs a version's files in the object store."""
        return self._closed or digest in self._wanted or digest in self._leases or digest in self._fetching

    def settle(self, known: Collection[str], database: str) -> None:
        """Once, at start: remove the versions not in `known`, and those beyond the allowed bytes.

        With an object store, unknown versions are removed from this disk only: another server may be about to name
        them.
        """
        unknown = [path for path in lost.entries(self._versions) if f"sha256:{path.name}" not in known]
        for path in unknown:
            self._stored.pop(f"sha256:{path.name}", None)
            if self._remote is not None:
                lost.remove(path)
        if self._remote is None:
            lost.sort_out(unknown, self._pending, self._aside, database)
        self._disk_used = sum(self._stored.values())
        self._trim()

    def _let_go(self, digest: str) -> bool:
        """End a lease; return whether nothing needs the files any more."""
        with self._counting:
            _count_down(self._leases, digest)
            return digest not in self._leases and digest not in self._wanted

    @property
    def _excess(self) -> int:
        """Bytes on this disk beyond the allowed ones."""
        return 0 if self._disk_bytes is None else self._disk_used - self._disk_bytes

    def _collect(self, digest: str) -> None:
        """Remove a version if it is unused, then others while this disk holds too many bytes."""
        self.remove_unused(digest)
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

    def _take_away(self, digest: str) -> None:
        """Remove files from this disk by way of staging, so that half a directory is never found."""
        try:
            doomed = self._staging / uuid.uuid4().hex
            with suppress(FileNotFoundError):
                self.path(digest).rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True)
        finally:
            with self._counting:
                self._removing.remove(digest)
                self._counting.notify_all()
            self._pending.clear(_key(digest))

    def _recover(self) -> None:
        """Remove unfinished uploads, and list the versions on this disk."""
        for directory in (self._staging, self._versions):
            lost.directory_at(directory, self._aside.parent)
        with suppress(OSError):  # a full disk is reported by the next upload
            sync(self._versions.parent)
        for left in lost.entries(self._staging):
            lost.remove(left)
        here = sorted((path for path in lost.entries(self._versions) if path.is_dir()), key=_age)
        self._stored.update((f"sha256:{path.name}", _size(path) if self._remote else 0) for path in here)


def _count_down(counter: Counter[str], key: str) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]


def _age(path: Path) -> float:
    return path.stat().st_mtime


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


def _key(digest: str) -> str:
    return digest.removeprefix("sha256:")


def _sync_all(directory: Path) -> None:
    for path in directory.iterdir():
        sync(path)
    sync(directory)
