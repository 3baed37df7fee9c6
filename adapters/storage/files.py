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

from adapters.disk import raising_storage_full, sync
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
    uploads that an earlier process left unfinished; `remove_unknown` then removes the other unwanted files.

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
        # `_place_lock` is held while a directory gets its name, `_count_lock` only briefly.
        self._place_lock = threading.Lock()
        self._count_lock = threading.Condition()
        self._name_counts: Counter[str] = Counter()  # digest -> number of names with it
        self._leases: Counter[str] = Counter()
        self._stored: OrderedDict[str, int] = OrderedDict()  # digest -> bytes here, the least recently leased first
        self._disk_used = 0  # bytes of `_stored`; like them, counted only with a remote
        self._removing: set[str] = set()  # digests of versions being removed
        self._fetching: dict[str, Future[None]] = {}
        self._mend_lock = threading.Lock()
        self._unmendable: dict[str, str] = {}  # digest -> the fault of its files
        self._pending = Pending(root)  # marks of versions being added or removed
        self._lost_and_found = root.parent / lost.LOST_AND_FOUND / "versions"
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
        return self._versions / _hex_digits(digest)

    def count_names(self, added: Collection[str], removed: Collection[str]) -> None:
        """Count one name more for each digest in `added`, and one less for each in `removed`. Removes no files."""
        with self._count_lock:
            self._name_counts.update(added)
            for digest in removed:
                _decrement(self._name_counts, digest)

    @contextmanager
    def changing_pointer(self, before: Pointer | None, after: Pointer | None) -> Iterator[None]:
        """Wrap the change of a name's pointer: mark it as pending, then update the entries in the versions'
        directories."""
        if self._remote is not None:  # the names are there, too
            yield
            return
        digests = {version.digest for pointer in (before, after) if pointer for version in pointer.versions}
        self._pending.mark(*map(_hex_digits, digests))
        try:
            yield
        finally:  # versions without a name keep their mark until they are removed
            self._pending.clear(*(_hex_digits(digest) for digest in digests & self._name_counts.keys()))
        entries.update(before, after)

    def write_missing_entries(self, pointer: Pointer) -> None:
        """Write the entries of a name that are missing from its versions' directories."""
        if self._remote is None:
            entries.write_missing(pointer)

    def has(self, digest: str) -> bool:
        """Whether the files are on this disk and not damaged beyond mending. A lease keeps them there."""
        return digest in self._stored and digest not in self._unmendable

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
        with self._count_lock:
            is_stored = digest in self._stored
            if not is_stored and not (self._remote and digest in self._name_counts):
                raise UnknownAdapter(f"the version {digest} of '{version.name}' was removed")
            self._leases[digest] += 1
            if is_stored and self._remote:
                self._stored.move_to_end(digest)
        try:
            yield version
        finally:
            unused = self._end_lease(digest)
            # In a thread: a lease may end on the event loop, and removing gigabytes takes a while.
            if unused or self._excess > 0:
                threading.Thread(target=self._collect, args=(digest,), name="adapter-collector").start()

    async def wait_until_ready(self, digest: str) -> None:
        """Wait until the files of a leased version are on this disk.

        Raises:
            RemoteUnavailable: they cannot be fetched now.
            DamagedAdapter: the object store's files do not match the digest.
            StorageFull: there is no room for them.
        """
        if digest in self._unmendable:
            raise DamagedAdapter(self._unmendable[digest])
        if not self.has(digest):
            # Several callers may wait for one fetch: a cancelled one must not cancel it.
            await asyncio.shield(asyncio.wrap_future(self._submit_fetch(digest)))

    # --- damage --------------------------------------------------------------------------------------

    def mend(self, digest: str) -> None:
        """Check all of a leased version's files against their record, and rebuild or fetch again the damaged ones.

        Raises DamagedAdapter when they cannot be mended (the version is not served until uploaded again),
        RemoteUnavailable.
        """
        directory = self.path(digest)
        with self._mend_lock, raising_storage_full():
            try:
                record.check(directory)
                return
            except record.DamagedFile as fault:
                log.warning("%s: %s", digest, fault)
            try:
                mending.mend(directory, digest)
            except DamagedAdapter as fault:
                if self._remote is None:
                    self._unmendable[digest] = str(fault)
                    raise
                with self.stage() as staging:
                    self._fetch_verified(digest, staging)
                    mending.replace_files(staging, directory)
            log.warning("%s: mended", digest)

    def replace_damaged(self, staging: Path, spec: AdapterSpec) -> None:
        """If this version is on the disk and damaged, replace its files by the staged ones, which are whole."""
        with self._mend_lock:
            if spec.digest not in self._stored:
                return
            try:
                record.check(self.path(spec.digest))
            except record.DamagedFile as fault:
                spec.save(staging)
                mending.replace_files(staging, self.path(spec.digest))
                log.warning("%s: %s; replaced by the uploaded files", spec.digest, fault)
            self._unmendable.pop(spec.digest, None)

    # --- adding --------------------------------------------------------------------------------------

    @contextmanager
    def stage(self) -> Iterator[Path]:
        """A private directory to write an adapter's files into, removed on exit unless placed. Raises StorageFull."""
        with raising_storage_full():
            for directory in (self._staging, self._versions):  # `_recover` may have failed to make them
                directory.mkdir(parents=True, exist_ok=True)
            staging = self._staging / uuid.uuid4().hex
            staging.mkdir(mode=0o700)
        try:
            yield staging
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    @contextmanager
    def persisting(self, staging: Path, spec: AdapterSpec) -> Iterator[None]:
        """Complete staged files, described by `spec`, and make them durable, in the object store if there is one.

        `place` them before the context ends.
        """
        spec.save(staging)
        _sync_all(staging)
        with self._count_lock:
            self._count_lock.wait_for(lambda: spec.digest not in self._removing)
            self._leases[spec.digest] += 1
            named = spec.digest in self._name_counts and spec.digest not in self._unmendable
        try:
            if self._remote:
                self._remote.put(spec.digest, staging, named=named)
            self.replace_damaged(staging, spec)
            yield
        finally:
            self._end_lease(spec.digest)
            self._collect(spec.digest)

    def place(self, staged: Path, digest: str) -> None:
        """Move staged files to the directory of their digest, unless it exists already."""
        size = _size(staged) if self._remote else 0
        with self._place_lock:
            with self._count_lock:
                self._count_lock.wait_for(lambda: digest not in self._removing)
                if digest in self._stored:
                    return
            if self._remote is None:
                self._pending.mark(_hex_digits(digest))
            staged.rename(self.path(digest))
            with self._count_lock:
                self._stored[digest] = size
                self._disk_used += size
        sync(self._versions)

    def _submit_fetch(self, digest: str) -> Future[None]:
        with self._count_lock:
            if digest not in self._fetching:
                self._fetching[digest] = self._fetchers.submit(self._fetch, digest)
            return self._fetching[digest]

    def _fetch(self, digest: str) -> None:
        assert self._remote is not None, "without one, whatever can be leased is here"
        try:
            with raising_storage_full(), self.stage() as staging:
                if digest in self._stored:  # placed in the meantime
                    return
                self._fetch_verified(digest, staging)
                _sync_all(staging)
                self.place(staging, digest)
        finally:
            with self._count_lock:
                del self._fetching[digest]
        self._collect(digest)  # perhaps unwanted in the meantime

    def _fetch_verified(self, digest: str, directory: Path) -> None:
        """Fetch a version from the object store and verify it. Raises DamagedAdapter."""
        assert self._remote is not None
        self._remote.get(digest, directory)
        try:
            mending.write_rows_and_record(directory, mending.verified_spec(directory, digest))
        except DamagedAdapter as fault:
            raise DamagedAdapter(f"in the object store, {fault}") from None

    # --- removing ------------------------------------------------------------------------------------

    def remove_unused(self, digest: str) -> None:
        """Remove a version's files from this disk unless a name or a lease needs them."""
        with self._count_lock:
            if digest in self._name_counts or digest in self._leases or digest in self._removing:
                return
            size = self._stored.pop(digest, None)
            if size is None:
                return
            self._disk_used -= size
            self._removing.add(digest)
        self._remove_files(digest)

    async def remove_orphans(self, seconds: float) -> int:
        """Remove versions from the object store that have no name there and no file written in the last `seconds`;
        return the count.

        Raises RemoteUnavailable.
        """
        if self._remote is None:
            return 0
        work = self._fetchers.submit(self._remote.remove_orphans, seconds, self._is_needed)
        return await asyncio.wrap_future(work)

    def _is_needed(self, digest: str) -> bool:
        """Whether this server needs a version's files in the object store."""
        return self._closed or digest in self._name_counts or digest in self._leases or digest in self._fetching

    def remove_unknown(self, known: Collection[str], database: str) -> None:
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
            lost.remove_or_set_aside(unknown, self._pending, self._lost_and_found, database)
        self._disk_used = sum(self._stored.values())
        self._trim()

    def _end_lease(self, digest: str) -> bool:
        """End a lease; return whether nothing needs the files any more."""
        with self._count_lock:
            _decrement(self._leases, digest)
            return digest not in self._leases and digest not in self._name_counts

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
        with self._count_lock:
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
            self._remove_files(victim)

    def _remove_files(self, digest: str) -> None:
        """Remove files from this disk by way of staging, so that half a directory is never found."""
        try:
            doomed = self._staging / uuid.uuid4().hex
            with suppress(FileNotFoundError):
                self.path(digest).rename(doomed)
                shutil.rmtree(doomed, ignore_errors=True)
        finally:
            with self._count_lock:
                self._removing.remove(digest)
                self._count_lock.notify_all()
            self._pending.clear(_hex_digits(digest))

    def _recover(self) -> None:
        """Remove unfinished uploads, and list the versions on this disk."""
        for directory in (self._staging, self._versions):
            lost.ensure_directory(directory, self._lost_and_found.parent)
        with suppress(OSError):  # a full disk is reported by the next upload
            sync(self._versions.parent)
        for leftover in lost.entries(self._staging):
            lost.remove(leftover)
        present = sorted((path for path in lost.entries(self._versions) if path.is_dir()), key=_modified_at)
        self._stored.update((f"sha256:{path.name}", _size(path) if self._remote else 0) for path in present)


def _decrement(counter: Counter[str], key: str) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]


def _modified_at(path: Path) -> float:
    return path.stat().st_mtime


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


def _hex_digits(digest: str) -> str:
    return digest.removeprefix("sha256:")


def _sync_all(directory: Path) -> None:
    for path in directory.iterdir():
        sync(path)
    sync(directory)
