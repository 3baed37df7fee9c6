"""Keeps the files and jobs of one server in step with those of others on the same object store."""

import asyncio
import contextlib
import logging
from pathlib import Path

from adapters.storage.database import DatabaseBusy
from adapters.storage.leases import LeaseLost
from adapters.storage.versions import RemoteUnavailable
from server.errors import StorageFull
from server.finetune.manager import JobManager
from server.finetune.shared_files import SharedFiles
from server.finetune.shared_jobs import SharedJobs

_RENEWALS = 3  # in the time that a lease lasts
_SHORTEST = 0.02
_FAULTS = (RemoteUnavailable, DatabaseBusy, StorageFull, OSError)

log = logging.getLogger("lorakeet.finetune")


class Sharing:
    """Follows what others change, takes up jobs that nobody works on, and renews the leases of those that are ours.

    Args:
        seconds: between two looks at what others changed.
    """

    def __init__(self, files: SharedFiles, jobs: SharedJobs, manager: JobManager, seconds: float) -> None:
        self._files = files
        self._jobs = jobs
        self._manager = manager
        self._seconds = seconds
        self._woken = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._outage = False
        manager.wake = self._woken.set

    async def begin(self, directory: Path) -> None:
        """See what there is, and give to others what lies in this directory from a time without a store."""
        try:
            await asyncio.to_thread(self._files.follow)
            await asyncio.to_thread(self._jobs.follow)
            await asyncio.to_thread(self._jobs.share_all, directory)
        except _FAULTS as fault:
            log.warning("jobs of other servers are not seen yet: %s", fault)

    def start(self) -> None:
        """Do so from now on."""
        self._tasks = [asyncio.create_task(work) for work in (self._follow(), self._renew())]

    async def stop(self) -> None:
        """Do so no longer."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def release(self) -> None:
        """Let others have the jobs that were worked on here."""
        await asyncio.gather(*map(self._release, self._jobs.leases.held()))

    async def poll(self) -> None:
        """Do once what is done all the time."""
        await asyncio.to_thread(self._files.follow)
        for job in await asyncio.to_thread(self._jobs.follow):
            await self._manager.heed(job)
        idle = [job_id for job_id in self._jobs.leases.held() if job_id not in self._manager.tasks]
        await asyncio.gather(*map(self._release, idle))
        self._manager.begin(await asyncio.to_thread(self._jobs.take_up))

    async def _follow(self) -> None:
        while True:
            try:
                await self.poll()
                if self._outage:
                    log.info("files and jobs of other servers are seen again")
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
        leases = self._jobs.leases
        while True:
            left = [leases.left(job_id) for job_id in leases.held()]
            await asyncio.sleep(max(_SHORTEST, min([leases.seconds / _RENEWALS, *left])))
            await asyncio.gather(*map(self._renew_one, leases.held()))

    async def _renew_one(self, job_id: str) -> None:
        """Renew the lease of a job, or stop working on it."""
        leases = self._jobs.leases
        try:
            async with asyncio.timeout(max(_SHORTEST, leases.left(job_id))):
                job = await asyncio.to_thread(self._jobs.send, job_id)
            if job is not None:
                await self._manager.heed(job)
        except (*_FAULTS, LeaseLost, TimeoutError) as fault:
            if leases.left(job_id) <= _SHORTEST:
                log.warning("job %s is left to others: %s", job_id, repr(fault))
                leases.drop(job_id)
                await self._manager.abandon(job_id)
                with contextlib.suppress(*_FAULTS):
                    await asyncio.to_thread(self._jobs.refresh, job_id)
        except Exception:
            log.exception("the lease of job %s was not renewed", job_id)

    async def _release(self, job_id: str) -> None:
        try:
            await asyncio.to_thread(self._jobs.send, job_id, release=True)
        except (*_FAULTS, LeaseLost) as fault:
            log.debug("the lease of job %s is not given back: %s", job_id, fault)
            self._jobs.leases.drop(job_id)
