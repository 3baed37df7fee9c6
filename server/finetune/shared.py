"""Records shared by several servers in an object store, each worked on by one server; the local rows are a copy.

The holder of the lease writes to its disk at once, and uploads its changes with each change of status and each renewal.
Every server may change the status on a client's behalf; the holder notices. Files that another server needs to continue
are in the store before the record names them.
"""

import contextlib
import json
import random
import threading
import time
from abc import abstractmethod
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from adapters.disk import sync
from adapters.storage.bucket import Bucket
from adapters.storage.leases import LEASE, LeaseLost, Leases
from adapters.storage.records import Content, Record, Records
from adapters.storage.versions import RemoteUnavailable
from server.finetune.checkpoints import file_hash
from server.finetune.orphans import remove_orphans
from server.finetune.record_table import R, RecordTable, S

_DAMAGE = (ValueError, LookupError, TypeError)  # errors of reading an invalid record


class Shared(RecordTable[R, S]):
    """A table of shared records. Every method that waits for the object store raises RemoteUnavailable.

    Attributes:
        files: folder of the records' files in the bucket, if they have any.
        stopped: raised when another server holds the record, or its status does not allow a change.
    """

    files = ""
    stopped: type[Exception]

    def connect(self, bucket: Bucket, lease_seconds: float, max_held: int) -> None:
        """Connect to the store, before all other calls. `max_held`: most records that this server works on at once."""
        self._bucket = bucket
        self._stored = Records(bucket, self._table)
        self.leases = Leases(self._stored, lease_seconds)
        self._max_held = max_held
        self._status_changes: dict[str, R] = {}  # records with a status changed by other servers, not handled yet
        self._writing: defaultdict[str, threading.RLock] = defaultdict(threading.RLock)

    @contextlib.contextmanager
    def _changing_both(self, id_: str) -> Iterator[None]:
        """Change a record and its row together, one thread at a time."""
        with self._writing[id_], self._stored.forgetting_on_failure(id_):
            yield

    # --- a record and its row ------------------------------------------------------------------------

    @abstractmethod
    def _merged(self, id_: str, content: Content) -> Content:
        """Return a record with its holder's unsent changes added. The status stays the record's."""

    @abstractmethod
    def _copy(self, content: Content, changes: Mapping[str, Any] | None = None, *, claimed: bool = False) -> bool:
        """Update the rows from a record, keeping its holder's unsent changes; return whether the status has changed.

        Args:
            changes: just made by the holder itself.
            claimed: this server has just claimed the record: its rows have no changes to keep.
        """

    def _removed(self, id_: str) -> None:
        """Handle the removal of a record. A task that works on it is stopped by the loss of its lease."""

    def _copy_row(self, content: Content, changes: Mapping[str, Any] | None) -> bool:
        """Do `_copy` for records of one row each."""
        stored = self._read(content)
        self.leases.observe(stored.id, content)
        with self.database.transaction(removing=True) as connection:
            row = connection.execute(f"SELECT status FROM {self._table} WHERE id = ?", (stored.id,)).fetchone()
            if row is None:
                self.add(stored, content["number"])
            else:
                self.write(stored)
        return row is not None and row["status"] != stored.status and changes is None

    def _row(self, id_: str) -> dict[str, Any]:
        """Return a row's number, and its record in the store's form."""
        with self.database.reading() as connection:
            row = connection.execute(f"SELECT number, record FROM {self._table} WHERE id = ?", (id_,)).fetchone()
        return {"number": row["number"], "record": json.loads(row["record"])}

    def _read(self, content: Content) -> R:
        return msgspec.convert(content["record"], self._kind)

    # --- changes of other servers --------------------------------------------------------------------

    def follow(self) -> None:
        """Import the changes of other servers."""
        for record in sorted(self._stored.fetch_changes(), key=lambda record: (record.content or {}).get("number", 0)):
            try:
                with self._changing_both(record.key):
                    if not self._stored.remember(record):
                        continue
                    if record.content is None:
                        self._forget_row(record)
                    else:
                        self._import(record.content)
            except _DAMAGE as fault:
                self._stored.remember(record)  # reported once
                self._stored.report_damage(record.key, fault)

    def next_status_change(self) -> R | None:
        """Return the current state of a record whose status another server has changed; each change once."""
        while self._status_changes:
            id_, record = self._status_changes.popitem()
            with contextlib.suppress(self._unknown):
                return super().get(record.tenant, id_)
        return None

    def _import(self, content: Content) -> bool:
        """Do `_copy` for content that other servers may have changed."""
        if moved := self._copy(content):
            record = self._read(content)
            self._status_changes[record.id] = record
        return moved

    def get(self, tenant: str, id_: str) -> R:
        try:
            return super().get(tenant, id_)
        except self._unknown:
            found = self._stored.find_unknown(id_)
            if found is None or found.content is None:
                raise
            with self._changing_both(id_):
                if self._stored.remember(found):
                    self._import(found.content)
            return super().get(tenant, id_)

    def refresh(self, id_: str) -> None:
        """Update the local rows from the store."""
        with self._changing_both(id_):
            found = self._stored.fetch(id_)
            self._stored.remember(found)
            if found.content is not None:
                self._import(found.content)
            else:
                self._forget_row(found)

    def _forget_row(self, record: Record) -> None:
        """Forget a record that was removed (a tombstone); a merely missing one may come back."""
        if record.removed:
            self._removed(record.key)

    def unshared_records(self) -> Iterator[R]:
        """Yield records that the store has never had, after setting their final position in lists."""
        for record in self.all():
            if self._stored.knows(record.id) or self._stored.fetch(record.id).version is not None:
                continue
            number = list_position(record.created_at)
            with self.database.transaction() as connection:
                connection.execute(f"UPDATE {self._table} SET number = ? WHERE id = ?", (number, record.id))
            yield record

    # --- working on a record -------------------------------------------------------------------------

    def claim(self, excluding: Collection[str] = ()) -> list[R]:
        """Claim unleased records, as many as this server may hold: first for the tenant with the fewest leases."""
        unfinished, claimed = self.unfinished(), []
        free = [record for record in unfinished if record.has_work and self.leases.is_free(record.id)]
        waiting = [record for record in free if record.id not in excluding]
        held = Counter(record.tenant for record in unfinished if self.leases.holds(record.id))
        while waiting and len(self.leases.held_keys()) < self._max_held:
            waiting.remove(first := min(waiting, key=lambda record: held[record.tenant]))
            with contextlib.suppress(LeaseLost), self._changing_both(first.id):
                self._copy(self.leases.claim(first.id), claimed=True)
                held[first.tenant] += 1
                claimed.append(super().get(first.tenant, first.id))
        return claimed

    def holds(self, id_: str) -> bool:
        return self.leases.holds(id_)

    def send(self, id_: str, *, release: bool = False) -> bool:
        """Renew or release the lease, and upload changes; return whether the status has changed.

        Raises LeaseLost.
        """
        with self._changing_both(id_):
            content = self.leases.change(id_, lambda content: self._merged(id_, content), release=release)
            return self._import(content)

    def _upload_new(self, id_: str, **lists: list[Any]) -> None:
        """Create the store's record of a row. `lists`: its further lists."""
        fresh: Content = {"number": self._row(id_)["number"], LEASE: None, **lists}
        with self._changing_both(id_):
            content = self._stored.change(id_, lambda old: old or self._merged(id_, fresh)).content
            assert content is not None
            self.leases.observe(id_, content)

    def _remove_unshared(self, id_: str) -> None:
        """Remove the rows of a new record whose upload failed; a record stored after all is imported again."""
        with self._writing[id_]:
            self._stored.forget(id_)
            self.remove(id_)

    def _change(self, record: R, change: Any, changes: Mapping[str, Any], *, by_any_server: bool = False) -> R:
        """Change a record held here or, with `by_any_server`, by any server. `change` maps the old content to the new.

        Raises `stopped`, and the errors of `change`.
        """
        with self._changing_both(record.id):
            if self.leases.holds(record.id) or not by_any_server:
                try:
                    content = self.leases.change(record.id, lambda content: change(self._merged(record.id, content)))
                    self._copy(content, changes)
                    return super().get(record.tenant, record.id)
                except LeaseLost:
                    if not by_any_server:
                        with contextlib.suppress(RemoteUnavailable):
                            self.refresh(record.id)
                        raise self.stopped(f"{record.id} is now held by another server.") from None
                except self.stopped:
                    self.refresh(record.id)
                    raise

            def changed(content: Content | None) -> Content:
                if content is None:
                    raise self._unknown(record.id)
                after: Content = change(content)
                return after

            found = self._stored.change(record.id, changed).content
            assert found is not None
            self._copy(found)
        return super().get(record.tenant, record.id)

    # --- files ---------------------------------------------------------------------------------------

    def upload_files(self, id_: str, root: Path, files: Mapping[str, str]) -> None:
        for name, hash_ in files.items():
            self._bucket.put_file(self._object(id_, hash_), root / name)

    def download_files(self, id_: str, root: Path, files: Mapping[str, str]) -> None:
        for name, hash_ in files.items():
            file = root / name
            if file.exists() and file_hash(file) == hash_:
                continue
            for parent in list(Path(name).parents)[-2::-1]:  # not `root`: if it was removed, the files are not needed
                (root / parent).mkdir(exist_ok=True)
            part = file.with_name(f".{file.name}.part")
            part.unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):
                self._bucket.get_file(self._object(id_, hash_), part, missing_is_unavailable=False)
                sync(part)
                part.rename(file)

    def delete_files(self, id_: str, keep: Sequence[str] = ()) -> None:
        kept = {self._object(id_, hash_) for hash_ in keep}
        with contextlib.suppress(RemoteUnavailable):  # retried by the next call
            existing = [entry.path for entry in self._bucket.list(self._object(id_, "").rstrip("/"))]
            self._bucket.delete([path for path in existing if path not in kept])

    def remove_orphans(self, seconds: float) -> int:
        """Remove old unneeded objects of finished records, and old tombstones; return the count of objects."""
        self._stored.remove_tombstones(seconds)
        if not self.files:
            return 0
        return remove_orphans(self._bucket, self.files, self._stored, self._needed, seconds)

    def _needed(self, content: Content | None) -> Collection[str] | None:
        return () if content is None or self.ended(self._read(content)) else None

    def _object(self, id_: str, name: str) -> str:
        return f"{self.files}/{id_}/{name}"


def list_position(created_at: int | None = None) -> int:
    """Return a record's position in lists, the same at all servers: the last by default, or that of `created_at`."""
    return time.time_ns() if created_at is None else created_at * 10**9 + random.randrange(10**9)
