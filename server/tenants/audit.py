"""The audit log: JSON lines in the data directory, the newest last, and in the object store when there is one."""

import asyncio
import heapq
import logging
import os
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import msgspec

from adapters.storage.database import UnknownCursorError
from server.tenants.caller import DEFAULT_NAME, Caller, tenant_name

if TYPE_CHECKING:
    from adapters.storage.pages import Pages

OLD_FILES = 4  # files beside the current one

log = logging.getLogger(__name__)


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One change. `key`: the id of the caller's key, null without one; `object`: the changed object's name or id."""

    id: str
    time: float
    tenant: str
    key: str | None
    action: str
    object: str | None
    digest: str | None
    request_id: str | None


_ENTRIES = msgspec.json.Decoder(Entry)  # made in one thread: msgspec crashes if several threads use a new type at once


class AuditLog:
    """The audit log of one server.

    Args:
        max_bytes: maximal size of a file, beyond which a new one is started.
        pages: hourly pages in the object store, through which servers see each other's entries.
    """

    def __init__(self, path: Path, max_bytes: int, pages: "Pages | None" = None) -> None:
        self._path = path
        self._pages = pages
        self._unsent: list[Entry] = []
        self._caught_up = False  # whether entries from before this start are in `_unsent`, too
        self._max_bytes = max_bytes
        self._lock = threading.Lock()

    async def record(
        self, caller: Caller, action: str, object_name: str | None, digest: str | None, request_id: str | None
    ) -> None:
        """Append a change that was made. If the disk fails, the entry is logged and the change stands."""
        entry = Entry(
            id=f"audit-{uuid4().hex}",
            time=round(time.time(), 3),
            tenant=caller.tenant or DEFAULT_NAME,
            key=caller.key or None,
            action=action,
            object=object_name,
            digest=digest,
            request_id=request_id,
        )
        if self._pages is not None:
            self._unsent.append(entry)
        try:
            await asyncio.to_thread(self._append, msgspec.json.encode(entry) + b"\n")
        except OSError as fault:
            log.error("%s cannot be written (%s); entry: %s", self._path, fault, msgspec.json.encode(entry).decode())

    def _append(self, line: bytes) -> None:
        with self._lock:
            if self._path.exists() and self._path.stat().st_size + len(line) > self._max_bytes:
                for i in range(OLD_FILES, 0, -1):
                    older = self._file(i - 1)
                    if older.exists():
                        older.replace(self._file(i))
            with self._path.open("ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())

    def _file(self, age: int) -> Path:
        return self._path.with_name(f"{self._path.name}.{age}") if age else self._path

    def page(self, tenant: str | None, limit: int, after: str | None) -> tuple[list[Entry], bool]:
        """Return entries, newest first, and whether more follow; `tenant` None: of all tenants.

        Raises UnknownCursorError, RemoteUnavailable.
        """
        found: list[Entry] = []
        started = after is None
        for entry in self._all_servers():
            if tenant is not None and entry.tenant != tenant_name(tenant):
                continue
            if not started:
                started = entry.id == after
            elif len(found) == limit:
                return found, True
            else:
                found.append(entry)
        if not started:
            raise UnknownCursorError(after)
        return found, False

    def _entries_on_disk(self) -> Iterator[Entry]:
        """Yield the entries on this disk, newest first."""
        with self._lock:
            contents = [path.read_bytes() for i in range(OLD_FILES + 1) if (path := self._file(i)).exists()]
        for content in contents:
            yield from reversed(_read(content))

    def _all_servers(self) -> Iterator[Entry]:
        """Yield the entries of all servers, each once, newest first."""
        if self._pages is None:
            yield from self._entries_on_disk()
            return
        seen = set()
        for entry in heapq.merge(
            self._entries_on_disk(), self._entries_in_store(self._pages), key=lambda entry: -entry.time
        ):
            if entry.id not in seen:
                seen.add(entry.id)
                yield entry

    def _entries_in_store(self, pages: "Pages") -> Iterator[Entry]:
        """Yield the entries in the object store, newest first."""
        hour, found = "", list[Entry]()
        for page in pages.read("", "~", include_own=True):
            entries = _read(page)
            if entries and _hour(entries[0]) != hour:
                yield from sorted(found, key=lambda entry: -entry.time)
                hour, found = _hour(entries[0]), []
            found += entries
        yield from sorted(found, key=lambda entry: -entry.time)

    def send(self) -> None:
        """Send new entries to the object store. Blocks on the disk and the store; raises RemoteUnavailable."""
        assert self._pages is not None
        if not self._caught_up:
            last = max(self._pages.own_pages(), default="")
            self._unsent += [entry for entry in self._entries_on_disk() if _hour(entry) >= last]
            self._caught_up = True
        new = list(self._unsent)
        for hour in sorted({_hour(entry) for entry in new}):
            entries = [entry for entry in new if _hour(entry) == hour]
            self._pages.write(hour, partial(_merge, entries=entries))
        del self._unsent[: len(new)]


def _hour(entry: Entry) -> str:
    return time.strftime("%Y-%m-%dT%H", time.gmtime(entry.time))


def _merge(page: bytes, entries: list[Entry]) -> bytes:
    """Return the page with these entries added, each once."""
    present = {entry.id for entry in _read(page)}
    fresh = {entry.id: entry for entry in sorted(entries, key=lambda entry: entry.time) if entry.id not in present}
    return page + b"".join(msgspec.json.encode(entry) + b"\n" for entry in fresh.values())


def _read(content: bytes) -> list[Entry]:
    found = []
    for line in content.splitlines():
        try:
            found.append(_ENTRIES.decode(line))
        except msgspec.DecodeError:  # a line truncated by a crash
            continue
    return found
