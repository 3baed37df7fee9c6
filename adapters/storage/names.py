"""Where it is kept what every name means: a table of one local database.

The store reads all of it once and writes a name's `Pointer` whole; `adapters.storage.remote` keeps the same beside the
files in an object store.
"""

import json
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from adapters.storage.database import Database, script
from adapters.storage.versions import Pointer, Version

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
_TABLES = ("adapter_versions", "adapter_splits", "adapter_pins")


def _add_staged(database: sqlite3.Connection) -> None:
    """Tables made before versions could be staged lack the column, and were not numbered."""
    if not any(column[1] == "staged" for column in database.execute("PRAGMA table_info(adapter_versions)")):
        database.execute("ALTER TABLE adapter_versions ADD COLUMN staged INTEGER NOT NULL DEFAULT 0")


_MIGRATIONS = (script(_SCHEMA), _add_staged)

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
        path: the database file; its directory must exist. Made or migrated.

    Raises:
        NewerLayoutError: a newer release has written it.
    """

    def __init__(self, path: Path) -> None:
        self.database = Database(path, _MIGRATIONS)

    def load(self, locate: Locate) -> Iterator[Pointer]:
        rows: dict[tuple[str, str], list[Version]] = {}
        with self.database.reading() as connection:
            for tenant, name, digest, created, receipt, staged in connection.execute(_SELECT):
                version = Version(tenant, name, digest, locate(digest), created, json.loads(receipt), bool(staged))
                rows.setdefault((tenant, name), []).append(version)
            splits = {
                (tenant, name): tuple((digest, share) for digest, share in json.loads(split))
                for tenant, name, split in connection.execute("SELECT tenant, name, split FROM adapter_splits")
            }
            pins = {(tenant, name) for tenant, name in connection.execute("SELECT tenant, name FROM adapter_pins")}
        for owner, versions in rows.items():
            yield Pointer(tuple(versions), splits.get(owner, ()), owner in pins)

    def save(self, tenant: str, name: str, pointer: Pointer | None) -> None:
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

    def close(self) -> None:
        """Close the database."""
        self.database.close()
