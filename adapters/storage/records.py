"""Small records that many servers change and all of them see: one JSON object each, in a bucket.

A record is changed by a function of its content, which is applied to the newest one and written only if that is still
there: whoever comes second applies it again. A record that is removed leaves a tombstone, so that a list which is late
looks like neither a removal nor a return. Each content has a revision, larger than that of any before, and the marks
of the last changes: whoever got no answer, or the answer to a second try, finds out whether its own was made.
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
_PATIENCE = 20.0  # seconds for which a change that others come before is tried again
_REFUSALS = 3  # of a write, by a bucket that answers reads, before its change is given up
_FIRST_WAIT, _LONGEST_WAIT = 0.005, 0.5
_SEAL_SECONDS = 3600.0  # after which a tombstone that was to go, and is still there, may be used again
_REMOVAL_SECONDS = 60.0  # in which a sealed tombstone goes, or stays
_SUFFIX = ".json"
_LOOKS = 64  # at keys not known here, between two lists
_PLAIN = re.compile(r"[A-Za-z0-9_-]{1,128}")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """One record as it was read.

    Attributes:
        content: None when it was removed, was never there or is damaged.
        version: None when there is not even a tombstone.
        sealed: a tombstone that is about to go.
        age: seconds since it was written.
        fault: its damage.
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
        """Whether somebody removed it, as far as is remembered."""
        return self.content is None and self.version is not None and self.fault is None

    @property
    def abandoned(self) -> bool:
        """Whether whoever sealed it will not take it away any more."""
        return self.age > _SEAL_SECONDS


class Records:
    """The records below one prefix of a bucket; everything that waits for it raises RemoteUnavailable.

    A key may have slashes. Used from any thread.

    Attributes:
        damaged: paths of objects that are no records.
    """

    def __init__(self, bucket: Bucket, prefix: str) -> None:
        self.damaged: set[str] = set()
        self._bucket = bucket
        self._prefix = prefix
        self._known: dict[str, tuple[int, str | None]] = {}  # key -> revision, ETag
        self._missed: dict[str, Future[Record]] = {}  # what was looked for since the last list
        self._lock = threading.Lock()

    # --- seeing --------------------------------------------------------------------------------------

    def news(self) -> Iterator[Record]:
        """Records that are not those known here. They become known one by one, by `note`."""
        with self._lock:
            known = dict(self._known)
            self._missed.clear()
        listed = {self._key(entry.path): entry.etag for entry in self._entries()}
        changed = [key for key, etag in listed.items() if key not in known or known[key][1] != etag]
        missing = [key for key in known if key not in listed]  # by a list that is late, or by `sweep`
        for record in self._read_all([*changed, *missing]):
            gone = record.version is None and record.key in known
            yield replace(record, revision=known[record.key][0]) if gone else record

    def all(self) -> Iterator[Record]:
        """Every record as it is now, those removed left out."""
        records = self._read_all([self._key(entry.path) for entry in self._entries()])
        return (record for record in records if record.content is not None)

    def miss(self, key: str) -> Record | None:
        """A record that somebody asks for and that is not known here; looked for once between two lists.

        Whoever asks meanwhile waits for the same answer.
        """
        with self._lock:
            found = self._missed.get(key)
            if mine := found is None:
                if len(self._missed) >= _LOOKS or not _PLAIN.fullmatch(key):
                    return None
                found = self._missed[key] = Future()
        if mine:
            try:
                found.set_result(self.look(key))
            except BaseException as fault:
                with self._lock:
                    self._missed.pop(key, None)  # the next one tries again
                found.set_exception(fault)
        record = found.result()
        return None if record.content is None else record

    def look(self, key: str) -> Record:
        """One record as it is now."""
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

    def note(self, record: Record) -> bool:
        """Know this record, unless a later one is known; whether it is news."""
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
        """Whether there is such a record, or was, as far as is known here."""
        with self._lock:
            return key in self._known

    def forget(self, key: str) -> None:
        """Know a record no more: whatever it says is news again."""
        with self._lock:
            self._known.pop(key, None)

    def damage(self, key: str, fault: object) -> None:
        """Say once that an object is no record. What it said before goes on being known."""
        path = self._path(key)
        if path not in self.damaged:
            log.error("%s in the object store is damaged: %s", path, fault)
        self.damaged.add(path)

    def _read_all(self, keys: list[str]) -> Iterator[Record]:
        """Read the records of these keys, those left out that are damaged."""
        with ThreadPoolExecutor(_READERS, thread_name_prefix="records") as readers:
            for record in readers.map(self.look, keys):
                if record.fault is not None:
                    self.damage(record.key, record.fault)
                else:
                    self.damaged.discard(self._path(record.key))
                    yield record

    # --- changing ------------------------------------------------------------------------------------

    def change(self, key: str, apply: Callable[[Content | None], Content | None]) -> Record:
        """Replace a record's content by what `apply` makes of it; None stands for no record. Durable on return.

        `apply` is called again when another server came first. What it returns unchanged is not written; what it
        raises, this does. After RemoteUnavailable the change may have been made, or not.
        """
        mark, deadline, wait, refused = uuid.uuid4().hex, time.monotonic() + _PATIENCE, _FIRST_WAIT, 0
        while True:
            before = self.look(key)
            if mark in before.marks:  # it was made, and the answer lost
                return self._noted(before)
            if not before.sealed or before.abandoned:
                after = apply(before.content)
                if after == before.content:
                    return self._noted(before)
                try:
                    return self._noted(self._write(before, after, mark))
                except Conflict:
                    pass
                except RemoteUnavailable:
                    refused += 1
                    if refused >= _REFUSALS and mark not in self.look(key).marks:
                        raise
            if time.monotonic() > deadline:
                raise RemoteUnavailable(f"{self._path(key)} is changed by others all the time")
            time.sleep(random.uniform(0, wait))
            wait = min(2 * wait, _LONGEST_WAIT)

    def _write(self, before: Record, content: Content | None, mark: str, *, sealed: bool = False) -> Record:
        # Time in it: a record that comes back after its tombstone has gone is newer than anybody remembers.
        revision = max(before.revision + 1, time.time_ns() // 1000)
        marks = (mark, *before.marks)[:_MARKS]
        document: Content = {"_removed": True} if content is None else dict(content)
        document |= {"_revision": revision, "_marks": marks} | ({"_sealed": True} if sealed else {})
        path = self._path(before.key)
        etag = self._bucket.put_if(path, json.dumps(document).encode(), before.version)
        return Record(before.key, content, revision, marks, etag, version={})

    def _noted(self, record: Record) -> Record:
        self.note(record)
        return record

    # --- tombstones ----------------------------------------------------------------------------------

    def sweep(self, seconds: float) -> int:
        """Take away tombstones of records that were removed so many seconds ago; how many.

        An object cannot be removed on condition that it is still the same. So it is sealed first: nobody makes a
        record of it then, until it is gone or its seal is old.
        """
        count = 0
        old = [self._key(entry.path) for entry in self._entries() if entry.age > seconds]
        for record in list(self._read_all(old)):
            if record.content is not None or record.version is None or (record.sealed and not record.abandoned):
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
