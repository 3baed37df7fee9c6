"""Names and files of adapters in an object store, for any number of servers.

`versions/<digest>/<file>` holds the files of a version's directory, `names/<tenant>/<name>.json` a name's pointer (see
`adapters.storage.records`). A name is written after its files, so readers find the old state or the new one.

A version without a name is removed only by the server that collects orphans, because that takes a list of all names. It
writes the mark `condemned/<digest>.json` first, then looks for new files before it removes any. A server about to name
a version writes files of it first, then looks for that mark.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path

from adapters.peft_format.directory import CONFIG_NAME, SPEC_NAME, WEIGHTS_NAME
from adapters.peft_format.packed_rows import ROWS_NAME
from adapters.peft_format.record import RECORD_NAME
from adapters.storage.bucket import Bucket, Conflict, Entry
from adapters.storage.names import Apply
from adapters.storage.records import Content, Record, Records
from adapters.storage.silence import REQUEST_LIMITS, RequestLimits
from adapters.storage.versions import DamagedAdapter, Locate, Pointer, RemotePointer, RemoteUnavailable, Version

REQUIRED = (CONFIG_NAME, SPEC_NAME, WEIGHTS_NAME)
_DAMAGE = (ValueError, LookupError, TypeError)  # errors of reading a damaged name
_CONDEMNED_SECONDS = 3600.0  # by then the server that removes a version has finished, or died
_CONDEMNED_WAIT = 10.0  # time limit for an upload of a condemned version
_WAIT = 0.05
_REMOVED_AT_ONCE = 256

log = logging.getLogger(__name__)


class RemoteStore:
    """Names (as `Names`) and files of versions in one bucket, where other servers see and change them.

    All methods but `remember` wait for a network, and raise RemoteUnavailable. See `Bucket` for the URL and its errors.
    """

    title = "the object store"

    def __init__(self, url: str, limits: RequestLimits = REQUEST_LIMITS) -> None:
        self.unreadable: set[str] = set()
        self.bucket = Bucket(url, limits)
        self._names = Records(self.bucket, "names")

    # --- names -----------------------------------------------------------------------------------------

    def load(self, locate: Locate) -> Iterator[Pointer]:
        for remote in self.fetch_changes(locate):
            if self.remember(remote) and remote.pointer is not None:
                yield remote.pointer

    def change(self, tenant: str, name: str, last_seen: Pointer | None, apply: Apply, locate: Locate) -> Pointer | None:
        def applied(content: Content | None) -> Content | None:
            before = _pointer_or_none(content, locate)
            after = apply(before)
            if after == before:
                return content
            return None if after is None else _content(after)

        return _pointer_or_none(self._names.change(_key(tenant, name), applied).content, locate)

    def fetch_changes(self, locate: Locate) -> Iterator[RemotePointer]:
        """Pointers that differ from those known here."""
        for record in self._names.fetch_changes():
            if (remote := self._remote_pointer(record, locate)) is not None:
                yield remote

    def fetch_pointer(self, tenant: str, name: str, locate: Locate) -> RemotePointer | None:
        """The current pointer of one name; None when it cannot be read."""
        return self._remote_pointer(self._names.fetch(_key(tenant, name)), locate)

    def remember(self, remote: RemotePointer) -> bool:
        """Remember this pointer unless a later one is known; return whether it is news. Does not wait."""
        return self._names.remember(remote.record)

    def _remote_pointer(self, record: Record, locate: Locate) -> RemotePointer | None:
        try:
            tenant, name = _owner(record.key)
            pointer = None if record.content is None else _pointer(record.content, locate)
        except _DAMAGE as fault:
            record = replace(record, fault=repr(fault))
        if record.fault is not None:
            self._names.report_damage(record.key, record.fault)
            return None
        return RemotePointer(tenant, name, pointer, record)

    # --- files -----------------------------------------------------------------------------------------

    def put(self, digest: str, directory: Path, *, named: bool) -> None:
        """Store a version's files, for a name about to have it. `named`: a name has it already, as far as this server
        knows."""
        derived = {ROWS_NAME, RECORD_NAME}  # by each server that fetches the others
        names = {path.name for path in directory.iterdir()} - derived
        deadline = time.monotonic() + _CONDEMNED_WAIT
        while True:
            for name in sorted({CONFIG_NAME} & names if named else names):
                self.bucket.put_file(_path(digest, name), directory / name)
            mark = self.bucket.read(_condemned(digest))
            stored = {entry.path.rpartition("/")[2] for entry in self._files(digest)}
            if names <= stored and (mark is None or mark.age > _CONDEMNED_SECONDS):
                return
            if time.monotonic() > deadline:
                raise RemoteUnavailable(f"{digest} is being removed")
            named = False
            time.sleep(_WAIT)

    def get(self, digest: str, directory: Path) -> None:
        """Copy a version's files into an empty directory. Raises DamagedAdapter when a required one is missing."""
        names = [entry.path.rpartition("/")[2] for entry in self._files(digest)]
        if missing := set(REQUIRED) - set(names):
            raise DamagedAdapter(f"the object store has no {', '.join(sorted(missing))} of {digest}")
        for name in names:
            self.bucket.get_file(_path(digest, name), directory / name)

    def remove_orphans(self, seconds: float, is_needed: Callable[[str], bool]) -> int:
        """Remove versions that have no name, are not needed here, and have no file written in the last `seconds`.

        Returns the count. None is removed while a name cannot be read.
        """
        self._names.remove_tombstones(seconds)
        found = [digest for digest in self._find_unnamed(seconds, None) if not is_needed(digest)]
        starts = range(0, len(found), _REMOVED_AT_ONCE)
        return sum(self._remove(found[start : start + _REMOVED_AT_ONCE], seconds) for start in starts)

    def _find_unnamed(self, seconds: float, candidates: Collection[str] | None) -> set[str]:
        """Versions without a name, all of their files older than `seconds`; none while a name cannot be read."""
        ages: dict[str, float] = {}
        for entry in self.bucket.list("versions"):  # before the names: a version named meanwhile is kept
            digest = f"sha256:{entry.path.split('/')[1]}"
            ages[digest] = min(entry.age, ages.get(digest, entry.age))
        old = {digest for digest, age in ages.items() if age > seconds and (candidates is None or digest in candidates)}
        for record in self._names.all() if old else ():
            remote = self._remote_pointer(record, Path)
            old -= {version.digest for version in remote.pointer.versions} if remote and remote.pointer else set()
        if old and self._names.damaged:
            log.warning("names in the object store are damaged; files that no name has are left there")
            return set()
        return old

    def _remove(self, digests: Collection[str], seconds: float) -> int:
        began, marked = time.monotonic(), []
        for digest in digests:
            with contextlib.suppress(Conflict):  # another server is removing it
                mark = self.bucket.read(_condemned(digest))
                if mark is None or mark.age > _CONDEMNED_SECONDS:
                    self.bucket.put_if(_condemned(digest), b"{}", mark and mark.version)
                    marked.append(digest)
        unnamed = self._find_unnamed(seconds, marked)
        for digest in marked:
            if digest in unnamed and time.monotonic() - began < _CONDEMNED_SECONDS / 2:
                self.bucket.delete([entry.path for entry in self._files(digest)])
            self.bucket.delete([_condemned(digest)])
        return len(unnamed)

    def _files(self, digest: str) -> list[Entry]:
        return self.bucket.list(_path(digest, "").rstrip("/"))


