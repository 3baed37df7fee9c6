"""Small records changed and seen by many servers: one JSON object each, in a bucket.

A record is changed by a function of its content, which is applied to the newest one and written only if that is still
there; a server that loses the race applies it again. A removed record leaves a tombstone, so that a late list looks
like neither a removal nor a return. Each content has a revision, larger than all earlier ones, and the marks of the
last changes: from these a server without an answer, or with the answer to a retry, finds out whether its change was
made.
"""

import contextlib
import json
import logging
import random
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from adapters.storage.bucket import Bucket, Conflict, Entry
from adapters.storage.versions import RemoteUnavailable

if TYPE_CHECKING:
    from obstore import UpdateVersion

Content = dict[str, Any]

_READERS = 32  # records read at once
_MARKS = 32  # of changes, kept in a record
_RETRY_SECONDS = 20.0  # seconds for which a change is retried when others win the race
_MAX_FAILED_WRITES = 3  # failed writes, while reads succeed, before a change is given up
_FIRST_WAIT, _LONGEST_WAIT = 0.005, 0.5
_SEAL_SECONDS = 3600.0  # after which a sealed tombstone that is still there may be used again
_REMOVAL_SECONDS = 60.0  # time limit for removing a tombstone after its sealing
_SUFFIX = ".json"
_MAX_LOOKUPS = 64  # lookups of keys not known here, between two lists
_LOOKUP_KEY = re.compile(r"[A-Za-z0-9_-]{1,128}")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """One record as it was read.

    Attributes:
        content: None when it was removed, was never there or is damaged.
        version: None when there is not even a tombstone.
        sealed: a tombstone about to be removed.
        age: seconds since it was written.
        fault: the reason why it is damaged.
    """

    key: str
    content: Content | None
    revision: int = 0
    marks: tuple[str, ...] = ()
    etag: str | None = None
    version: "UpdateVersion | None" = None
    sealed: bool = False
    age: float = 0.0
    fault: str | None = None

    @property
    def removed(self) -> bool:
        """Whether it is known to be removed."""
        return self.content is None and self.version is not None and self.fault is None

    @property
    def seal_expired(self) -> bool:
        """Whether the seal is so old that its server will not remove the tombstone any more."""
        return self.age > _SEAL_SECONDS


