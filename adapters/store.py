"""Immutable adapter versions on disk, and the names that point at them.

A version is a directory `versions/<digest>`, complete before it gets that name and never changed after. What points at
it is one row per (tenant, name, digest): the newest row of a name that is not staged is its current version, and a row
of its own says how the name's requests are split, if they are (see `adapters.versions`). Rows change in one
transaction, after the files are safe, so that `kill -9` at any moment leaves the old state or the new one. Knows
nothing of validation: it publishes what `adapters.format.inspect` has passed. One process at a time may use a store.
"""

import errno
import json
import logging
import shutil
import sqlite3
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from types import TracebackType
from typing import Any

from adapters.fields import shorten
from adapters.format import AdapterSpec, sync
from adapters.versions import SHORTEST_PREFIX, AmbiguousDigest, Pointer, UnknownAdapter, Version, check_name

__all__ = [
    "SHORTEST_PREFIX",
    "AdapterStore",
    "AmbiguousDigest",
    "Moved",
    "Pointer",
    "Staging",
    "StorageFull",
    "UnknownAdapter",
    "Version",
    "check_name",
]

RETAINED_VERSIONS = 5

# Write-ahead logging with a full sync: one fsync per change, and what has returned survives a power cut. Safe as long
# as there is one connection, which is why it is handed in.
_SCHEMA = """
PRAGMA journal_mode = WAL;
PRAGMA synchronous = FULL;
CREATE TABLE IF NOT EXISTS adapter_versions (
    sequence INTEGER PRIMARY KEY AUTOINCREMENT,
    tenant TEXT NOT NULL,
    name TEXT NOT NULL,
    digest TEXT NOT NULL,
    created REAL NOT NULL,
    receipt TEXT NOT NULL,
    staged INTEGER NOT NULL DEFAULT 0,
    UNIQUE (tenant, name, digest)
);
CREATE TABLE IF NOT EXISTS adapter_splits (
    tenant TEXT NOT NULL,
    name TEXT NOT NULL,
    split TEXT NOT NULL,
    PRIMARY KEY (tenant, name)
);
"""
_COLUMNS = "tenant, name, digest, created, receipt, staged"
_INSERT = f"INSERT OR REPLACE INTO adapter_versions ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?)"
_REMOVE = "DELETE FROM adapter_versions WHERE tenant = ? AND name = ? AND digest = ?"
_SELECT = f"SELECT {_COLUMNS} FROM adapter_versions ORDER BY sequence DESC"
_SPLIT = "INSERT OR REPLACE INTO adapter_splits (tenant, name, split) VALUES (?, ?, ?)"
_UNITE = "DELETE FROM adapter_splits WHERE tenant = ? AND name = ?"

log = logging.getLogger(__name__)


class StorageFull(OSError):
    """The disk is full, and nothing was kept."""


class Moved(Exception):
    """The name means something else than the caller expected. `etag`: what it means."""

    def __init__(self, etag: str) -> None:
        super().__init__(f"the name means {etag} by now")
        self.etag = etag


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


def receipt_of(spec: AdapterSpec) -> dict[str, Any]:
    """What the owner of an adapter is told. `scaling` is that of most modules, `rows` are per kind, in 2-byte units."""
    [(scaling, _)] = Counter(module.scaling for module in spec.adapted.values()).most_common(1)
    return {
        "rank": spec.rank,
        "scaling": scaling,
        "modules_matched": len(spec.adapted),
        "variants": spec.variants.names,
        "parameters": spec.parameters,
        "bytes": spec.bytes,
        "dtype": spec.dtype,
        "rows": spec.rows(),
        "base_model_name_or_path": spec.config["base_model_name_or_path"],
        "warnings": list(spec.warnings),
    }


