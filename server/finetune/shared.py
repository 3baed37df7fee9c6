"""Records that several servers have in an object store, and that one at a time works on; the rows here are a copy.

A server that holds the lease writes to its disk as it goes, and with each change of status and each renewal sends what
is new. Anybody may change the status as a client asks for it; the holder hears of it. Files that another server needs
to go on are in the store before the record names them.
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

_DAMAGE = (ValueError, LookupError, TypeError)  # what reading a record raises when it is none


class Shared(RecordTable[R, S]):
    """Whatever waits for the object store raises RemoteUnavailable.

    Attributes:
        files: where the files of the records lie in the bucket, if they have any.
        stopped: raised when a record is another server's, as when its status does not allow a change.
    """

    files = ""
    stopped: type[Exception]

    def join(self, bucket: Bucket, lease_seconds: float, most: int) -> None:
        """Once, before anything else. `most`: records that this server works on at once."""
        self._bucket = bucket
        self._stored = Records(bucket, self._table)
        self.leases = Leases(self._stored, lease_seconds)
        self._most = most
        self._moved: dict[str, R] = {}  # whose status others have changed, not yet heeded
        self._writing: defaultdict[str, threading.RLock] = defaultdict(threading.RLock)

    @contextlib.contextmanager
    def _in_step(self, id_: str) -> Iterator[None]:
        """A record and its row are changed together. When one of them could not be, what the record says is news."""
        with self._writing[id_]:
            try:
                yield
            except BaseException:
                self._stored.forget(id_)
                raise

    # --- a record and its row ------------------------------------------------------------------------

    @abstractmethod
    def _merged(self, id_: str, content: Content) -> Content:
        """A record with what its holder has that it has not. Statuses are the record's."""

    @abstractmethod
    def _copy(self, content: Content, changes: Mapping[str, Any] | None = None, *, claimed: bool = False) -> bool:
        """Let the rows be what a record says, with what its holder has added since; whether the status is another.

        Args:
            changes: what the holder changed just now, itself.
            claimed: it holds the record only now: its rows have nothing that counts.
        """

    def _removed(self, id_: str) -> None:
        """Somebody removed a record. Whoever works on it hears that its lease is lost."""

    def _copy_row(self, content: Content, changes: Mapping[str, Any] | None) -> bool:
        """`_copy` for records that are one row each."""
        stored = self._read(content)
        self.leases.see(stored.id, content)
        with self.database.transaction(removing=True) as connection:
            row = connection.execute(f"SELECT status FROM {self._table} WHERE id = ?", (stored.id,)).fetchone()
            if row is None:
                self.add(stored, content["number"])
            else:
                self.write(stored)
        return row is not None and row["status"] != stored.status and changes is None

    def _row(self, id_: str) -> dict[str, Any]:
        """The number of a row, and its record as it is in the store."""
        with self.database.reading() as connection:
            row = connection.execute(f"SELECT number, record FROM {self._table} WHERE id = ?", (id_,)).fetchone()
        return {"number": row["number"], "record": json.loads(row["record"])}

    def _read(self, content: Content) -> R:
        return msgspec.convert(content["record"], self._kind)

    # --- what others do ------------------------------------------------------------------------------

    def follow(self) -> None:
        """Take over what other servers changed."""
        for record in sorted(self._stored.news(), key=lambda record: (record.content or {}).get("number", 0)):
            try:
                with self._in_step(record.key):
                    if not self._stored.note(record):
                        continue
                    if record.content is None:
                        self._forget_row(record)
                    else:
                        self._take(record.content)
            except _DAMAGE as fault:
                self._stored.note(record)  # once is enough
                self._stored.damage(record.key, fault)

    def next_moved(self) -> R | None:
        """A record whose status others have changed, however that was heard, as it is now; each once."""
        while self._moved:
            id_, record = self._moved.popitem()
            with contextlib.suppress(self._unknown):
                return super().get(record.tenant, id_)
        return None

    def _take(self, content: Content) -> bool:
        """`_copy` of what others may have changed."""
        if moved := self._copy(content):
            record = self._read(content)
            self._moved[record.id] = record
        return moved

    def get(self, tenant: str, id_: str) -> R:
        try:
            return super().get(tenant, id_)
        except self._unknown:
            found = self._stored.miss(id_)
            if found is None or found.content is None:
                raise
            with self._in_step(id_):
                if self._stored.note(found):
                    self._take(found.content)
            return super().get(tenant, id_)

    def refresh(self, id_: str) -> None:
        """Let the rows here be what the store says."""
        with self._in_step(id_):
            found = self._stored.look(id_)
            self._stored.note(found)
            if found.content is not None:
                self._take(found.content)
            else:
                self._forget_row(found)

    def _forget_row(self, record: Record) -> None:
        """Only of a record that somebody removed: what has vanished may come back."""
        if record.removed:
            self._removed(record.key)

    def never_shared(self) -> Iterator[R]:
        """Records from a time without a store, whose places in lists are the same at all servers from now on."""
        for record in self.all():
            if self._stored.knows(record.id) or self._stored.look(record.id).version is not None:
                continue
            number = place(record.created_at)
            with self.database.transaction() as connection:
                connection.execute(f"UPDATE {self._table} SET number = ? WHERE id = ?", (number, record.id))
            yield record

    # --- working on one ------------------------------------------------------------------------------

    def take_up(self, but: Collection[str] = ()) -> list[R]:
        """Claim records that nobody works on, as many as there is room for: first for who has the fewest here."""
        unfinished, taken = self.unfinished(), []
        free = [record for record in unfinished if record.goes_on and self.leases.free(record.id)]
        waiting = [record for record in free if record.id not in but]
        at_work = Counter(record.tenant for record in unfinished if self.leases.holds(record.id))
        while waiting and len(self.leases.held()) < self._most:
            waiting.remove(first := min(waiting, key=lambda record: at_work[record.tenant]))
            with contextlib.suppress(LeaseLost), self._in_step(first.id):
                self._copy(self.leases.claim(first.id), claimed=True)
                at_work[first.tenant] += 1
                taken.append(super().get(first.tenant, first.id))
        return taken

    def holds(self, id_: str) -> bool:
        return self.leases.holds(id_)

    def send(self, id_: str, *, release: bool = False) -> bool:
        """Renew the lease, or end it, and send what is new; whether somebody has changed the status.

        Raises LeaseLost.
        """
        with self._in_step(id_):
            content = self.leases.change(id_, lambda content: self._merged(id_, content), release=release)
            return self._take(content)

    def _send_new(self, id_: str, **lists: list[Any]) -> None:
        """Make the record of a row. `lists`: what it has beside."""
        fresh: Content = {"number": self._row(id_)["number"], LEASE: None, **lists}
        with self._in_step(id_):
            content = self._stored.change(id_, lambda old: old or self._merged(id_, fresh)).content
            assert content is not None
            self.leases.see(id_, content)

    def _never(self, id_: str) -> None:
        """Remove the rows of a new record that others could not be told of; if they were after all, they come back."""
        with self._writing[id_]:
            self._stored.forget(id_)
            self.remove(id_)

    def _change(self, record: R, change: Any, changes: Mapping[str, Any], *, anybody: bool = False) -> R:
        """Change a record that is held here, or with `anybody` another's, too. `change` is of a content.

        Raises `stopped`, and what `change` does.
        """
        with self._in_step(record.id):
            if self.leases.holds(record.id) or not anybody:
                try:
                    content = self.leases.change(record.id, lambda content: change(self._merged(record.id, content)))
                    self._copy(content, changes)
                    return super().get(record.tenant, record.id)
                except LeaseLost:
                    if not anybody:
                        with contextlib.suppress(RemoteUnavailable):
                            self.refresh(record.id)
                        raise self.stopped(f"{record.id} is another server's now.") from None
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

    def put(self, id_: str, root: Path, files: Mapping[str, str]) -> None:
        for name, hash_ in files.items():
            self._bucket.put_file(self._object(id_, hash_), root / name)

    def fetch(self, id_: str, root: Path, files: Mapping[str, str]) -> None:
        for name, hash_ in files.items():
            file = root / name
            if file.exists() and file_hash(file) == hash_:
                continue
            for parent in list(Path(name).parents)[-2::-1]:  # not `root`: if that has been removed, nothing is wanted
                (root / parent).mkdir(exist_ok=True)
            part = file.with_name(f".{file.name}.part")
            part.unlink(missing_ok=True)
            with contextlib.suppress(FileNotFoundError):
                self._bucket.get_file(self._object(id_, hash_), part, missing=False)
                sync(part)
                part.rename(file)

    def forget(self, id_: str, but: Sequence[str] = ()) -> None:
        kept = {self._object(id_, hash_) for hash_ in but}
        with contextlib.suppress(RemoteUnavailable):  # the next time will do
            there = [entry.path for entry in self._bucket.list(self._object(id_, "").rstrip("/"))]
            self._bucket.delete([path for path in there if path not in kept])

    def remove_orphans(self, seconds: float) -> int:
        """Remove objects of records that are at their end, and tombstones, all older than this; how many objects."""
        self._stored.sweep(seconds)
        if not self.files:
            return 0
        return remove_orphans(self._bucket, self.files, self._stored, self._needed, seconds)

    def _needed(self, content: Content | None) -> Collection[str] | None:
        return () if content is None or self.ended(self._read(content)) else None

    def _object(self, id_: str, name: str) -> str:
        return f"{self.files}/{id_}/{name}"


def place(created_at: int | None = None) -> int:
    """The place of a record in lists, which is the same at all servers: the last, or that of its time."""
    return time.time_ns() if created_at is None else created_at * 10**9 + random.randrange(10**9)
