"""Responses of one server: stored with their input in the job database, and those running in the background.

A stored response is on disk. A response that was running when the server ended has failed.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import msgspec

from adapters.background import run_in
from adapters.disk import StorageFull
from adapters.storage.database import Database, DatabaseBusy
from adapters.storage.versions import RemoteUnavailable
from server.errors import InvalidRequest, NotFound, printable
from server.responses.running import Ended, Followed, Running

DAY = 86400
RETRY_SECONDS = 1.0  # before another attempt to store a response
_STORING_SECONDS = 5.0  # longest wait of a client for a response being stored
STOPPED = {"code": "server_error", "message": "The server stopped while this response was being made."}

log = logging.getLogger("lorakeet.responses")

Fields = dict[str, Any]


@dataclass(frozen=True)
class KeptResponse:
    """A response, its input items, and the events of its stream if it was streamed in the background."""

    response: Fields
    items: list[Fields]
    events: list[Fields] | None

    @property
    def in_progress(self) -> bool:
        """Whether the response is in progress."""
        return bool(self.response["status"] == "in_progress")


def as_failed(kept: KeptResponse) -> KeptResponse:
    """Return a response as failed, in its events as well, because its server has stopped."""
    response, events = kept.response | {"status": "failed", "error": STOPPED}, kept.events
    if events is not None:
        events = [*events, {"type": "response.failed", "sequence_number": len(events), "response": response}]
    return KeptResponse(response, kept.items, events)


class ResponseStore:
    """Stored responses of one server; `SharedResponses` holds those of several.

    Args:
        days: how long a response is kept; 0: none is.
        max_bytes: of all responses; the oldest are removed first.
    """

    def __init__(self, database: Database, days: float, max_bytes: int) -> None:
        self.enabled = days > 0
        self.running: dict[str, Running] = {}
        self._database = database
        self._seconds = days * DAY
        self._max_bytes = max_bytes
        with database.reading() as connection:
            self._bytes: int = connection.execute("SELECT ifnull(sum(bytes), 0) FROM responses").fetchone()[0]
        with suppress(StorageFull, DatabaseBusy):
            self._write(lambda: 0)

    async def run(self) -> None:
        """Do housekeeping in the background until cancelled; a single server has none."""

    # --- stored responses

    async def keep(self, tenant: str, response: Any, items: list[Fields], events: list[Any] | None = None) -> bool:
        """Store a response or its new state; return False if clients were sent another final state.

        Raises InvalidRequest for a response that is too large.

        Storing a finished background response is retried until it succeeds. A cancelled caller still waits for a change
        in progress to finish: the next step may be to delete the response.

        events: of its stream, for a background response.
        """
        running = self.running.get(response.id) if response.status != "in_progress" else None
        if running is not None:
            running.settled = True
        while True:
            try:
                return await run_in(None, partial(self._save, tenant, response, items, events))
            except (StorageFull, DatabaseBusy, RemoteUnavailable) as fault:
                if running is None or not self._decides_outcome(running):
                    raise
                log.warning("response %s is retried after a fault: %s", response.id, fault)
            await asyncio.sleep(RETRY_SECONDS)

    def _decides_outcome(self, running: Running) -> bool:
        """Whether this server decides the final state of a response."""
        return True

    def _save(self, tenant: str, response: Any, items: list[Fields], events: list[Any] | None) -> bool:
        record, sent, log_ = (msgspec.json.encode(part).decode() for part in (response, items, events))
        size = self._checked_size(len(record) + len(sent) + len(log_))
        row = (response.id, tenant, response.created_at, size, record, sent, log_)

        def write() -> int:
            with self._database.transaction() as connection:
                old = connection.execute("SELECT bytes FROM responses WHERE id = ?", (response.id,)).fetchone()
                connection.execute(
                    "INSERT INTO responses (id, tenant, created_at, bytes, record, items, events) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET "
                    "bytes = excluded.bytes, record = excluded.record, events = excluded.events",
                    row,
                )
            return size - (old["bytes"] if old else 0)

        self._write(write)
        return True

    def _checked_size(self, size: int) -> int:
        if size > self._max_bytes:
            message = f"The response has {size} bytes, of {self._max_bytes} that are kept (--response-bytes)."
            raise InvalidRequest(message, param="store")
        return size

    def get(self, tenant: str, id_: str, *, param: str = "id") -> KeptResponse:
        """Return a stored response. Raises NotFound."""
        kept = self._row(tenant, id_)
        if kept is None:
            raise NotFound(f"No such response: {printable(id_)}; it was not stored, or no longer is.", param=param)
        return as_failed(kept) if kept.in_progress and id_ not in self.running else kept

    def _row(self, tenant: str, id_: str) -> KeptResponse | None:
        with self._database.reading() as connection:
            row = connection.execute(
                "SELECT * FROM responses WHERE id = ? AND tenant = ? AND created_at >= ?",
                (id_, tenant, time.time() - self._seconds),
            ).fetchone()
        if row is None:
            return None
        response, items, events = (msgspec.json.decode(row[column]) for column in ("record", "items", "events"))
        kept = KeptResponse(response, items, events)
        # Rows written by version 0.1 have an empty list instead of null.
        return kept if events or kept.in_progress else replace(kept, events=None)

    def item(self, tenant: str, id_: str, param: str) -> Fields:
        """Return an item of a stored response, input or output. Raises NotFound."""
        number = id_.partition("_")[2].partition("_")[0]
        with suppress(NotFound):
            kept = self.get(tenant, f"resp_{number}")
            for item in (*kept.items, *kept.response["output"]):
                if item["id"] == id_:
                    found: Fields = item
                    return found
        raise NotFound(f"No such item: {printable(id_)}; its response was not stored, or no longer is.", param=param)

    def stored_bytes(self, tenant: str) -> int:
        """Return the total bytes of a tenant's responses."""
        query = "SELECT COALESCE(SUM(bytes), 0) FROM responses WHERE tenant = ?"
        with self._database.reading() as connection:
            found: int = connection.execute(query, (tenant,)).fetchone()[0]
        return found

    async def delete(self, tenant: str, id_: str) -> None:
        """Delete a response; a running one is stopped. Raises NotFound."""
        await asyncio.to_thread(self.get, tenant, id_)
        if (running := self.running.get(id_)) is not None:
            await running.stop()
        await asyncio.to_thread(self._remove, tenant, id_)

    def _remove(self, tenant: str, id_: str) -> None:
        def write() -> int:
            with self._database.transaction() as connection:
                row = connection.execute("SELECT bytes FROM responses WHERE id = ?", (id_,)).fetchone()
                connection.execute("DELETE FROM responses WHERE id = ?", (id_,))
            return -row["bytes"] if row else 0

        self._write(write, removing=True)

    def _write(self, change: Callable[[], int], *, removing: bool = False) -> None:
        """Apply a change, which returns the bytes it added, and remove expired and excess responses."""
        with self._database.transaction(removing=removing) as connection:
            total = self._bytes + change()
            horizon = time.time() - self._seconds
            oldest = "SELECT number, created_at, bytes FROM responses ORDER BY number LIMIT 1"
            while row := connection.execute(oldest).fetchone():
                if row["created_at"] >= horizon and total <= self._max_bytes:
                    break
                connection.execute("DELETE FROM responses WHERE number = ?", (row["number"],))
                total -= row["bytes"]
            self._database.after_commit(lambda: setattr(self, "_bytes", total))

    # --- background responses

    def start(self, running: Running, work: Callable[[], Awaitable[None]]) -> None:
        """Run `work`, which publishes the events, in a task."""

        def end(_: asyncio.Task[None]) -> None:
            running.end()
            self.running.pop(running.id, None)

        self.running[running.id] = running
        running.task = asyncio.create_task(self._run_work(running, work))
        running.task.add_done_callback(end)

    async def _run_work(self, running: Running, work: Callable[[], Awaitable[None]]) -> None:
        await work()

    def events(self, kept: KeptResponse, tenant: str) -> Followed | None:
        """Return the events of a background response that was started as a stream, else None."""
        id_ = kept.response["id"]
        if id_ in self.running:
            return self.running[id_]
        return None if kept.events is None else Ended(kept.events)

    async def cancel(self, tenant: str, id_: str) -> None:
        """Stop a running response; its output so far is stored."""
        if (running := self.running.get(id_)) is None:
            return
        if not running.settled:  # else it has finished and is about to be stored
            running.cancelled = True
            running.cancel()
        if running.task is not None:
            await asyncio.wait({running.task}, timeout=_STORING_SECONDS)

    async def stop(self) -> None:
        """Stop all background responses."""
        await asyncio.gather(*(running.stop() for running in list(self.running.values())))
