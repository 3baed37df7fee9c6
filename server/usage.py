"""Usage: of each adapter since the server's start, in memory, and of each tenant by day, on disk."""

import asyncio
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from adapters.background import run_in, thread_pool
from adapters.storage.database import Database
from adapters.storage.versions import RemoteUnavailable

if TYPE_CHECKING:
    from adapters.storage.pages import Pages

RETRY_SECONDS = 1.0  # after a failed write
COUNTS = ("requests", "prompt_tokens", "cached_tokens", "generated_tokens", "trained_tokens", "device_seconds")

_ADD = (
    f"INSERT INTO usage (tenant, adapter, day, {', '.join(COUNTS)}) VALUES (?, ?, ?{', ?' * len(COUNTS)}) "
    f"ON CONFLICT DO UPDATE SET {', '.join(f'{name} = {name} + excluded.{name}' for name in COUNTS)}"
)

log = logging.getLogger(__name__)


@dataclass
class Usage:
    """Requests for an adapter, their prompt and generated tokens, and the Unix time of the last one."""

    requests: int = 0
    tokens: int = 0
    last_used: float | None = None


class AdapterUsage:
    """Usage by calling tenant and adapter, only of adapters that were resolved to a stored version."""

    def __init__(self) -> None:
        self._entries: dict[tuple[str, str], Usage] = {}

    def begin(self, tenant: str, adapters: Sequence[str]) -> list[Usage]:
        """Count a request; return the entries for its tokens."""
        entries = [self._entries.setdefault((tenant, label), Usage()) for label in adapters]
        for entry in entries:
            entry.requests += 1
            entry.last_used = time.time()
        return entries

    def get(self, tenant: str, adapter: str) -> Usage:
        return self._entries.get((tenant, adapter)) or Usage()

    def forget(self, adapter: str) -> None:
        self._entries = {key: usage for key, usage in self._entries.items() if key[1] != adapter}


