"""Synchronisation of a server's records with other servers on the same object store, and of its share of the work."""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any

from adapters.storage.database import DatabaseBusy
from adapters.storage.leases import LeaseLost
from adapters.storage.versions import RemoteUnavailable
from server.errors import StorageFull
from server.finetune.shared import Shared
from server.finetune.worker import Worker
from server.repeat import run_periodically

_RENEWALS = 3  # per duration of a lease
_SHORTEST = 0.02
_FAULTS = (RemoteUnavailable, DatabaseBusy, StorageFull, OSError)

log = logging.getLogger("lorakeet.finetune")


class Sharing:
    """Follows other servers' changes, claims unleased records, and renews the leases of records worked on here.

    Args:
        seconds: between two polls.
        before_poll: called first in every poll, to follow further records.
        after_import: called once, after the first successful import.
        remove_orphans: called with `orphan_seconds` at that interval, unless it is 0; returns the count.
    """

    def __init__(
        self,
        records: Shared[Any, Any],
        worker: Worker[Any],
        seconds: float,
        before_poll: Callable[[], None] = lambda: None,
        after_import: Callable[[], None] = lambda: None,
        remove_orphans: Callable[[float], int] = lambda seconds: 0,
        orphan_seconds: float = 0.0,
    ) -> None:
        self.records = records
        self._worker = worker
        self._seconds = seconds
        self._before_poll = before_poll
        self._after_import = after_import
        self._remove_orphans = remove_orphans
        self._orphan_seconds = orphan_seconds
        self._woken = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._outage = False

    async def import_records(self) -> None:
        """Import other servers' records once, before any local work starts."""
        try:
            await asyncio.to_thread(self._before_poll)
            await asyncio.to_thread(self.records.follow)
            await asyncio.to_thread(self._after_import)
        except _FAULTS as fault:
            log.warning("other servers' records cannot be read yet: %s", fault)

    def start(self) -> None:
        """Start following, claiming and renewing in the background."""
        self._tasks = [asyncio.create_task(work) for work in (self._follow(), self._renew(), self._collect_orphans())]

    async def stop(self) -> None:
        """Stop the background tasks; leases stay as they are."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def release(self) -> None:
        """Release all leases, so that other servers can claim the records at once."""
        await asyncio.gather(*map(self._release, self.records.leases.held_keys()))

    def wake(self) -> None:
        """Poll at once, for a new record to work on."""
        self._woken.set()

    async def poll(self) -> None:
        """Import other servers' changes once, and claim unleased records."""
        await self._notify_worker()
        await asyncio.to_thread(self._before_poll)
        await asyncio.to_thread(self.records.follow)
        await self._notify_worker()
        idle = [id_ for id_ in self.records.leases.held_keys() if id_ not in self._worker.tasks]
        await asyncio.gather(*map(self._release, idle))
        # Exclude records with a task: one that lost its lease may still be ending.
        self._worker.start_tasks(await asyncio.to_thread(self.records.claim, list(self._worker.tasks)))

    async def _notify_worker(self) -> None:
        """Notify the worker of each record whose status another server has changed."""
        while (record := await asyncio.to_thread(self.records.next_status_change)) is not None:
            if self.records.holds(record.id):
                await self._worker.status_changed(record)
            if self.records.ended(record) and record.id not in self._worker.tasks:  # else the task cleans up
                await self._worker.remove_files(record.id)

    async def _follow(self) -> None:
        while True:
            try:
                await self.poll()
                if self._outage:
                    log.info("other servers' changes can be read again")
                self._outage = False
            except _FAULTS as fault:
                if not self._outage:
                    log.warning("other servers' changes cannot be read: %s", fault)
                self._outage = True
            except Exception:
                log.exception("cannot read other servers' changes")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._seconds):
                    await self._woken.wait()
            self._woken.clear()

    async def _collect_orphans(self) -> None:
        async def collect() -> None:
            if count := await asyncio.to_thread(self._remove_orphans, self._orphan_seconds):
                log.info("removed %d unneeded objects from the object store", count)

        if self._orphan_seconds:
            await run_periodically(collect, self._orphan_seconds, "removing unneeded objects", *_FAULTS)

    async def _renew(self) -> None:
        leases = self.records.leases
        while True:
            left = [leases.seconds_left(id_) for id_ in leases.held_keys()]
            await asyncio.sleep(max(_SHORTEST, min([leases.seconds / _RENEWALS, *left])))
            await asyncio.gather(*map(self._renew_one, leases.held_keys()))

    async def _renew_one(self, id_: str) -> None:
        """Renew a record's lease, or stop work on it."""
        leases = self.records.leases
        try:
            async with asyncio.timeout(max(_SHORTEST, leases.seconds_left(id_))):
                if await asyncio.to_thread(self.records.send, id_):
                    self.wake()
        except (*_FAULTS, LeaseLost, TimeoutError) as fault:
            if leases.seconds_left(id_) <= _SHORTEST:
                log.warning("lost the lease of %s and stopped work on it: %s", id_, repr(fault))
                leases.drop(id_)
                await self._worker.abandon(id_)
                with contextlib.suppress(*_FAULTS):
                    await asyncio.to_thread(self.records.refresh, id_)
        except Exception:
            log.exception("the lease of %s was not renewed", id_)

    async def _release(self, id_: str) -> None:
        try:
            await asyncio.to_thread(self.records.send, id_, release=True)
        except (*_FAULTS, LeaseLost) as fault:
            log.debug("the lease of %s was not released: %s", id_, fault)
            self.records.leases.drop(id_)
