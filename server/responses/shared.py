"""Responses of several servers in an object store: `responses/<tenant>/<id>.json` each.

Clients never list responses, so servers do not follow each other's changes: a server reads a response from the store
when a client asks for it. A background response is under a lease, which its server renews together with the events
so far. Any server may cancel it; the lease holder then stops it. When its lease expires, it has failed.
"""

import asyncio
import contextlib
import re
import threading
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import msgspec

from adapters.storage.bucket import Bucket
from adapters.storage.database import Database, DatabaseBusy
from adapters.storage.leases import LEASE, LeaseLost, Leases
from adapters.storage.records import Content, Records
from adapters.storage.versions import RemoteUnavailable
from server.errors import NotFound
from server.repeat import run_periodically
from server.responses.running import Followed, Running
from server.responses.store import Fields, KeptResponse, ResponseStore, as_failed, log
from server.tenants.caller import tenant_name, tenant_of

PREFIX = "responses"
_RENEWALS = 3  # per lease duration, at least
_ID = re.compile(r"resp_[0-9a-f]{32}")


class SharedResponses(ResponseStore):
    """Stored responses of all servers. Methods that access the object store raise RemoteUnavailable.

    Args:
        poll_seconds: between two reads of a running response: another server's for its events, one's own for a
            cancellation.
        sweep_seconds: between two listings of all responses, to count bytes and remove expired or excess ones.
    """

    def __init__(
        self,
        database: Database,
        days: float,
        max_bytes: int,
        *,
        bucket: Bucket,
        lease_seconds: float,
        poll_seconds: float,
        sweep_seconds: float,
    ) -> None:
        super().__init__(database, days, max_bytes)
        self._bucket = bucket
        self._records = Records(bucket, PREFIX)
        self._leases = Leases(self._records, lease_seconds)
        self.poll_seconds = poll_seconds
        self._sweep_seconds = sweep_seconds
        self._all_shared = False
        self._stored: Counter[str] = Counter()  # bytes by tenant: the last listing's, plus local changes since
        self._counting = threading.Lock()

    # --- stored responses

    def _decides_outcome(self, running: Running) -> bool:
        return self._leases.holds(_key(running.tenant, running.id))

    def _save(self, tenant: str, response: Any, items: list[Fields], events: list[Any] | None) -> bool:
        content: Content = {
            "response": msgspec.to_builtins(response),
            "items": msgspec.to_builtins(items),
            "events": None if events is None else msgspec.to_builtins(events),
            LEASE: None,
        }
        size = self._checked_size(len(msgspec.json.encode(content)))
        key = _key(tenant, response.id)
        if not response.background:
            self._records.change(key, lambda old: content)
            self._records.forget(key)
        elif response.status == "in_progress":
            self._leases.claim(key, lambda old: content)
        else:
            try:
                kept = self._leases.change(key, lambda old: _merge_final(old, content), release=True)
            except LeaseLost:
                log.info(
                    "response %s was deleted, or another server marked it as failed; its output is dropped", response.id
                )
                return False
            self._count_bytes(tenant, size)
            return bool(kept["response"]["status"] == response.status)
        self._count_bytes(tenant, size)
        return True

    def get(self, tenant: str, id_: str, *, param: str = "id") -> KeptResponse:
        content = self._content(tenant, id_)
        if content is None:
            return super().get(tenant, id_, param=param)  # stored before there was an object store
        return KeptResponse(content["response"], content["items"], content["events"])

    def _content(self, tenant: str, id_: str) -> Content | None:
        """Read a response from the store; one whose lease has expired is marked as failed."""
        if not _ID.fullmatch(id_):
            return None
        key = _key(tenant, id_)
        record = self._records.fetch(key)
        if record.fault is not None:
            self._records.report_damage(key, record.fault)
        content = record.content
        if content is None or content["response"]["created_at"] < time.time() - self._seconds:
            return None
        if id_ in self.running:
            return content
        if not _in_progress(content):
            self._forget(key)
            return content
        self._leases.observe(key, content)
        if not self._leases.is_free(key):
            return content
        with contextlib.suppress(LeaseLost):
            self._leases.claim(key, _failed)
        newest = self._records.fetch(key).content
        self._forget(key)
        return newest

    def _forget(self, key: str) -> None:
        """Drop cached records: they are cached only for responses that are in progress."""
        self._leases.forget(key)
        self._records.forget(key)

    async def delete(self, tenant: str, id_: str) -> None:
        await super().delete(tenant, id_)
        self._forget(_key(tenant, id_))

    def _remove(self, tenant: str, id_: str) -> None:
        path = f"{PREFIX}/{_key(tenant, id_)}.json"
        if _ID.fullmatch(id_) and (found := self._bucket.read(path)) is not None:
            self._bucket.delete([path])
            self._count_bytes(tenant, -len(found.content))
        super()._remove(tenant, id_)

    # --- background responses

    async def _run_work(self, running: Running, work: Callable[[], Awaitable[None]]) -> None:
        renewing = asyncio.create_task(self._renew(running))
        try:
            await work()
        finally:
            renewing.cancel()
            await asyncio.gather(renewing, return_exceptions=True)
            await asyncio.to_thread(self._release_lease, _key(running.tenant, running.id))

    def _release_lease(self, key: str) -> None:
        """Release the lease on an unfinished response, so that its readers find it failed."""
        with contextlib.suppress(LeaseLost, RemoteUnavailable):
            if self._leases.holds(key):
                self._leases.change(key, lambda content: content, release=True)
        self._forget(key)

    async def _renew(self, running: Running) -> None:
        """Renew the lease and send events until the response has ended or was cancelled."""
        key = _key(running.tenant, running.id)
        while True:
            await asyncio.sleep(min(self.poll_seconds, self._leases.seconds / _RENEWALS))
            if not self._leases.holds(key):  # not stored yet, or just finished
                continue
            try:
                content = await asyncio.to_thread(self._send, key, running)
            except LeaseLost:
                log.info("response %s was deleted, or another server marked it as failed; stopping it", running.id)
            except RemoteUnavailable as fault:
                log.debug("the lease of response %s was not renewed: %s", running.id, fault)
                continue
            else:
                if _in_progress(content):
                    continue
                running.cancelled = True
            if not running.settled and running.task is not None:
                running.task.cancel()
            return

    def _send(self, key: str, running: Running) -> Content:
        events = msgspec.to_builtins(list(running.events)) if running.streamed else None
        return self._leases.change(
            key, lambda content: content | {"events": events} if _in_progress(content) else content
        )

    def events(self, kept: KeptResponse, tenant: str) -> Followed | None:
        id_ = kept.response["id"]
        if kept.in_progress and id_ not in self.running and kept.events is not None:
            return _RemoteResponse(self, tenant, id_)
        return super().events(kept, tenant)

    async def cancel(self, tenant: str, id_: str) -> None:
        await super().cancel(tenant, id_)
        if _ID.fullmatch(id_):
            await asyncio.to_thread(self._records.change, _key(tenant, id_), _cancelled)
            self._records.forget(_key(tenant, id_))

    # --- housekeeping

    async def run(self) -> None:
        housekeep = partial(asyncio.to_thread, self._housekeep)
        await run_periodically(
            housekeep, self._sweep_seconds, "counting stored responses", RemoteUnavailable, DatabaseBusy, OSError
        )

    def _housekeep(self) -> None:
        if not self._all_shared:
            self._share_all()
            self._all_shared = True
        self.sweep()

    def _share_all(self) -> None:
        """Move the responses in the database into the object store."""
        with self._database.reading() as connection:
            rows = connection.execute("SELECT tenant, id FROM responses ORDER BY number").fetchall()
        for row in rows:
            tenant, id_ = row["tenant"], row["id"]
            if (kept := self._row(tenant, id_)) is not None and _ID.fullmatch(id_):
                content: Content = {"response": kept.response, "items": kept.items, "events": kept.events, LEASE: None}
                fresh = _failed(content) if _in_progress(content) else content
                self._records.change(_key(tenant, id_), lambda old, fresh=fresh: old or fresh)  # type: ignore[misc]
            super()._remove(tenant, id_)

    def sweep(self) -> None:
        """Remove expired and excess responses, and count the bytes of each tenant."""
        with self._counting:
            before = self._stored.copy()
        entries = sorted(self._bucket.list(PREFIX), key=lambda entry: entry.age)
        kept, total, gone = Counter[str](), 0, list[str]()
        for entry in entries:
            total += entry.size
            if entry.age > self._seconds or total > self._max_bytes:
                gone.append(entry.path)
            else:
                kept[tenant_of(entry.path.split("/")[1])] += entry.size
        self._bucket.delete(gone)
        for path in gone:
            self._records.forget(path.removeprefix(f"{PREFIX}/").removesuffix(".json"))
        with self._counting:
            self._stored.subtract(before)  # leaves changes made during the listing
            self._stored.update(kept)

    def stored_bytes(self, tenant: str) -> int:
        with self._counting:
            stored = self._stored[tenant]
        return stored + super().stored_bytes(tenant)

    def _count_bytes(self, tenant: str, size: int) -> None:
        with self._counting:
            self._stored[tenant] += size