class AdapterStore:
    """Names, their versions, and the directories of these.

    Reading (`get`, `versions`, `list`, `lease`) never waits for a disk; `publish` and `delete` do, and belong in a
    worker thread. Creating a store removes what an earlier process left unfinished.

    Args:
        root: directory of its own, made if missing, on one file system.
        database: used by this store alone, in autocommit mode and from any thread
            (`sqlite3.connect(path, isolation_level=None, check_same_thread=False)`).
        retain: how many versions of a name are kept, the current one included.
    """

    def __init__(self, root: Path, database: sqlite3.Connection, *, retain: int = RETAINED_VERSIONS) -> None:
        if retain < 1:
            raise ValueError(f"retain must be at least 1, for the current version, not {retain}")
        self._staging = root / "staging"
        self._versions = root / "versions"
        self._database = database
        self._retain = retain
        # `_changing` is held through disk writes by whoever changes something, `_counting` for moments only.
        self._changing = threading.Lock()
        self._counting = threading.Lock()
        self._names: dict[str, dict[str, Pointer]] = {}  # tenant -> name -> what it means
        self._answering: Counter[str] = Counter()  # digest -> names whose requests it may get
        self._references: Counter[str] = Counter()  # digest -> retained versions of any name that have it
        self._leases: Counter[str] = Counter()
        self._stored: set[str] = set()  # digests whose directory is there
        self._recover()

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

    @contextmanager
    def lease(self, version: Version) -> Iterator[Version]:
        """Keep a version's files while this is open, whatever becomes of its name.

        Raises:
            UnknownAdapter: the version was removed since `get` answered it.
        """
        digest = version.digest
        with self._counting:
            if digest not in self._stored:
                raise UnknownAdapter(f"the version {digest} of '{version.name}' was removed")
            self._leases[digest] += 1
        try:
            yield version
        finally:
            with self._counting:
                _count_down(self._leases, digest)
                unused = digest not in self._leases and digest not in self._references
            if unused:  # a lease may end where nobody can wait, and removing gigabytes takes a while
                threading.Thread(target=self._collect, args=(digest,), name="adapter-collector").start()

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
            with self._changing:
                before = self._names.get(tenant, {}).get(name)
                known = {version.digest: version for version in before.versions} if before else {}
                current = before is None or promote
                if before and spec.digest in known and (not current or before.shares == {spec.digest: 1.0}):
                    return known[spec.digest], False
                path = self._path(spec.digest)
                version = Version(tenant, name, spec.digest, path, time.time(), receipt_of(spec), staged=not current)
                others = tuple(old for old in known.values() if old.digest != spec.digest)
                if before is None or promote:
                    after = Pointer((version, *others))
                else:
                    after = Pointer((before.current, version, *others[1:]), before.split)
                try:
                    self._place(staging.path, spec.digest)
                    self._change(before, after, [version, after.current])
                except BaseException:
                    self._remove_unused(spec.digest)
                    raise
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
                return Pointer(pointer.versions)
            if pointer.previous is None:
                raise UnknownAdapter(f"'{shorten(name)}' has no version before the current one")
            return pointer.promoted(pointer.previous.digest)

        return self._repoint(tenant, name, change, expected)

    def delete(self, tenant: str, name: str) -> Version:
        """Take a name away with all its versions; files that are leased go with their last lease.

        Returns the version that was current. Raises UnknownAdapter.
        """
        with _disk_faults(), self._changing:
            pointer = self.pointer(tenant, name)
            self._change(pointer, None)
        return pointer.current

    # --- with `_changing` held ---------------------------------------------------------------------

    def _path(self, digest: str) -> Path:
        return self._versions / digest.removeprefix("sha256:")

    def _place(self, staged: Path, digest: str) -> None:
        """Move staged files to where their digest says, unless the same are there."""
        if digest not in self._stored:
            staged.rename(self._path(digest))
            with self._counting:
                self._stored.add(digest)
            sync(self._versions)

    def _repoint(
        self, tenant: str, name: str, change: Callable[[Pointer], Pointer], expected: Collection[str] | None
    ) -> Pointer:
        with _disk_faults(), self._changing:
            before = self.pointer(tenant, name)
            if expected is not None and before.etag not in expected:
                raise Moved(before.etag)
            after = change(before)
            if after != before:
                self._change(before, after, [after.current])
            return after

    def _change(self, before: Pointer | None, after: Pointer | None, newest: Sequence[Version] = ()) -> None:
        """Let a name mean `after`, less what is beyond retention. The rows of `newest` become its newest, in order."""
        if after is not None and newest:
            after = Pointer(after.retained(self._retain, newest[0].digest), after.split)
        versions = {version.digest for version in after.versions} if after else set()
        gone = [version for version in before.versions if version.digest not in versions] if before else []
        pointer = after or before
        assert pointer is not None
        owner = pointer.current
        with self._transaction():
            for version in gone:
                self._database.execute(_REMOVE, (version.tenant, version.name, version.digest))
            for version in newest:
                receipt = json.dumps(version.receipt)
                row = (version.tenant, version.name, version.digest, version.created, receipt, version.staged)
                self._database.execute(_INSERT, row)
            if after and after.split:
                self._database.execute(_SPLIT, (owner.tenant, owner.name, json.dumps(after.split)))
            else:
                self._database.execute(_UNITE, (owner.tenant, owner.name))
        self._point(owner.tenant, owner.name, after)
        for version in gone:
            self._remove_unused(version.digest)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._database.execute("COMMIT")
        except BaseException:
            if self._database.in_transaction:  # SQLite may have rolled back by itself
                self._database.execute("ROLLBACK")
            raise

    def _point(self, tenant: str, name: str, pointer: Pointer | None) -> None:
        """Let a name mean this from now on."""
        names = self._names.setdefault(tenant, {})
        before = names.get(name)
        if pointer:
            names[name] = pointer
        else:
            del names[name]
        with self._counting:
            if pointer:
                self._references.update(version.digest for version in pointer.versions)
                self._answering.update(pointer.shares.keys())
            if before:
                for version in before.versions:
                    _count_down(self._references, version.digest)
                for digest in before.shares:
                    _count_down(self._answering, digest)

    def _remove_unused(self, digest: str) -> None:
        """Remove a version's files unless a name or a lease holds them."""
        with self._counting:
            if digest in self._references or digest in self._leases or digest not in self._stored:
                return
            self._stored.remove(digest)
        # By way of staging, so that half a directory is never found under a digest.
        doomed = self._staging / uuid.uuid4().hex
        self._path(digest).rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def _collect(self, digest: str) -> None:
        with self._changing:
            self._remove_unused(digest)

    def _recover(self) -> None:
        """Read the names, and remove what no name has: unfinished uploads, and versions placed but never named."""
        for directory in (self._staging, self._versions):
            directory.mkdir(parents=True, exist_ok=True)
        sync(self._versions.parent)
        for left in self._staging.iterdir():
            shutil.rmtree(left)
        self._database.executescript(_SCHEMA)
        if not any(column[1] == "staged" for column in self._database.execute("PRAGMA table_info(adapter_versions)")):
            self._database.execute("ALTER TABLE adapter_versions ADD COLUMN staged INTEGER NOT NULL DEFAULT 0")
        self._stored = {f"sha256:{path.name}" for path in self._versions.iterdir()}
        rows: dict[tuple[str, str], list[Version]] = {}
        for tenant, name, digest, created, receipt, staged in self._database.execute(_SELECT):
            version = Version(tenant, name, digest, self._path(digest), created, json.loads(receipt), bool(staged))
            rows.setdefault((tenant, name), []).append(version)
        splits = {
            (tenant, name): tuple((digest, share) for digest, share in json.loads(split))
            for tenant, name, split in self._database.execute("SELECT tenant, name, split FROM adapter_splits")
        }
        for (tenant, name), versions in rows.items():
            pointer = Pointer(tuple(versions), splits.get((tenant, name), ()))
            missing = {pointer.current.digest, *pointer.shares} - self._stored
            if missing:  # nothing here does that; an older version would be a lie
                log.error("the files of adapter %s (%s) are missing; it is not served", name, ", ".join(missing))
                continue
            present = tuple(version for version in versions if version.digest in self._stored)
            self._point(tenant, name, Pointer(present, pointer.split))
        for digest in self._stored - {version.digest for versions in rows.values() for version in versions}:
            self._remove_unused(digest)

    # Last, because its name hides the type of that name from what follows.
    def list(self, tenant: str) -> list[Version]:
        """The current version of every name, by name."""
        current = [pointer.current for pointer in list(self._names.get(tenant, {}).values())]
        return sorted(current, key=attrgetter("name"))


def _count_down(counter: Counter[str], key: str) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]


def _make_durable(directory: Path, spec: AdapterSpec) -> None:
    """Complete a version's directory with its spec, and see all of it onto the disk."""
    spec.save(directory)
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
