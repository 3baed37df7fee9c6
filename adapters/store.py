"""Immutable adapter versions on disk, and the names that point at them.

A version is a directory `versions/<digest>`, complete before it gets that name and never changed after. What points at
it is one row per (tenant, name, digest); the newest row of a name is what the name means. Rows change in one
transaction, after the files are safe, so that `kill -9` at any moment leaves the old state or the new one. Knows
nothing of validation: it publishes what `adapters.format.inspect` has passed. One process at a time may use a store.
"""

import errno
import json
import logging
import re
import shutil
import sqlite3
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from types import TracebackType
from typing import Any

from adapters.fields import AdapterError, shorten
from adapters.format import AdapterSpec, sync

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
FINE_TUNED_NAME = re.compile(r"ft:[A-Za-z0-9._/-]{1,256}(:[A-Za-z0-9._-]{0,128}){1,4}")
SHORTEST_PREFIX = 8
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
    UNIQUE (tenant, name, digest)
);
"""
_INSERT = "INSERT OR REPLACE INTO adapter_versions (tenant, name, digest, created, receipt) VALUES (?, ?, ?, ?, ?)"
_PRUNE = """
DELETE FROM adapter_versions WHERE tenant = ? AND name = ? AND sequence NOT IN (
    SELECT sequence FROM adapter_versions WHERE tenant = ? AND name = ? ORDER BY sequence DESC LIMIT ?
)
"""
_SELECT = "SELECT tenant, name, digest, created, receipt FROM adapter_versions ORDER BY sequence DESC"

log = logging.getLogger(__name__)


class UnknownAdapter(LookupError):
    """No such name, or no such version of it."""


class AmbiguousDigest(LookupError):
    """Several versions of the name have digests that begin so."""


class StorageFull(OSError):
    """The disk is full, and nothing was kept."""


@dataclass(frozen=True)
class Version:
    """One content of one name.

    Attributes:
        digest: "sha256:" and 64 hex digits.
        path: directory with the adapter's files, there as long as the version is retained or leased.
        created: unix time at which the name took this content.
        receipt: what `receipt_of` says of it.
    """

    tenant: str
    name: str
    digest: str
    path: Path
    created: float
    receipt: dict[str, Any]


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


def check_name(name: str, *, fine_tuned: bool = False) -> None:
    """Raises AdapterError unless an adapter may have this name; with `fine_tuned` that is `ft:<base>:<suffix>:...`."""
    if fine_tuned:
        if not FINE_TUNED_NAME.fullmatch(name):
            raise AdapterError(f"'{shorten(name)}' is not the name of a fine-tuned adapter", "name", "invalid_name")
    elif name.startswith("ft:"):
        raise AdapterError("names that begin with 'ft:' belong to fine-tunes", "name", "invalid_name")
    elif not NAME.fullmatch(name):
        raise AdapterError(
            f"'{shorten(name)}' is not a valid name: 1 to 128 of A-Z a-z 0-9 . _ -, the first a letter or digit",
            "name",
            "invalid_name",
        )


def receipt_of(spec: AdapterSpec) -> dict[str, Any]:
    """What the owner of an adapter is told. `scaling` is that of most modules, `rows` are per kind, in 2-byte units."""
    [(scaling, _)] = Counter(module.scaling for module in spec.modules.values()).most_common(1)
    return {
        "rank": spec.rank,
        "scaling": scaling,
        "modules_matched": len(spec.modules),
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
        self._names: dict[str, dict[str, tuple[Version, ...]]] = {}  # tenant -> name -> versions, the current one first
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
        versions = self.versions(tenant, name)
        if digest_prefix is None:
            return versions[0]
        if len(digest_prefix) < SHORTEST_PREFIX:
            raise UnknownAdapter(f"a version is named by at least {SHORTEST_PREFIX} digits of its digest")
        matching = [version for version in versions if version.digest.startswith(f"sha256:{digest_prefix.lower()}")]
        if not matching:
            raise UnknownAdapter(f"'{shorten(name)}' has no version {shorten(digest_prefix)}")
        if len(matching) > 1:
            raise AmbiguousDigest(f"'{name}' has {len(matching)} versions that begin with {digest_prefix}")
        return matching[0]

    def versions(self, tenant: str, name: str) -> list[Version]:
        """The retained versions of a name, the current one first. Raises UnknownAdapter."""
        try:
            return list(self._names[tenant][name])
        except KeyError:
            raise UnknownAdapter(f"there is no adapter '{shorten(name)}'") from None

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
        self, tenant: str, name: str, staging: Staging, spec: AdapterSpec, *, fine_tuned: bool = False
    ) -> tuple[Version, bool]:
        """Make the staged files, which `inspect` described by `spec`, the current content of `name`.

        Durable when it returns. Content that is stored already is not stored twice.

        Returns:
            The version, and whether the name's content changed.

        Raises:
            AdapterError: the name is not allowed.
            StorageFull: nothing was kept.
        """
        check_name(name, fine_tuned=fine_tuned)
        with _disk_faults():
            _make_durable(staging.path, spec)
            with self._changing:
                before = self._names.get(tenant, {}).get(name, ())
                if before and before[0].digest == spec.digest:
                    return before[0], False
                try:
                    self._place(staging.path, spec.digest)
                    version = Version(tenant, name, spec.digest, self._path(spec.digest), time.time(), receipt_of(spec))
                    self._insert(version)
                except BaseException:
                    self._remove_unused(spec.digest)
                    raise
                after = (version, *(old for old in before if old.digest != spec.digest))
                self._point(tenant, name, after[: self._retain])
                for old in after[self._retain :]:
                    self._remove_unused(old.digest)
        return version, True

    def delete(self, tenant: str, name: str) -> Version:
        """Take a name away with all its versions; files that are leased go with their last lease.

        Returns the version that was current. Raises UnknownAdapter.
        """
        with _disk_faults(), self._changing:
            versions = self.versions(tenant, name)
            self._database.execute("DELETE FROM adapter_versions WHERE tenant = ? AND name = ?", (tenant, name))
            self._point(tenant, name, ())
            for version in versions:
                self._remove_unused(version.digest)
        return versions[0]

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

    def _insert(self, version: Version) -> None:
        """Make a version its name's newest row, and drop the rows beyond retention, in one transaction."""
        owner = (version.tenant, version.name)
        self._database.execute("BEGIN IMMEDIATE")
        try:
            row = (*owner, version.digest, version.created, json.dumps(version.receipt))
            self._database.execute(_INSERT, row)
            self._database.execute(_PRUNE, (*owner, *owner, self._retain))
            self._database.execute("COMMIT")
        except BaseException:
            if self._database.in_transaction:  # SQLite may have rolled back by itself
                self._database.execute("ROLLBACK")
            raise

    def _point(self, tenant: str, name: str, versions: tuple[Version, ...]) -> None:
        """Let a name have these versions from now on."""
        names = self._names.setdefault(tenant, {})
        before = names.get(name, ())
        if versions:
            names[name] = versions
        else:
            del names[name]
        with self._counting:
            self._references.update(version.digest for version in versions)
            for version in before:
                _count_down(self._references, version.digest)

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
        self._stored = {f"sha256:{path.name}" for path in self._versions.iterdir()}
        rows: dict[tuple[str, str], list[Version]] = {}
        for tenant, name, digest, created, receipt in self._database.execute(_SELECT):
            version = Version(tenant, name, digest, self._path(digest), created, json.loads(receipt))
            rows.setdefault((tenant, name), []).append(version)
        for (tenant, name), versions in rows.items():
            if versions[0].digest not in self._stored:  # nothing here does that; an older version would be a lie
                log.error("the files of adapter %s (%s) are missing; it is not served", name, versions[0].digest)
                continue
            self._point(tenant, name, tuple(version for version in versions if version.digest in self._stored))
        for digest in self._stored - {version.digest for versions in rows.values() for version in versions}:
            self._remove_unused(digest)

    # Last, because its name hides the type of that name from what follows.
    def list(self, tenant: str) -> list[Version]:
        """The current version of every name, by name."""
        current = [versions[0] for versions in list(self._names.get(tenant, {}).values())]
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