@dataclass(frozen=True)
class _RemoteResponse:
    """A response being generated by another server."""

    store: SharedResponses
    tenant: str
    id: str

    async def follow(self, after: int) -> AsyncGenerator[Any, None]:
        """Yield the events after this sequence number, as the other server sends them."""
        position = after + 1
        while True:
            try:
                kept = await asyncio.to_thread(self.store.get, self.tenant, self.id)
            except NotFound:  # deleted
                return
            events = kept.events or []
            for event in events[position:]:
                yield event
            position = max(position, len(events))
            if not kept.in_progress:
                return
            await asyncio.sleep(self.store.poll_seconds)


def _key(tenant: str, id_: str) -> str:
    return f"{tenant_name(tenant)}/{id_}"


def _in_progress(content: Mapping[str, Any]) -> bool:
    return bool(content["response"]["status"] == "in_progress")


def _merge_final(old: Content, new: Content) -> Content:
    """Merge the final state of a response; a final status already reported to a client is kept, with the new output."""
    was, now = old["response"]["status"], new["response"]["status"]
    if was in ("in_progress", now):
        return new
    merged = new | {"response": new["response"] | {"status": was, "completed_at": None}}
    return (
        merged if new["events"] is None else merged | {"events": new["events"][:-1]}
    )  # its last event reports the other status


def _failed(content: Content | None) -> Content:
    """Mark as failed a response whose server no longer renews its lease."""
    if content is None:
        raise LeaseLost
    if not _in_progress(content):
        return content
    failed = as_failed(KeptResponse(content["response"], content["items"], content["events"]))
    return content | {"response": failed.response, "events": failed.events}


def _cancelled(content: Content | None) -> Content | None:
    if content is None or not _in_progress(content):
        return content
    return content | {"response": content["response"] | {"status": "cancelled"}}
