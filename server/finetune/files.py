"""Uploaded and produced files: bytes on disk, a row for each in the database.

A file exists when its row does; the row is written last, after the bytes are synced.
"""

import json
import secrets
import shutil
import string
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters.disk import sync
from adapters.storage.database import Database

_ALPHABET = string.ascii_letters + string.digits


def new_id(prefix: str) -> str:
    """A fresh unguessable id such as `file-8sK2...`."""
    return prefix + "".join(secrets.choice(_ALPHABET) for _ in range(24))


class UnknownFileError(LookupError):
    """No file of that id for this tenant."""


@dataclass(frozen=True)
class StoredFile:
    """One file. `report` is what validation found (counts by name), empty for produced files."""

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
        root: made if missing; belongs to this store alone.
    """

    def __init__(self, root: Path, database: Database) -> None:
        self._root = root
        self._staging = root / "staging"
        self._database = database
        shutil.rmtree(self._staging, ignore_errors=True)
        self._staging.mkdir(parents=True)
        with database.reading() as connection:
            known = {row["id"] for row in connection.execute("SELECT id FROM files")}
        for path in root.iterdir():
            if path.is_file() and path.name not in known:
                path.unlink()  # synced, but its row never was

    @contextmanager
    def staging(self) -> Iterator[Path]:
        """A private directory for an upload on its way; gone afterwards."""
        directory = self._staging / new_id("")
        directory.mkdir()
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def add(
        self, tenant: str, source: Path, *, filename: str, purpose: str, report: dict[str, Any] | None = None
    ) -> StoredFile:
        """Take over a staged file. Raises OSError (a full disk, say) with nothing kept."""
        file_id = new_id("file-")
        target = self._root / file_id
        sync(source)
        size = source.stat().st_size
        source.rename(target)
        sync(self._root)
        stored = StoredFile(file_id, tenant, filename, purpose, size, int(time.time()), target, report or {})
        with self._database.transaction() as connection:
            connection.execute(
                "INSERT INTO files (id, tenant, filename, purpose, bytes, created_at, report) "
                "VALUES (?, ?, ?, ?, ?, ?, ?)",
                (file_id, tenant, filename, purpose, size, stored.created_at, json.dumps(stored.report)),
            )
        return stored

    def get(self, tenant: str, file_id: str) -> StoredFile:
        """Raises UnknownFileError."""
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
        """A page of files and whether more follow. Raises UnknownCursorError."""
        where, values = (
            ("tenant = ?", [tenant]) if purpose is None else ("tenant = ? AND purpose = ?", [tenant, purpose])
        )
        rows, more = self._database.page("files", where, values, limit=limit, after=after, newest_first=newest_first)
        return [self._stored(row) for row in rows], more

    def delete(self, tenant: str, file_id: str) -> None:
        """Raises UnknownFileError. A reader that has the file open keeps its bytes."""
        stored = self.get(tenant, file_id)
        with self._database.transaction(removing=True) as connection:
            connection.execute("DELETE FROM files WHERE id = ?", (file_id,))
        stored.path.unlink(missing_ok=True)

    def _stored(self, row: Any) -> StoredFile:
        return StoredFile(
            row["id"],
            row["tenant"],
            row["filename"],
            row["purpose"],
            row["bytes"],
            row["created_at"],
            self._root / row["id"],
            json.loads(row["report"]),
        )
