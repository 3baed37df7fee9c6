"""Where it is kept what every name means: a table of one local database.

The store reads all of it once and writes a name's `Pointer` whole; `adapters.storage.remote` keeps the same beside the
files in an object store.
"""

import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from adapters.storage.versions import Pointer, Version

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
CREATE TABLE IF NOT EXISTS adapter_pins (
    tenant TEXT NOT NULL,
    name TEXT NOT NULL,
    PRIMARY KEY (tenant, name)
);
"""
_COLUMNS = "tenant, name, digest, created, receipt, staged"
_INSERT = f"INSERT INTO adapter_versions ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?)"
_SELECT = f"SELECT {_COLUMNS} FROM adapter_versions ORDER BY sequence DESC"
_TABLES = ("adapter_versions", "adapter_splits", "adapter_pins")

Locate = Callable[[str], Path]  # digest -> where its files are, or would be


class Names(Protocol):
    """What every name means, durably."""

    def load(self, locate: Locate) -> Iterator[Pointer]:
        """All of them, each as it was last saved."""

    def save(self, tenant: str, name: str, pointer: Pointer | None) -> None:
        """Let a name mean this, or nothing. Durable when it returns; unchanged when it raises."""


class LocalNames:
    """`Names` in SQLite.

    A row per version of a name: the newest is the current one. Splits and pins have tables of their own.

    Args:
        database: these tables are used by nobody else, in autocommit mode and from any thread
            (`sqlite3.connect(path, isolation_level=None, check_same_thread=False)`).
    """

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database
        database.executescript(_SCHEMA)
        if not any(column[1] == "staged" for column in database.execute("PRAGMA table_info(adapter_versions)")):
            database.execute("ALTER TABLE adapter_versions ADD COLUMN staged INTEGER NOT NULL DEFAULT 0")

    def load(self, locate: Locate) -> Iterator[Pointer]:
        rows: dict[tuple[str, str], list[Version]] = {}
        for tenant, name, digest, created, receipt, staged in self._database.execute(_SELECT):
            version = Version(tenant, name, digest, locate(digest), created, json.loads(receipt), bool(staged))
            rows.setdefault((tenant, name), []).append(version)
        splits = {
            (tenant, name): tuple((digest, share) for digest, share in json.loads(split))
            for tenant, name, split in self._database.execute("SELECT tenant, name, split FROM adapter_splits")
        }
        pins = set(self._database.execute("SELECT tenant, name FROM adapter_pins"))
        for owner, versions in rows.items():
            yield Pointer(tuple(versions), splits.get(owner, ()), owner in pins)

    def save(self, tenant: str, name: str, pointer: Pointer | None) -> None:
        owner = (tenant, name)
        with self._transaction():
            for table in _TABLES:
                self._database.execute(f"DELETE FROM {table} WHERE tenant = ? AND name = ?", owner)
            if pointer is None:
                return
            for version in reversed(pointer.versions):
                row = (*owner, version.digest, version.created, json.dumps(version.receipt), version.staged)
                self._database.execute(_INSERT, row)
            if pointer.split:
                insert = "INSERT INTO adapter_splits (tenant, name, split) VALUES (?, ?, ?)"
                self._database.execute(insert, (*owner, json.dumps(pointer.split)))
            if pointer.pinned:
                self._database.execute("INSERT INTO adapter_pins (tenant, name) VALUES (?, ?)", owner)

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
