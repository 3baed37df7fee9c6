"""Files shared by several servers in an object store, a record and an object each. Local rows and bytes are copies."""

import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.storage.database import Database
from adapters.storage.versions import RemoteUnavailable
from server.finetune.files import COLUMNS, FileStore, StoredFile, UnknownFileError, digest_of, insert, log
from server.finetune.orphans import remove_orphans
from server.finetune.shared import list_position

if TYPE_CHECKING:
    from adapters.storage.bucket import Bucket
    from adapters.storage.records import Record, Records

_CONTENTS = "file-contents"


class SharedFiles(FileStore):
    """All files of the servers on one object store. Every method that waits for the store raises RemoteUnavailable.

    Args:
        records: of the files.
        bucket: holds their bytes.
    """

    def __init__(self, root: Path, database: Database, records: "Records", bucket: "Bucket") -> None:
        super().__init__(root, database)
        self._records = records
        self._bucket = bucket
        self._copying = threading.Lock()

    def share_all(self) -> None:
        """Upload files created before the server used a store."""
        with self._database.reading() as connection:
            rows = [{name: row[name] for name in COLUMNS} for row in connection.execute("SELECT * FROM files")]
        for row in rows:
            path = self._root / row["id"]
            if path.exists() and not self._records.knows(path.name) and self._records.fetch(path.name).version is None:
                shared = self._share(
                    row | {"digest": digest_of(path), "number": list_position(row["created_at"])}, path
                )
                with self._database.transaction() as connection:
                    insert(connection, shared)

    def follow(self) -> None:
        """Import the files that other servers added or removed."""
        for record in sorted(self._records.fetch_changes(), key=lambda record: (record.content or {}).get("number", 0)):
            try:
                self._import(record)
            except (LookupError, TypeError) as fault:
                self._records.remember(record)  # reported once
                self._records.report_damage(record.key, fault)

    def _import(self, record: "Record") -> None:
        """Update the local row from a record, if the record is new."""
        with self._copying, self._records.forgetting_on_failure(record.key):
            if self._records.remember(record):
                self._copy(record)

    def _copy(self, record: "Record") -> None:
        if record.content is None:
            with self._database.transaction(removing=True) as connection:
                connection.execute("DELETE FROM files WHERE id = ?", (record.key,))
            self._remove(self._root / record.key)
            return
        with self._database.transaction() as connection:
            if connection.execute("SELECT 1 FROM files WHERE id = ?", (record.key,)).fetchone() is None:
                insert(connection, record.content)

    def _share(self, row: dict[str, Any], source: Path) -> dict[str, Any]:
        """Upload the bytes, then the record that names them. Of two uploads with one id, the first is the file."""
        row = {"number": list_position()} | row
        if self._records.fetch(row["id"]).removed:
            raise UnknownFileError(row["id"])
        self._bucket.put_file(_path(row), source)
        shared = self._records.change(row["id"], lambda old: old or row).content or row
        if shared["digest"] != row["digest"]:
            self._bucket.delete([_path(row)])
            source.unlink()
            self._bucket.get_file(_path(shared), source)
        return shared

    def _unshare(self, file_id: str, *, maybe_stored: bool) -> None:
        with suppress(RemoteUnavailable):
            if not maybe_stored:
                self._forget(file_id)
        self._records.forget(file_id)  # its state in the store is unknown

    def _forget(self, file_id: str) -> None:
        """Remove a file's record, then its bytes. Bytes that remain because of an outage are removed as orphans."""
        self._records.change(file_id, lambda old: None)
        with suppress(RemoteUnavailable):
            self._bucket.delete([entry.path for entry in self._bucket.list(f"{_CONTENTS}/{file_id}")])

    def remove_orphans(self, seconds: float) -> int:
        """Remove bytes without a record, and tombstones, older than `seconds`; return the count of objects."""
        self._records.remove_tombstones(seconds)
        return remove_orphans(self._bucket, _CONTENTS, self._records, _needed, seconds)

    def get(self, tenant: str, file_id: str) -> StoredFile:
        try:
            return super().get(tenant, file_id)
        except UnknownFileError:
            if (record := self._records.find_unknown(file_id)) is None:
                raise
            self._import(record)
            return super().get(tenant, file_id)

    def fetch(self, tenant: str, file_id: str) -> StoredFile:
        stored = self.get(tenant, file_id)
        if not stored.path.exists() and (row := self._records.fetch(file_id).content) is not None:
            with self.staging() as staging:
                copy = staging / file_id
                self._bucket.get_file(_path(row), copy)
                if digest_of(copy) != row["digest"]:
                    log.error("the bytes of %s in the object store do not match its digest", file_id)
                    raise UnknownFileError(file_id)
                self._write_record(row)
                copy.rename(stored.path)
        return stored

    def delete(self, tenant: str, file_id: str) -> None:
        self.get(tenant, file_id)
        with self._records.forgetting_on_failure(file_id):
            self._forget(file_id)
            super().delete(tenant, file_id)


def _needed(row: Mapping[str, Any] | None) -> list[str]:
    return [] if row is None else [_path(row)]


def _path(row: Mapping[str, Any]) -> str:
    return f"{_CONTENTS}/{row['id']}/{row['digest']}"
