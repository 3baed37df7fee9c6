"""Keeps the records of one server in step with those of others on the same object store, and works on its share."""

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
from server.repeat import repeatedly

_RENEWALS = 3  # in the time that a lease lasts
_SHORTEST = 0.02
_FAULTS = (RemoteUnavailable, DatabaseBusy, StorageFull, OSError)

log = logging.getLogger("lorakeet.finetune")


class Sharing:
    """Follows what others change, takes up what nobody works on, and renews the leases of what is worked on here.

    Args:
        seconds: between two looks at what others changed.
        also: further things to be followed, first.
        before: once, when the first look has succeeded.
        sweep: every `sweep_seconds`, unless that is 0: how many objects it removed that nobody needs.
    """

    def __init__(
        self,
        records: Shared[Any, Any],
        worker: Worker[Any],
        seconds: float,
        also: Callable[[], None] = lambda: None,
        before: Callable[[], None] = lambda: None,
        sweep: Callable[[], int] = lambda: 0,
        sweep_seconds: float = 0.0,
    ) -> None:
        self.records = records
        self._worker = worker
        self._seconds = seconds
        self._also = also
        self._before = before
        self._sweep_once = sweep
        self._sweep_seconds = sweep_seconds
        self._woken = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._outage = False

    async def begin(self) -> None:
        """Take over once what other servers have, before anything is worked on here."""
        try:
            await asyncio.to_thread(self._also)
            await asyncio.to_thread(self.records.follow)
            await asyncio.to_thread(self._before)
        except _FAULTS as fault:
            log.warning("what other servers have is not seen yet: %s", fault)

    def start(self) -> None:
        """Follow, take up and renew in the background from now on."""
        self._tasks = [asyncio.create_task(work) for work in (self._follow(), self._renew(), self._sweep())]

    async def stop(self) -> None:
        """End what `start` began; leases stay as they are."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def release(self) -> None:
        """Give back all leases, so that other servers take the records up at once."""
        await asyncio.gather(*map(self._release, self.records.leases.held()))

    def wake(self) -> None:
        """There is something new to work on: look at once."""
        self._woken.set()

    async def poll(self) -> None:
        """Follow once, and take up what nobody works on."""
        await self._heed()
        await asyncio.to_thread(self._also)
        await asyncio.to_thread(self.records.follow)
        await self._heed()
        idle = [id_ for id_ in self.records.leases.held() if id_ not in self._worker.tasks]
        await asyncio.gather(*map(self._release, idle))
        # A task whose lease was lost may still be about to end.
        self._worker.begin(await asyncio.to_thread(self.records.take_up, list(self._worker.tasks)))

    async def _heed(self) -> None:
        """Let those that work on records whose status others have changed do as it says."""
        while (record := await asyncio.to_thread(self.records.next_moved)) is not None:
            if self.records.holds(record.id):
                await self._worker.heed(record)
            if self.records.ended(record) and record.id not in self._worker.tasks:  # else the task clears up
                await self._worker.clear(record.id)

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

    async def _sweep(self) -> None:
        async def sweep() -> None:
            if count := await asyncio.to_thread(self._sweep_once):
                log.info("removed %d objects from the object store that nothing needs", count)

        if self._sweep_seconds:
            await repeatedly(sweep, self._sweep_seconds, "removing what nothing needs", *_FAULTS)

    async def _renew(self) -> None:
        leases = self.records.leases
        while True:
            left = [leases.left(id_) for id_ in leases.held()]
            await asyncio.sleep(max(_SHORTEST, min([leases.seconds / _RENEWALS, *left])))
            await asyncio.gather(*map(self._renew_one, leases.held()))

    async def _renew_one(self, id_: str) -> None:
        """Renew the lease of a record, or stop working on it."""
        leases = self.records.leases
        try:
            async with asyncio.timeout(max(_SHORTEST, leases.left(id_))):
                if await asyncio.to_thread(self.records.send, id_):
                    self.wake()
        except (*_FAULTS, LeaseLost, TimeoutError) as fault:
            if leases.left(id_) <= _SHORTEST:
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