def _path(digest: str, name: str) -> str:
    return f"versions/{digest.removeprefix('sha256:')}/{name}"


def _condemned(digest: str) -> str:
    return f"condemned/{digest.removeprefix('sha256:')}.json"


def _key(tenant: str, name: str) -> str:
    """The key of a name's record. No name has a "+", and a tenant is not safe in a path."""
    return f"tenant-{tenant.encode().hex()}/{name.replace('/', '+')}"


def _owner(key: str) -> tuple[str, str]:
    tenant, name = key.removeprefix("tenant-").split("/")
    return bytes.fromhex(tenant).decode(), name.replace("+", "/")


def _content(pointer: Pointer) -> Content:
    owner = pointer.current
    versions = [
        {"digest": one.digest, "created": one.created, "receipt": one.receipt, "staged": one.staged}
        for one in pointer.versions
    ]
    document = {"tenant": owner.tenant, "name": owner.name, "versions": versions}
    return document | {"split": pointer.split, "pinned": pointer.pinned, "readers": pointer.readers}


def _pointer(document: Content, locate: Locate) -> Pointer:
    tenant, name = document["tenant"], document["name"]
    versions = tuple(Version(tenant, name, path=locate(one["digest"]), **one) for one in document["versions"])
    split = tuple((digest, share) for digest, share in document["split"])
    pointer = Pointer(versions, split, document["pinned"], tuple(document.get("readers", ())))
    _ = pointer.answering  # raises when a version is missing
    return pointer


def _pointer_or_none(content: Content | None, locate: Locate) -> Pointer | None:
    """A name's pointer; a damaged one counts as none until it is changed."""
    try:
        return None if content is None else _pointer(content, locate)
    except _DAMAGE:
        return None
