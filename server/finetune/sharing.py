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

_RENEWALS = 3  # per duration of a lease
_SHORTEST = 0.02
_FAULTS = (RemoteUnavailable, DatabaseBusy, StorageFull, OSError)

log = logging.getLogger("lorakeet.finetune")


class Sharing:
    """Follows other servers' changes, claims unleased records, and renews the leases of records worked on here.

    Args:
        seconds: between two polls.
        also: called first in every poll, to follow further records.
        before: called once, after the first successful import.
    """

    def __init__(
        self,
        records: Shared[Any, Any],
        worker: Worker[Any],
        seconds: float,
        also: Callable[[], None] = lambda: None,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        self.records = records
        self._worker = worker
        self._seconds = seconds
        self._also = also
        self._before = before
        self._woken = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._outage = False

    async def begin(self) -> None:
        """Import other servers' records once, before any local work starts."""
        try:
            await asyncio.to_thread(self._also)
            await asyncio.to_thread(self.records.follow)
            await asyncio.to_thread(self._before)
        except _FAULTS as fault:
            log.warning("what other servers have is not seen yet: %s", fault)

    def start(self) -> None:
        """Start following, claiming and renewing in the background."""
        self._tasks = [asyncio.create_task(work) for work in (self._follow(), self._renew())]

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
        await asyncio.to_thread(self._also)
        for record in await asyncio.to_thread(self.records.follow):
            if self.records.holds(record.id):
                await self._worker.heed(record)
            if self.records.ended(record) and record.id not in self._worker.tasks:  # else the task cleans up
                await self._worker.clear(record.id)
        idle = [id_ for id_ in self.records.leases.held_keys() if id_ not in self._worker.tasks]
        await asyncio.gather(*map(self._release, idle))
        # Exclude records with a task: one that lost its lease may still be ending.
        self._worker.begin(await asyncio.to_thread(self.records.take_up, list(self._worker.tasks)))

    async def _follow(self) -> None:
        while True:
            try:
                await self.poll()
                if self._outage:
                    log.info("changes of other servers are seen again")
                self._outage = False
            except _FAULTS as fault:
                if not self._outage:
                    log.warning("changes of other servers are not seen: %s", fault)
                self._outage = True
            except Exception:
                log.exception("changes of other servers are not seen")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._seconds):
                    await self._woken.wait()
            self._woken.clear()

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
                record = await asyncio.to_thread(self.records.send, id_)
            if record is not None:
                await self._worker.heed(record)
        except (*_FAULTS, LeaseLost, TimeoutError) as fault:
            if leases.seconds_left(id_) <= _SHORTEST:
                log.warning("%s is left to others: %s", id_, repr(fault))
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
            log.debug("the lease of %s is not given back: %s", id_, fault)
            self.records.leases.drop(id_)