class Ledger:
    """Usage by tenant, adapter and day (UTC), each request once.

    While the database cannot be written, additions stay in memory and requests do not wait for them.

    Args:
        pages: daily pages in the object store, through which servers see each other's usage.
    """

    def __init__(self, database: Database, pages: "Pages | None" = None) -> None:
        self._database = database
        self._pages = pages
        self._unsent: set[str] = set()  # days with changes
        self._caught_up = False  # whether days from before this start are in `_unsent`, too
        self._pending: dict[tuple[str, str, str], list[float]] = {}
        self._flushed: asyncio.Future[None] | None = None  # done once `_pending` is on disk
        self._writing: asyncio.Task[None] | None = None
        self._failing = self._stopped = False
        self._writer = thread_pool(1, "usage", "normal")  # its own, since responses wait for it

    def add(
        self, tenant: str, adapter: str, prompt: int, cached: int, generated: int, device_seconds: float = 0.0
    ) -> asyncio.Future[None]:
        """Add a finished request. `adapter`: its name for the tenant; empty: the base.

        The future is done when it is on disk, together with concurrent additions.
        """
        if self._flushed is None:
            self._flushed = asyncio.get_running_loop().create_future()
        flushed = self._flushed
        if self._failing:
            flushed.set_result(None)
            self._flushed = None
        row = self._pending.setdefault((tenant, adapter, today()), [0] * len(COUNTS))
        for i, count in enumerate((1, prompt, cached, generated, 0, device_seconds)):
            row[i] += count
        if self._writing is None:
            self._writing = asyncio.create_task(self._write())
        return flushed

    async def stop(self) -> None:
        """Write the pending rows, with at most one more attempt."""
        self._stopped = True
        if self._writing is not None:
            await self._writing

    async def _write(self) -> None:
        while self._pending:
            rows, self._pending = self._pending, {}
            flushed, self._flushed = self._flushed, None
            try:
                await run_in(self._writer, partial(self._commit, rows))
                self._failing = False
            except Exception as fault:  # any fault: usage must not be lost
                if not self._failing:
                    log.warning("usage is kept in memory until it can be written: %s", fault)
                self._failing = True
                for key, counts in rows.items():
                    row = self._pending.setdefault(key, [0] * len(COUNTS))
                    row[:] = [a + b for a, b in zip(row, counts, strict=True)]
            if flushed is not None and not flushed.done():
                flushed.set_result(None)
            if self._failing:
                if self._stopped:
                    break
                await asyncio.sleep(RETRY_SECONDS)
        self._writing = None

    def add_training(self, tenant: str, adapter: str, job: str, tokens: int, device_seconds: float) -> None:
        """Add a job's training, up to `tokens` in total; `device_seconds` are those since its last step. A repeated
        step counts once. Blocks on the disk."""
        with self._database.transaction() as connection:
            row = connection.execute("SELECT tokens FROM trained WHERE job = ?", (job,)).fetchone()
            if (more := tokens - (row[0] if row else 0)) <= 0:
                return
            connection.execute("INSERT OR REPLACE INTO trained (job, tokens) VALUES (?, ?)", (job, tokens))
            connection.execute(_ADD, (tenant, adapter, day := today(), 0, 0, 0, 0, more, device_seconds))
            self._database.after_commit(lambda: self._unsent.add(day))

    def note_trained(self, job: str, tokens: int) -> None:
        """Note that other servers have counted a job's first `tokens` tokens."""
        with self._database.transaction() as connection:
            connection.execute(
                "INSERT INTO trained (job, tokens) VALUES (?, ?) "
                "ON CONFLICT (job) DO UPDATE SET tokens = max(tokens, excluded.tokens)",
                (job, tokens),
            )

    def rows(self, tenant: str | None, first: str, last: str) -> list[dict[str, Any]]:
        """Return the usage of these days, here and at other servers, sorted by day; `tenant` None: of all tenants.

        Raises RemoteUnavailable.
        """
        rows = {(row["day"], row["tenant"], row["adapter"]): row for row in self._local_rows(tenant, first, last)}
        for page in self._pages.read(first, last, include_own=False) if self._pages is not None else ():
            for row in json.loads(page):
                if tenant not in (None, row["tenant"]):
                    continue
                if (known := rows.setdefault((row["day"], row["tenant"], row["adapter"]), row)) is not row:
                    known.update({name: known[name] + row.get(name, 0) for name in COUNTS})
        return [rows[key] for key in sorted(rows)]

    def trained_today(self, tenant: str) -> int:
        """Return the tokens trained today; without those of other servers while the object store does not answer."""
        try:
            rows = self.rows(tenant, today(), today())
        except RemoteUnavailable:
            rows = self._local_rows(tenant, today(), today())
        return sum(row["trained_tokens"] for row in rows)

    def send(self) -> None:
        """Send changed days to the object store. Blocks on the disk and the store; raises RemoteUnavailable."""
        assert self._pages is not None
        if not self._caught_up:
            sent = self._pages.own_pages()
            with self._database.reading() as connection:
                days = {row["day"] for row in connection.execute("SELECT DISTINCT day FROM usage")}
            self._unsent |= days.difference(sent[:-1])  # the last day may have been sent before it ended
            self._caught_up = True
        for day in sorted(self._unsent):
            self._unsent.discard(day)  # first, since the day may change in the meantime
            try:
                self._pages.write(day, partial(self._page, day))
            except BaseException:
                self._unsent.add(day)
                raise

    def _page(self, day: str, before: bytes) -> bytes:
        return json.dumps(self._local_rows(None, day, day)).encode()

    def _local_rows(self, tenant: str | None, first: str, last: str) -> list[dict[str, Any]]:
        query = (
            "SELECT * FROM usage WHERE day BETWEEN ? AND ? AND (? IS NULL OR tenant = ?) ORDER BY day, tenant, adapter"
        )
        with self._database.reading() as connection:
            return [dict(row) for row in connection.execute(query, (first, last, tenant, tenant))]

    def _commit(self, rows: dict[tuple[str, str, str], list[float]]) -> None:
        with self._database.transaction() as connection:
            connection.executemany(_ADD, [(*key, *counts) for key, counts in rows.items()])
        self._unsent |= {day for _, _, day in rows}


def today() -> str:
    """Return the current day in UTC, as YYYY-MM-DD."""
    return time.strftime("%Y-%m-%d", time.gmtime())
