"""The manager of fine-tuning jobs: one asyncio task per unfinished job, from its files to its end.

The engine or this process may die at any moment: a job then resumes from its last checkpoint. Preparation is in
preparation.py, publication of checkpoints in checkpoints.py.
"""

import asyncio
import contextlib
import logging
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from msgspec.structs import replace

from adapters.disk import sync
from adapters.storage import lost
from adapters.storage.database import Database, DatabaseBusy
from adapters.storage.versions import RemoteUnavailable
from server.client.engine import EngineClient, EngineDied, TrainingRefused, wait_until_ready
from server.errors import EngineUnavailable, StorageFull, as_error
from server.finetune import hyperparameters, restore
from server.finetune.checkpoints import CheckpointAdapters
from server.finetune.files import FileStore
from server.finetune.jobs import FINAL, Job, JobError, JobFailedError, JobSpec, JobStateError, JobStore, Status
from server.finetune.metrics import TrainingMetrics
from server.finetune.preparation import Preparation, copy_initial, relocated
from server.finetune.slots import FairSlots
from server.finetune.wandb_runs import WandbRuns
from server.finetune.worker import Worker
from server.messages.training import (
    STORAGE_FULL,
    Checkpoint,
    JobEnded,
    JobNote,
    JobReply,
    MemoryPlan,
    PlanMemory,
    StopJob,
    TrainingStep,
)
from server.registry.publish import Publisher
from server.text.processor import TextProcessor

log = logging.getLogger("lorakeet.finetune")

MAX_DEATHS = 2  # of engines training a job, without a checkpoint in between: it then fails
SPACE_SECONDS = 5.0  # between checks of a full disk
_SPARE_BYTES = 1 << 20  # for rows of the database
_BYTES_PER_PARAMETER = 24  # fp32: values, two moments, the adapter; its published file, and its packed rows
_FULL = "The disk is full; the job is paused until there is space"


