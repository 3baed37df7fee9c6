"""The pointers of all names, in a table of one local database.

The store reads all of them once. A change is a function of a name's `Pointer`. `adapters.storage.remote` keeps them
beside the files in an object store instead.
"""

import json
import logging
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from adapters.peft_format.directory import AdapterSpec
from adapters.peft_format.record import DamagedFile
from adapters.storage.database import BUSY_SECONDS, Database, sql_migration
from adapters.storage.receipt import receipt_of
from adapters.storage.versions import Locate, Pointer, Version

_SCHEMA = """
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
CREATE TABLE IF NOT EXISTS adapter_pins (
    tenant TEXT NOT NULL,
    name TEXT NOT NULL,
    PRIMARY KEY (tenant, name)
)
"""
_COLUMNS = "tenant, name, digest, created, receipt, staged"
_INSERT = f"INSERT INTO adapter_versions ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?)"
_SELECT = f"SELECT {_COLUMNS} FROM adapter_versions ORDER BY sequence DESC"
_TABLES = ("adapter_versions", "adapter_splits", "adapter_pins", "adapter_shared")


def _add_staged(database: sqlite3.Connection) -> None:
    """Add the column missing from tables made before versions could be staged; their layouts have no number."""
    if not any(column[1] == "staged" for column in database.execute("PRAGMA table_info(adapter_versions)")):
        database.execute("ALTER TABLE adapter_versions ADD COLUMN staged INTEGER NOT NULL DEFAULT 0")


_ADD_SHARED = """
CREATE TABLE IF NOT EXISTS adapter_shared (
    tenant TEXT NOT NULL, name TEXT NOT NULL, readers TEXT NOT NULL, PRIMARY KEY (tenant, name))
"""
_MIGRATIONS = (sql_migration(_SCHEMA), _add_staged, sql_migration(_ADD_SHARED))

Apply = Callable[[Pointer | None], Pointer | None]  # a name's pointer -> its new pointer; None: no such name
Split = tuple[tuple[str, float], ...]

log = logging.getLogger(__name__)


class Names(Protocol):
    """The durable pointers of all names.

    Attributes:
        title: the place where they are written, for log lines.
        unreadable: digests of versions with rows that `load` could not read.
    """

    title: str
    unreadable: set[str]

    def load(self, locate: Locate) -> Iterator[Pointer]:
        """All pointers as last saved; unreadable ones are logged and left out."""

    def change(self, tenant: str, name: str, last_seen: Pointer | None, apply: Apply, locate: Locate) -> Pointer | None:
        """Replace a name's pointer by `apply` of it; `last_seen` is the pointer as this process last saw it.

        Durable when it returns the new pointer. `apply` may be called several times; its errors are raised.
        """


class LocalNames:
    """`Names` in SQLite.

    A row per version of a name: the newest is the current one. Splits, pins and readers have tables of their own.

    Args:
        path: the database file; its directory must exist. Made or migrated.
        busy_seconds: how long a change waits for another process.

    Raises the errors of `Database`.
    """

    def __init__(self, path: Path, busy_seconds: float = BUSY_SECONDS) -> None:
        self.database = Database(path, _MIGRATIONS, busy_seconds)
        self.title = path.name
        self.unreadable: set[str] = set()

    def load(self, locate: Locate) -> Iterator[Pointer]:
        with self.database.reading() as connection:
            rows = connection.execute(_SELECT).fetchall()
            splits = connection.execute("SELECT tenant, name, split FROM adapter_splits").fetchall()
            pins = {tuple(row) for row in connection.execute("SELECT tenant, name FROM adapter_pins")}
            shared = connection.execute("SELECT tenant, name, readers FROM adapter_shared").fetchall()
        found: dict[tuple[str, str], list[Version | None]] = {}
        for row in rows:
            found.setdefault((row["tenant"], row["name"]), []).append(self._version(row, locate))
        divided = {(row["tenant"], row["name"]): self._split(row) for row in splits}
        readers = {(row["tenant"], row["name"]): self._readers(row) for row in shared}
        for owner, versions in found.items():
            readable = tuple(version for version in versions if version is not None)
            if versions[0] is not None:  # serving an older one would be wrong
                split = _complete_split(divided.get(owner, ()), readable)
                yield Pointer(readable, split, owner in pins, readers.get(owner, ()))
            else:
                self.unreadable.update(version.digest for version in readable)
                log.error("adapter %s is not served: the row of its current version cannot be read", owner[1])

    def _version(self, row: sqlite3.Row, locate: Locate) -> Version | None:
        tenant, name, digest, created, receipt, staged = row
        try:
            try:
                found = json.loads(receipt)
                _ = found["rows"]
            except (ValueError, TypeError, LookupError):
                found = receipt_of(AdapterSpec.read(locate(digest)))
                log.warning("%s: the receipt of adapter %s could not be read and was rebuilt", self.title, name)
            return Version(tenant, name, digest, locate(digest), float(created), found, bool(staged))
        except (DamagedFile, ValueError, TypeError, LookupError, AttributeError) as fault:
            log.error("%s: a row of adapter %s cannot be read: %s", self.title, name, fault)
            if isinstance(digest, str):
                self.unreadable.add(digest)
            return None

    def _split(self, row: sqlite3.Row) -> Split:
        try:
            return tuple((digest, float(share)) for digest, share in json.loads(row["split"]))
        except (ValueError, TypeError) as fault:
            log.error("%s: the split of adapter %s cannot be read: %s", self.title, row["name"], fault)
            return ()

    def _readers(self, row: sqlite3.Row) -> tuple[str, ...]:
        try:
            return tuple(str(reader) for reader in json.loads(row["readers"]))
        except (ValueError, TypeError) as fault:
            log.error("%s: the readers of adapter %s cannot be read: %s", self.title, row["name"], fault)
            return ()

    def change(self, tenant: str, name: str, last_seen: Pointer | None, apply: Apply, locate: Locate) -> Pointer | None:
        after = apply(last_seen)
        if after != last_seen:
            self.save(tenant, name, after)
        return after

    def save(self, tenant: str, name: str, pointer: Pointer | None) -> None:
        """Set a name's pointer, or remove the name for None. Durable when it returns; unchanged when it raises."""
        owner = (tenant, name)
        with self.database.transaction(removing=pointer is None) as connection:
            for table in _TABLES:
                connection.execute(f"DELETE FROM {table} WHERE tenant = ? AND name = ?", owner)
            if pointer is None:
                return
            for version in reversed(pointer.versions):
                row = (*owner, version.digest, version.created, json.dumps(version.receipt), version.staged)
                connection.execute(_INSERT, row)
            if pointer.split:
                insert = "INSERT INTO adapter_splits (tenant, name, split) VALUES (?, ?, ?)"
                connection.execute(insert, (*owner, json.dumps(pointer.split)))
            if pointer.pinned:
                connection.execute("INSERT INTO adapter_pins (tenant, name) VALUES (?, ?)", owner)
            if pointer.readers:
                insert = "INSERT INTO adapter_shared (tenant, name, readers) VALUES (?, ?, ?)"
                connection.execute(insert, (*owner, json.dumps(pointer.readers)))

    def close(self) -> None:
        """Close the database."""
        self.database.close()


def _complete_split(split: Split, versions: Sequence[Version]) -> Split:
    """A split, or none if one of its versions is missing."""
    return split if {digest for digest, _ in split} <= {version.digest for version in versions} else ()
