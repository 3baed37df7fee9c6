"""Uploaded and produced files: bytes on disk, a row for each in the database, and the same row beside the bytes.

A file exists once its row does; the row is written last, after the bytes are synced. The copy beside the bytes serves
to restore a lost database.
"""

import hashlib
import json
import logging
import secrets
import shutil
import sqlite3
import string
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters.disk import sync, write_synced
from adapters.storage import lost
from adapters.storage.database import Database

TRAINING, BATCH = PURPOSES = ("fine-tune", "batch")  # of uploaded files
RECORDS = "records"  # beside the files: the row of each
COLUMNS = ("id", "tenant", "filename", "purpose", "bytes", "created_at", "report")
_ALPHABET = string.ascii_letters + string.digits

log = logging.getLogger(__name__)


def new_id(prefix: str) -> str:
    """Return a new unguessable id such as `file-8sK2...`."""
    return prefix + "".join(secrets.choice(_ALPHABET) for _ in range(24))


class UnknownFileError(LookupError):
    """The tenant has no file with this id."""


@dataclass(frozen=True)
class StoredFile:
    """One file. `report` is the result of validation (counts by name), empty for produced files."""

    id: str
    tenant: str
    filename: str
    purpose: str
    bytes: int
    created_at: int
    path: Path
    report: dict[str, Any] = field(default_factory=dict)


class FileStore:
    """The files under one directory.

    Args:
        root: created if missing; used by this store alone.
    """

    def __init__(self, root: Path, database: Database) -> None:
        self._root = root
        self._staging = root / "staging"
        self._database = database
        self._pending = lost.Pending(root)
        aside = root.parent / lost.LOST_AND_FOUND / root.name
        for directory in (root, self._staging):
            lost.ensure_directory(directory, aside.parent)
        for left in lost.entries(self._staging):
            lost.remove(left)
        with database.reading() as connection:
            known = {row["id"] for row in connection.execute("SELECT id FROM files")}
        unknown = [path for path in lost.entries(root) if path.name not in known | {self._staging.name, RECORDS}]
        lost.remove_or_set_aside(unknown, self._pending, aside, database.path.name)
        here = {path.name for path in (*lost.entries(root), *lost.entries(aside))}
        for record in lost.entries(root / RECORDS):
            if record.stem not in here:
                lost.remove(record)

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """Create a private directory for an upload; it is removed at the end of the context."""
        directory = self._staging / new_id("")
        directory.mkdir(parents=True)
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def add(
        self,
        tenant: str,
        source: Path,
        *,
        filename: str,
        purpose: str,
        report: dict[str, Any] | None = None,
        file_id: str | None = None,
    ) -> StoredFile:
        """Add a staged file, which is moved. Raises OSError (on a full disk, for example) with nothing kept.

        file_id: a fixed id, for a file that may have been added before, here or at another server. If that file was
            deleted, this one is removed as well.
        """
        maybe_stored, file_id = file_id is not None, file_id or new_id("file-")
        target = self._root / file_id
        sync(source)
        size = source.stat().st_size
        stored = StoredFile(file_id, tenant, filename, purpose, size, int(time.time()), target, report or {})
        self._pending.mark(file_id)
        try:
            row = self._share(_row(stored) | {"digest": digest_of(source)}, source)
            source.rename(target)
            self._write_record(row)
            sync(self._root)
            with self._database.transaction() as connection:
                insert(connection, row)
                self._database.after_commit(lambda: self._pending.clear(file_id))
        except UnknownFileError:
            self._remove(target)
        except BaseException:
            self._remove(target)
            self._unshare(file_id, maybe_stored=maybe_stored)
            raise
        return stored

    def _share(self, row: dict[str, Any], source: Path) -> dict[str, Any]:
        """Upload a new file for other servers, if there are any; return its final row.

        Raises UnknownFileError if a file with this id was deleted.
        """
        return row

    def _unshare(self, file_id: str, *, maybe_stored: bool) -> None:
        """Undo `_share`. `maybe_stored`: it may have been stored before."""

    def _write_record(self, row: dict[str, Any]) -> None:
        record = record_path(self._root, row["id"])
        record.parent.mkdir(exist_ok=True)
        write_synced(record, json.dumps(row).encode())

    def fetch(self, tenant: str, file_id: str) -> StoredFile:
        """Return a file, after downloading its bytes if they are not on this disk. Raises UnknownFileError."""
        return self.get(tenant, file_id)

    def get(self, tenant: str, file_id: str) -> StoredFile:
        """Return a file. Raises UnknownFileError."""
        with self._database.reading() as connection:
            row = connection.execute("SELECT * FROM files WHERE id = ? AND tenant = ?", (file_id, tenant)).fetchone()
        if row is None:
            raise UnknownFileError(file_id)
        return self._stored(row)

    def page(
        self,
        tenant: str,
        *,
        limit: int,
        after: str | None = None,
        purpose: str | None = None,
        newest_first: bool = True,
    ) -> tuple[list[StoredFile], bool]:
        """Return a page of files, and whether more follow. Raises UnknownCursorError."""
        where, values = (
            ("tenant = ?", [tenant]) if purpose is None else ("tenant = ? AND purpose = ?", [tenant, purpose])
        )
        rows, more = self._database.page("files", where, values, limit=limit, after=after, newest_first=newest_first)
        return [self._stored(row) for row in rows], more

    def delete(self, tenant: str, file_id: str) -> None:
        """Delete a file. Raises UnknownFileError. Readers with the file open can still read it."""
        stored = self.get(tenant, file_id)
        self._pending.mark(file_id)
        with self._database.transaction(removing=True) as connection:
            connection.execute("DELETE FROM files WHERE id = ?", (file_id,))
        self._remove(stored.path)

    def _remove(self, path: Path) -> None:
        for doomed in (path, record_path(self._root, path.name)):
            doomed.unlink(missing_ok=True)
        self._pending.clear(path.name)

    def _stored(self, row: Any) -> StoredFile:
        return StoredFile(
            row["id"],
            row["tenant"],
            row["filename"],
            row["purpose"],
            row["bytes"],
            row["created_at"],
            self._root / row["id"],
            _report(row),
        )