class JobManager(Worker[Job]):
    """All fine-tuning of one server.

    Args:
        directory: holds data and checkpoints of jobs while they run.
        max_running: most jobs that train concurrently; the rest are queued.
    """

    def __init__(
        self,
        *,
        directory: Path,
        database: Database,
        files: FileStore,
        jobs: JobStore,
        engine: EngineClient,
        publisher: Publisher,
        text: TextProcessor,
        metrics: TrainingMetrics,
        max_running: int,
    ) -> None:
        super().__init__(jobs)
        self._directory = directory
        self._pending = lost.Pending(directory)
        self._database = database
        self._jobs = jobs
        self._engine = engine
        self._preparation = Preparation(files, jobs, text)
        self._checkpoints = CheckpointAdapters(directory, files, jobs, publisher)
        self._metrics = metrics
        self._wandb = WandbRuns()
        self._slots = FairSlots(max_running)
        self._client_locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # by job id
        self._training: set[str] = set()  # ids of jobs with a slot
        self._step_seconds: dict[str, float] = {}  # id -> moving average of seconds per step
        self._changed = asyncio.Event()

    # --- lifecycle ------------------------------------------------------------------------------------

    def _clean_up_at_start(self) -> None:
        restore.clean_up_at_start(self._jobs, self._directory, self._pending)

    async def wait_for_change(self, seconds: float) -> None:
        """Wait for a change of any job, for at most `seconds`."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._changed.wait(), seconds)

    def _notify_change(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    # --- client operations -----------------------------------------------------------------------------

    async def create(self, tenant: str, spec: JobSpec, initial: Path | None = None) -> Job:
        """Record a job and start it. `initial`: files of the adapter version to continue from."""
        job = await asyncio.to_thread(self._create, tenant, spec, initial)
        self.enqueue(job)
        self._notify_change()
        return job

    def _create(self, tenant: str, spec: JobSpec, initial: Path | None) -> Job:
        with contextlib.ExitStack() as undo, self._database.transaction():
            job = self._jobs.create(tenant, spec)
            directory = self._directory / job.id
            undo.callback(self._pending.clear, job.id)
            undo.callback(shutil.rmtree, directory, ignore_errors=True)
            self._pending.mark(job.id)
            directory.mkdir(parents=True)
            if initial is not None:
                copy_initial(initial, directory)
            restore.write_record(directory, restore.JOB, job)
            sync(directory)
            sync(self._directory)
            self._database.after_commit(undo.pop_all)
            self._database.after_commit(partial(self._pending.clear, job.id))
        try:
            self._jobs.share(job, directory)
        except BaseException:
            lost.rename_and_remove(directory)
            raise
        return job

    def _client_lock(self, job: Job) -> asyncio.Lock:
        """The lock that serialises clients' changes of a job: each status and its consequences are one unit."""
        return self._client_locks.setdefault(job.id, asyncio.Lock())

    async def cancel(self, job: Job) -> Job:
        """Cancel a job. Raises JobStateError when it has ended already."""
        async with self._client_lock(job):
            return await self._cancel(job)

    async def _cancel(self, job: Job) -> Job:
        cancelled = await self._move(
            job, "cancelled", "Fine-tuning job cancelled", for_client=True, waits_for_space=False
        )
        await self._stop_work(cancelled, save=False)
        if job.id not in self._training:  # else its task cleans up once the engine has stopped the job
            await self._clean_up(job)
        return cancelled

    async def pause(self, job: Job) -> Job:
        """Pause a job: a waiting one at once, a running one once its step is saved. Raises JobStateError otherwise."""
        async with self._client_lock(job):
            return await self._pause(job)

    async def _pause(self, job: Job) -> Job:
        now = await self._reload(job)
        if now.waits_for_space:
            await self.abandon(job.id)
            return await asyncio.to_thread(self._jobs.update, job, waits_for_space=False)
        running = now.status == "running"
        status: Status = "pausing" if running else "paused"
        moved = await self._move(job, status, f"Job {status}", for_client=True)
        if not await self._stop_work(moved, save=True) and running:
            with contextlib.suppress(JobStateError):  # its task has paused it concurrently
                return await self._move(job, "paused", "Job paused", expected="pausing")
            return await self._reload(job)
        return moved

    async def resume(self, job: Job) -> Job:
        """Resume a job. Raises JobStateError unless it is paused or pausing."""
        async with self._client_lock(job):
            return await self._resume(job)

    async def _resume(self, job: Job) -> Job:
        if (await self._reload(job)).status == "pausing":
            with contextlib.suppress(JobStateError):  # paused concurrently
                return await self._move(job, "running", "Job resumed", for_client=True)
        now = await self._reload(job)
        if now.waits_for_space:
            await self.abandon(job.id)
        elif now.status == "paused" and (task := self.tasks.get(job.id)):
            await self._stop_work(now, save=False)  # if another server paused it, the task may not know yet
            await asyncio.wait({task})
        status: Status = "validating_files" if now.start is None else "queued"
        resumed = await self._move(
            job, status, "Job resumed", for_client=True, expected="paused", waits_for_space=False
        )
        self.enqueue(resumed)
        return resumed

    def estimated_finish(self, job: Job) -> int | None:
        """Return the Unix time of the estimated end, while the job runs and its pace is known."""
        pace = self._step_seconds.get(job.id)
        if job.status != "running" or pace is None:
            return None
        return int(time.time() + pace * (job.total_steps - job.step))

    async def _stop_work(self, job: Job, *, save: bool) -> bool:
        """Stop work on a job after a change of status; return whether a `StopJob` was sent to the engine."""
        if job.id in self._training:
            with contextlib.suppress(EngineUnavailable):
                await self._engine.stop_job(StopJob(job.id, save=save))
                return True
        await self.abandon(job.id)
        return False

    async def status_changed(self, job: Job) -> None:
        self._notify_change()
        if job.status in FINAL or job.status == "pausing":
            await self._stop_work(job, save=job.status == "pausing")
        elif job.status != "running":
            await self.abandon(job.id)

    async def remove_files(self, id_: str) -> None:
        await asyncio.to_thread(lost.rename_and_remove, self._directory / id_)

    async def _clean_up(self, job: Job) -> None:
        """Remove the files needed to resume; published adapters are stored elsewhere."""
        await self.remove_files(job.id)
        await asyncio.to_thread(self._jobs.delete_files, job.id)

    async def _move(self, job: Job, status: Status, message: str, *, for_client: bool = False, **changes: Any) -> Job:
        """Change a job's status. `for_client`: on a client's behalf, even if another server works on the job."""
        move: Callable[..., Job] = self._jobs.move_for_client if for_client else self._jobs.move
        moved = await asyncio.to_thread(move, job, status, message, **changes)
        self._notify_change()
        return moved

    # --- one job -----------------------------------------------------------------------------------------

    async def _work(self, job: Job) -> None:
        """Run a job from its present status to its end, or to a pause."""
        try:
            while True:
                try:
                    return await self._advance(job)
                except (DatabaseBusy, RemoteUnavailable) as fault:
                    log.warning("job %s is retried after a fault: %s", job.id, fault)
                    await asyncio.sleep(SPACE_SECONDS)
                    job = await self._reload(job)
                except Exception as fault:
                    if not isinstance(as_error(fault), StorageFull):
                        raise
                    job = await self._wait_for_space(job)
        except JobFailedError as fault:
            await self._fail(job, fault.error)
        except JobStateError:  # cancelled or paused concurrently
            log.debug("job %s was stopped", job.id)
        except Exception:
            log.exception("job %s failed", job.id)
            await self._fail(job, JobError("server_error", "The job failed because of a fault in the server."))
        finally:
            if (await self._reload(job)).status in FINAL:
                await self._clean_up(job)

    async def _advance(self, job: Job) -> None:
        """Run a job until it ends or pauses. Raises faults of the disk and of the job."""
        if job.waits_for_space:
            job = await self._wait_for_space(job)
        if job.status == "pausing":  # the server has restarted
            await self._move(job, "paused", "Job paused")
            return
        if job.status == "running":
            job = await self._move(job, "queued", "The server restarted; the job is queued again")
        directory = self._directory / job.id
        directory.mkdir(parents=True, exist_ok=True)
        await asyncio.to_thread(self._jobs.download_files, job.id, directory, job.inputs)
        if job.start is None:
            start, learned_fields = await self._preparation.start_message(
                job, await wait_until_ready(self._engine), directory, partial(self._ask_memory, job)
            )
            message = "Files validated, moving job to queued state"
            job = await self._move(job, "queued", message, start=start, **learned_fields)
            await asyncio.to_thread(restore.write_record, directory, restore.JOB, job)
        elif job.status == "validating_files":  # resumed by a server that did not know yet that they were validated
            job = await self._move(job, "queued", "Files validated, moving job to queued state")
        async with self._slots.take(job.tenant):
            await self._train(job)

    async def _wait_for_space(self, job: Job) -> Job:
        """Pause a job on a full disk until there is space; return the job with its new status.

        In the meantime it keeps only the files it needs, or waiting jobs would block each other.
        """
        with contextlib.suppress(OSError, DatabaseBusy, RemoteUnavailable):
            await asyncio.to_thread(self._checkpoints.remove_spare, job)
        while True:
            with contextlib.suppress(OSError, DatabaseBusy):  # even the status cannot be written now
                now = await self._reload(job)
                if not now.waits_for_space:
                    # A pausing job pauses without its last steps; the next round's move then ends its task.
                    await self._move(job, "paused", _FULL, waits_for_space=now.status != "pausing")
                elif shutil.disk_usage(self._directory).free >= self._space_for(now):
                    status: Status = "validating_files" if now.start is None else "queued"
                    return await self._move(job, status, "There is space again", waits_for_space=False)
            await asyncio.sleep(SPACE_SECONDS)

    def _space_for(self, job: Job) -> int:
        """Return about the bytes that a job needs until its next checkpoint is published."""
        base = self._engine.info
        if base is None or job.start is None:
            return _SPARE_BYTES
        return _SPARE_BYTES + _BYTES_PER_PARAMETER * hyperparameters.parameters(job.start.modules, base)

    async def _fail(self, job: Job, error: JobError) -> None:
        with contextlib.suppress(JobStateError):
            while True:
                with contextlib.suppress(OSError, DatabaseBusy, RemoteUnavailable):  # the status cannot be written now
                    await self._move(job, "failed", error.message, error=error)
                    return
                await asyncio.sleep(SPACE_SECONDS)

    async def _count_death(self, job: Job) -> None:
        """Count an engine's death during the job. Raises JobFailedError at `MAX_DEATHS`."""
        deaths = (await self._reload(job)).deaths + 1
        await asyncio.to_thread(self._jobs.update, job, deaths=deaths)
        if deaths >= MAX_DEATHS:
            raise JobFailedError("engine_died", f"The engine died {deaths} times while it had this job; see its log.")

    async def _reload(self, job: Job) -> Job:
        return await asyncio.to_thread(self._jobs.get, job.tenant, job.id)

    async def _ask_memory(self, job: Job, request: PlanMemory) -> MemoryPlan:
        while True:
            await wait_until_ready(self._engine)
            try:
                return await self._engine.plan_memory(request)
            except TrainingRefused as refusal:
                raise JobFailedError(refusal.code, str(refusal)) from None
            except EngineDied:
                await self._count_death(job)
            except EngineUnavailable:
                continue

    # --- training --------------------------------------------------------------------------------------------

    async def _train(self, job: Job) -> None:
        """Train a job on the engine until it ends or pauses."""
        self._training.add(job.id)
        try:
            job = await self._move(job, "running", "Fine-tuning job started")
            while job.status in ("running", "pausing"):
                if job.status == "pausing":  # the engine stopped before saving: the job keeps its last checkpoint
                    with contextlib.suppress(JobStateError):  # resumed, or cancelled
                        await self._move(job, "paused", "Job paused", expected="pausing")
                else:
                    try:
                        await wait_until_ready(self._engine)
                        await self._run_once(job)
                    except EngineUnavailable as gone:
                        if isinstance(gone, EngineDied):
                            await self._count_death(job)
                        message = "The engine restarts; the job continues from its last checkpoint"
                        await asyncio.to_thread(self._jobs.add_event, job.id, message, level="warn")
                        self._notify_change()
                job = await self._reload(job)
        finally:
            self._training.discard(job.id)
            self._step_seconds.pop(job.id, None)
            self._metrics.ended(job.id)
            await asyncio.to_thread(self._wandb.ended, await self._reload(job))

    async def _run_once(self, job: Job) -> None:
        """Run the job on the engine once, from its last checkpoint. Raises EngineUnavailable, JobFailedError."""
        assert job.start is not None
        resume = await asyncio.to_thread(self._checkpoints.last_good, job)
        replies = self._engine.train(replace(relocated(job.start, self._directory / job.id), resume=resume))
        try:
            async for reply in replies:
                await self._handle_reply(await self._reload(job), reply)
        finally:
            await replies.aclose()

    async def _handle_reply(self, job: Job, reply: JobReply) -> None:
        """Make one reply durable, unless the job was cancelled in the meantime."""
        if job.status != "running" and not isinstance(reply, JobEnded):
            # Sent again: the first message may have arrived before the job's start.
            await self._engine.stop_job(StopJob(job.id, save=job.status == "pausing"))
        if job.status in FINAL:
            return
        match reply:
            case TrainingStep():
                await asyncio.to_thread(self._record_step, job, reply)
            case JobNote():
                await asyncio.to_thread(self._jobs.add_event, job.id, reply.message, level=reply.level)
            case Checkpoint():
                await self._checkpoints.keep(job, reply)
            case JobEnded(outcome="failed", code=code) if code == STORAGE_FULL:
                raise StorageFull(reply.message or _FULL)
            case JobEnded(outcome="failed"):
                raise JobFailedError(reply.code or "training_failed", reply.message or "Training failed.")
            case JobEnded(outcome="paused"):
                with contextlib.suppress(JobStateError):  # resumed in the meantime: it continues from this checkpoint
                    await self._move(job, "paused", f"Job paused at step {job.step}", expected="pausing")
        self._notify_change()

    def _record_step(self, job: Job, step: TrainingStep) -> None:
        self._step_seconds[job.id] = 0.9 * self._step_seconds.get(job.id, step.seconds) + 0.1 * step.seconds
        self._metrics.step(step, max(0, step.trained_tokens - (job.trained_tokens or 0)))
        self._jobs.record_step(job, step)
        self._wandb.step(job, step)