class Records:
    """The records below one prefix of a bucket; methods that wait for it raise RemoteUnavailable.

    A key may have slashes. Used from any thread.

    Attributes:
        damaged: paths of objects that are not valid records.
    """

    def __init__(self, bucket: Bucket, prefix: str) -> None:
        self.damaged: set[str] = set()
        self._bucket = bucket
        self._prefix = prefix
        self._known: dict[str, tuple[int, str | None]] = {}  # key -> revision, ETag
        self._lookups: dict[str, Future[Record]] = {}  # lookups since the last list
        self._lock = threading.Lock()

    # --- reading -------------------------------------------------------------------------------------

    def fetch_changes(self) -> Iterator[Record]:
        """Records that differ from those known here. They become known one by one, by `remember`."""
        with self._lock:
            known = dict(self._known)
            self._lookups.clear()
        listed = {self._key(entry.path): entry.etag for entry in self._entries()}
        changed = [key for key, etag in listed.items() if key not in known or known[key][1] != etag]
        missing = [key for key in known if key not in listed]  # by a list that is late, or by `remove_tombstones`
        for record in self._read_all([*changed, *missing]):
            gone = record.version is None and record.key in known
            yield replace(record, revision=known[record.key][0]) if gone else record

    def all(self) -> Iterator[Record]:
        """Every current record, without removed ones."""
        records = self._read_all([self._key(entry.path) for entry in self._entries()])
        return (record for record in records if record.content is not None)

    def find_unknown(self, key: str) -> Record | None:
        """A requested record that is not known here; looked for once between two lists.

        Concurrent callers wait for the same answer.
        """
        with self._lock:
            lookup = self._lookups.get(key)
            if is_first := lookup is None:
                if len(self._lookups) >= _MAX_LOOKUPS or not _LOOKUP_KEY.fullmatch(key):
                    return None
                lookup = self._lookups[key] = Future()
        if is_first:
            try:
                lookup.set_result(self.fetch(key))
            except BaseException as fault:
                with self._lock:
                    self._lookups.pop(key, None)  # the next caller tries again
                lookup.set_exception(fault)
        record = lookup.result()
        return None if record.content is None else record

    def fetch(self, key: str) -> Record:
        """The current state of one record."""
        found = self._bucket.read(self._path(key))
        if found is None:
            return Record(key, None, revision=-1)
        record = Record(key, None, etag=found.etag, version=found.version, age=found.age)
        try:
            document = json.loads(found.content)
            removed, sealed = document.pop("_removed", False), document.pop("_sealed", False)
            revision, marks = int(document.pop("_revision", 0)), tuple(document.pop("_marks", ()))
        except (ValueError, TypeError, AttributeError) as fault:
            return replace(record, fault=repr(fault))
        return replace(record, content=None if removed else document, revision=revision, marks=marks, sealed=sealed)

    def remember(self, record: Record) -> bool:
        """Remember this record unless a later one is known; return whether it is news."""
        with self._lock:
            revision, etag = self._known.get(record.key, (-2, None))
            if record.version is None:
                gone = -2 < revision <= record.revision
                if gone:
                    del self._known[record.key]
                return gone
            if record.revision < revision or (record.revision == revision and record.etag == etag):
                return False
            self._known[record.key] = record.revision, record.etag
            return True

    def knows(self, key: str) -> bool:
        """Whether this process knows such a record, or its tombstone."""
        with self._lock:
            return key in self._known

    @contextlib.contextmanager
    def forgetting_on_failure(self, key: str) -> Iterator[None]:
        """Change a record and its row together. If one fails, the record counts as changed and is read again."""
        try:
            yield
        except BaseException:
            self.forget(key)
            raise

    def forget(self, key: str) -> None:
        """Forget a record: its next state is news again."""
        with self._lock:
            self._known.pop(key, None)

    def report_damage(self, key: str, fault: object) -> None:
        """Report once that an object is not a valid record. Its last valid state stays known."""
        path = self._path(key)
        if path not in self.damaged:
            log.error("%s in the object store is damaged: %s", path, fault)
        self.damaged.add(path)

    def _read_all(self, keys: list[str]) -> Iterator[Record]:
        """Read the records of these keys, without damaged ones."""
        with ThreadPoolExecutor(_READERS, thread_name_prefix="records") as readers:
            for record in readers.map(self.fetch, keys):
                if record.fault is not None:
                    self.report_damage(record.key, record.fault)
                else:
                    self.damaged.discard(self._path(record.key))
                    yield record

    # --- changing ------------------------------------------------------------------------------------

    def change(self, key: str, apply: Callable[[Content | None], Content | None]) -> Record:
        """Replace a record's content by `apply` of it; None stands for no record. Durable on return.

        `apply` is called again when another server came first. An unchanged result is not written; the errors of
        `apply` are raised. After RemoteUnavailable the change may or may not have been made.
        """
        mark, deadline, wait, failed_writes = uuid.uuid4().hex, time.monotonic() + _RETRY_SECONDS, _FIRST_WAIT, 0
        while True:
            before = self.fetch(key)
            if mark in before.marks:  # the write succeeded, its answer was lost
                return self._remembered(before)
            if not before.sealed or before.seal_expired:
                after = apply(before.content)
                if after == before.content:
                    return self._remembered(before)
                try:
                    return self._remembered(self._write(before, after, mark))
                except Conflict:
                    pass
                except RemoteUnavailable:
                    failed_writes += 1
                    if failed_writes >= _MAX_FAILED_WRITES and mark not in self.fetch(key).marks:
                        raise
            if time.monotonic() > deadline:
                raise RemoteUnavailable(f"{self._path(key)} is changed too often by other servers")
            time.sleep(random.uniform(0, wait))
            wait = min(2 * wait, _LONGEST_WAIT)

    def _write(self, before: Record, content: Content | None, mark: str, *, sealed: bool = False) -> Record:
        # From the clock: a record created after its tombstone was removed is newer than any revision known elsewhere.
        revision = max(before.revision + 1, time.time_ns() // 1000)
        marks = (mark, *before.marks)[:_MARKS]
        document: Content = {"_removed": True} if content is None else dict(content)
        document |= {"_revision": revision, "_marks": marks} | ({"_sealed": True} if sealed else {})
        path = self._path(before.key)
        etag = self._bucket.put_if(path, json.dumps(document).encode(), before.version)
        return Record(before.key, content, revision, marks, etag, version={})

    def _remembered(self, record: Record) -> Record:
        self.remember(record)
        return record

    # --- tombstones ----------------------------------------------------------------------------------

    def remove_tombstones(self, seconds: float) -> int:
        """Remove the tombstones of records removed more than `seconds` ago; return the count.

        An object cannot be removed on condition that it is unchanged. So it is sealed first: no record is created in
        its place until it is gone or its seal is old.
        """
        count = 0
        old = [self._key(entry.path) for entry in self._entries() if entry.age > seconds]
        for record in list(self._read_all(old)):
            if record.content is not None or record.version is None or (record.sealed and not record.seal_expired):
                continue
            began = time.monotonic()
            with contextlib.suppress(Conflict):
                self._write(record, None, uuid.uuid4().hex, sealed=True)
                if time.monotonic() - began < _REMOVAL_SECONDS:
                    self._bucket.delete([self._path(record.key)])
                    count += 1
        return count

    # --- paths ---------------------------------------------------------------------------------------

    def _entries(self) -> list[Entry]:
        found = [entry for entry in self._bucket.list(self._prefix) if entry.path.endswith(_SUFFIX)]
        self.damaged.intersection_update({entry.path for entry in found})
        return found

    def _path(self, key: str) -> str:
        return f"{self._prefix}/{key}{_SUFFIX}"

    def _key(self, path: str) -> str:
        return path.removeprefix(f"{self._prefix}/").removesuffix(_SUFFIX)
