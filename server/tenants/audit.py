"""Who changed what: JSON lines in the data directory, the newest last."""

import asyncio
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import msgspec

from adapters.storage.database import UnknownCursorError
from server.tenants.caller import DEFAULT_NAME, Caller, tenant_name

OLDER = 4  # files beside the one that is written to

log = logging.getLogger(__name__)


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One change. `key`: the id of the key, null without one; `object`: its name or id."""

    id: str
    time: float
    tenant: str
    key: str | None
    action: str
    object: str | None
    digest: str | None
    request_id: str | None


class AuditLog:
    """One server's.

    Args:
        max_bytes: of a file, beyond which the next is begun.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._path = path
        self._max_bytes = max_bytes
        self._lock = threading.Lock()

    async def record(
        self, caller: Caller, action: str, named: str | None, digest: str | None, request_id: str | None
    ) -> None:
        """Write down a change that was made. A disk that takes nothing is logged: the change stands."""
        entry = Entry(
            id=f"audit-{uuid4().hex}",
            time=round(time.time(), 3),
            tenant=caller.tenant or DEFAULT_NAME,
            key=caller.key or None,
            action=action,
            object=named,
            digest=digest,
            request_id=request_id,
        )
        try:
            await asyncio.to_thread(self._append, msgspec.json.encode(entry) + b"\n")
        except OSError as fault:
            log.error("%s takes nothing (%s): %s", self._path, fault, msgspec.json.encode(entry).decode())

    def _append(self, line: bytes) -> None:
        with self._lock:
            if self._path.exists() and self._path.stat().st_size + len(line) > self._max_bytes:
                for i in range(OLDER, 0, -1):
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
        """Newest first, and whether more follow; `tenant` None: all tenants'. Raises UnknownCursorError."""
        found: list[Entry] = []
        started = after is None
        for entry in self._entries():
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

    def _entries(self) -> Iterator[Entry]:
        with self._lock:
            contents = [path.read_bytes() for i in range(OLDER + 1) if (path := self._file(i)).exists()]
        for content in contents:
            for line in reversed(content.splitlines()):
                try:
                    yield msgspec.json.decode(line, type=Entry)
                except msgspec.DecodeError:  # the end of a line that a crash cut short
                    continue
