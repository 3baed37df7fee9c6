"""Responses that are kept: their objects and their input in the job database, and those that run in the background.

A response that has been kept is on disk. One that was running when the server ended has failed.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import msgspec

from adapters.disk import StorageFull
from adapters.storage.database import Database, DatabaseBusy
from server.errors import InvalidRequest, NotFound, shown

_DAY = 86400

log = logging.getLogger(__name__)

Fields = dict[str, Any]


@dataclass(frozen=True)
class KeptResponse:
    """A response, the items that it answered, and the events of its stream, if it was one in the background."""

    response: Fields
    items: list[Fields]
    events: list[Fields]


@dataclass
class Running:
    """A response in the making in the background, and its events so far."""

    events: list[Any] = field(default_factory=list)
    task: asyncio.Task[None] | None = None
    cancelled: bool = False
    _more: asyncio.Event = field(default_factory=asyncio.Event)
    _ended: bool = False

    def publish(self, event: Any) -> None:
        """One more event."""
        self.events.append(event)
        self._wake()

    def end(self) -> None:
        """No more follow."""
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        more, self._more = self._more, asyncio.Event()
        more.set()

    async def follow(self, after: int) -> AsyncGenerator[Any, None]:
        """Events from the one behind this number on, as they come."""
        position = after + 1
        while True:
            more = self._more
            for event in self.events[position:]:
                yield event
            position = max(position, len(self.events))
            if self._ended and position >= len(self.events):
                return
            if not self._ended:
                await more.wait()


class ResponseStore:
    """All responses of one server that are kept.

    Args:
        days: that a response is kept; 0: none is.
        max_bytes: of all of them; the oldest go first.
    """

    def __init__(self, database: Database, days: float, max_bytes: int) -> None:
        self.enabled = days > 0
        self.running: dict[str, Running] = {}
        self._database = database
        self._seconds = days * _DAY
        self._max_bytes = max_bytes
        with database.reading() as connection:
            self._bytes: int = connection.execute("SELECT ifnull(sum(bytes), 0) FROM responses").fetchone()[0]
        with suppress(StorageFull, DatabaseBusy):
            self._write(lambda: 0)

    # --- kept ones

    def save(self, tenant: str, response: Any, items: list[Fields], events: list[Any] | None = None) -> None:
        """Keep a response, or what has become of it since. Raises InvalidRequest for one that is too large."""
        record, sent, log_ = (msgspec.json.encode(part).decode() for part in (response, items, events or []))
        size = len(record) + len(sent) + len(log_)
        if size > self._max_bytes:
            message = f"The response has {size} bytes, of {self._max_bytes} that are kept (--response-bytes)."
            raise InvalidRequest(message, param="store")
        row = (response.id, tenant, response.created_at, size, record, sent, log_)

        def write() -> int:
            with self._database.transaction() as connection:
                known = connection.execute("SELECT bytes FROM responses WHERE id = ?", (response.id,)).fetchone()
                connection.execute(
                    "INSERT INTO responses (id, tenant, created_at, bytes, record, items, events) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET "
                    "bytes = excluded.bytes, record = excluded.record, events = excluded.events",
                    row,
                )
            return size - (known["bytes"] if known else 0)

        self._write(write)

    def get(self, tenant: str, id_: str, *, param: str = "id") -> KeptResponse:
        """Raises NotFound."""
        with self._database.reading() as connection:
            row = connection.execute(
                "SELECT * FROM responses WHERE id = ? AND tenant = ? AND created_at >= ?",
                (id_, tenant, time.time() - self._seconds),
            ).fetchone()
        if row is None:
            raise NotFound(f"No such response: {shown(id_)}; it was not stored, or no longer is.", param=param)
        response, items, events = (msgspec.json.decode(row[column]) for column in ("record", "items", "events"))
        if response["status"] == "in_progress" and id_ not in self.running:
            ended = {"code": "server_error", "message": "The server stopped while this response was being made."}
            response |= {"status": "failed", "error": ended}
        return KeptResponse(response, items, events)

    def item(self, tenant: str, id_: str, param: str) -> Fields:
        """An item of a kept response, input or output. Raises NotFound."""
        number = id_.partition("_")[2].partition("_")[0]
        with suppress(NotFound):
            kept = self.get(tenant, f"resp_{number}")
            for item in (*kept.items, *kept.response["output"]):
                if item["id"] == id_:
                    found: Fields = item
                    return found
        raise NotFound(f"No such item: {shown(id_)}; its response was not stored, or no longer is.", param=param)

    async def delete(self, tenant: str, id_: str) -> None:
        """Forget a response; one that runs is stopped. Raises NotFound."""
        await asyncio.to_thread(self.get, tenant, id_)
        await self._stop(id_)

        def write() -> int:
            with self._database.transaction() as connection:
                row = connection.execute("SELECT bytes FROM responses WHERE id = ?", (id_,)).fetchone()
                connection.execute("DELETE FROM responses WHERE id = ?", (id_,))
            return -row["bytes"] if row else 0

        await asyncio.to_thread(self._write, write, removing=True)

    def _write(self, change: Callable[[], int], *, removing: bool = False) -> None:
        """A change, which says how many bytes there are more, and the end of what is too old or too much."""
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

    # --- in the background

    def begin(self, id_: str, running: Running, work: Awaitable[None]) -> None:
        """Run `work`, which publishes."""

        async def run() -> None:
            try:
                await work
            finally:
                running.end()
                self.running.pop(id_, None)

        self.running[id_] = running
        running.task = asyncio.create_task(run())

    async def cancel(self, id_: str) -> None:
        """Stop one that runs; what it has so far is kept."""
        if (running := self.running.get(id_)) is not None:
            running.cancelled = True
            await self._stop(id_)

    async def stop(self) -> None:
        """Stop all that run."""
        for id_ in list(self.running):
            await self._stop(id_)

    async def _stop(self, id_: str) -> None:
        running = self.running.get(id_)
        if running is not None and running.task is not None:
            running.task.cancel()
            await asyncio.gather(running.task, return_exceptions=True)