def insert(connection: sqlite3.Connection, row: Mapping[str, Any]) -> None:
    """Write a file's row. Raises LookupError for an invalid one."""
    values = [row.get("number"), *(row[column] for column in COLUMNS)]
    connection.execute(
        f"INSERT OR REPLACE INTO files (number, {', '.join(COLUMNS)}) VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values
    )


def read_record(root: Path, file_id: str) -> dict[str, Any] | None:
    """Return the row beside a file, with the digest of its bytes; None when missing or unreadable."""
    try:
        row = json.loads(record_path(root, file_id).read_bytes())
    except (OSError, ValueError):
        return None
    return row if isinstance(row, dict) and all(column in row for column in COLUMNS) else None


def record_path(root: Path, file_id: str) -> Path:
    """Return the path of the record beside a file."""
    return root / RECORDS / f"{file_id}.json"


def is_intact(path: Path) -> bool:
    """Whether a file's bytes match the recorded digest; True without one."""
    row = read_record(path.parent, path.name)
    return row is None or row.get("digest") == digest_of(path)


def _row(file: StoredFile) -> dict[str, Any]:
    return {column: getattr(file, column) for column in COLUMNS[:-1]} | {"report": json.dumps(file.report)}


def _report(row: Any) -> dict[str, Any]:
    try:
        report: dict[str, Any] = json.loads(row["report"])
    except ValueError as fault:
        log.error("the report of the file %s cannot be read: %s", row["id"], fault)
        return {}
    return report


def digest_of(path: Path) -> str:
    """Return a file's SHA-256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
