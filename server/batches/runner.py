"""The runner of batches: one asyncio task per unfinished batch, from its file to its results.

A row's request takes the code path of a client's request, in the background (`server.admission.BACKGROUND`). Its answer
is on disk before it counts, so that after a crash only rows without an answer are run again.
"""

import asyncio
import contextlib
import logging
import os
import shutil
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec

from adapters.disk import StorageFull, raising_storage_full, sync
from adapters.storage import lost
from adapters.storage.database import DatabaseBusy
from adapters.storage.versions import RemoteUnavailable
from server.admission import BACKGROUND
from server.batches import rows
from server.batches.metrics import BatchMetrics
from server.batches.rows import INPUT, Journal, Limits, Row
from server.batches.store import FINAL, Batch, BatchStateError, BatchStore, Fault, Status
from server.finetune.files import FileStore, StoredFile, new_id
from server.finetune.manager import MAX_DEATHS, SPACE_SECONDS
from server.finetune.worker import Worker
from server.tenants.caller import Caller

log = logging.getLogger("lorakeet.batches")

RESULTS = "batch_output"
RETRIED_STATUSES = (429, 503)  # statuses of answers after which a row is retried
RETRY_SECONDS = 1.0


@dataclass(frozen=True)
class Reply:
    """The answer to a request. `died`: the engine died during it."""

    status: int
    body: bytes
    died: bool = False


Answer = Callable[[Caller, str, bytes], Awaitable[Reply]]  # caller, endpoint, body -> answer


class Batches(Worker[Batch]):
    """All batches of one server.

    Args:
        directory: holds the input file and the answers of batches while they run.
        max_concurrent: most concurrent requests of all batches together.
        limits: of one batch.

    Attributes:
        answer: function that answers a row's request; set before `start`.
    """

    def __init__(
        self,
        directory: Path,
        store: BatchStore,
        files: FileStore,
        metrics: BatchMetrics,
        *,
        max_concurrent: int,
        limits: Limits,
    ) -> None:
        super().__init__(store)
        self.answer: Answer | None = None
        self._directory = directory
        self._pending = lost.Pending(directory)
        self.store = store
        self._files = files
        self._metrics = metrics
        self._limits = limits
        self._request_slots = asyncio.Semaphore(max_concurrent)
        self._retry_lock = asyncio.Lock()  # one request at a time is retried after an engine's death it may have caused
        self._checking = asyncio.Lock()
        self._stops: dict[str, asyncio.Event] = {}
        self._journals: dict[str, Journal] = {}

    # --- lifecycle ------------------------------------------------------------------------------------

    def _clean_up_at_start(self) -> None:
        aside = self._directory.parent / lost.LOST_AND_FOUND
        lost.ensure_directory(self._directory, aside)
        known = self.store.statuses()
        for path in (left := lost.entries(self._directory)):
            if known.get(path.name) in FINAL:
                lost.remove(path)
        unknown = [path for path in left if path.name not in known]
        lost.remove_or_set_aside(unknown, self._pending, aside / self._directory.name, self.store.database.path.name)

    async def status_changed(self, batch: Batch) -> None:
        if stop := self._stops.get(batch.id):
            stop.set()

    async def count(self) -> None:
        """Update the metric of batches by status."""
        self._metrics.batches(await asyncio.to_thread(self.store.counts))

    # --- client operations ------------------------------------------------------------------------------

    async def create(self, caller: Caller, endpoint: str, file: StoredFile, metadata: dict[str, str] | None) -> Batch:
        """Record a batch and start it."""
        batch = await asyncio.to_thread(self._create, caller, endpoint, file, metadata)
        self.enqueue(batch)
        return batch

    def _create(self, caller: Caller, endpoint: str, file: StoredFile, metadata: dict[str, str] | None) -> Batch:
        with contextlib.ExitStack() as undo, self.store.database.transaction():
            batch = self.store.create(caller, endpoint, file.id, metadata)
            directory = self._directory / batch.id
            undo.callback(self._pending.clear, batch.id)
            undo.callback(shutil.rmtree, directory, ignore_errors=True)
            self._pending.mark(batch.id)
            directory.mkdir(parents=True)
            _link_or_copy(file.path, directory / INPUT)  # the client may delete the original
            sync(directory)
            sync(self._directory)
            self.store.database.after_commit(undo.pop_all)
            self.store.database.after_commit(partial(self._pending.clear, batch.id))
        try:
            self.store.share(batch, directory)
        except BaseException:
            lost.rename_and_remove(directory)
            raise
        return batch

    async def cancel(self, batch: Batch) -> Batch:
        """Cancel a batch. Raises BatchStateError when it has ended or is finalizing."""
        moved = await asyncio.to_thread(self.store.move_for_client, batch, "cancelling")
        if stop := self._stops.get(batch.id):
            stop.set()
        return moved

    def progress(self, batch: Batch) -> tuple[int, int]:
        """Return the numbers of requests answered successfully and with an error."""
        journal = self._journals.get(batch.id)
        return (batch.completed, batch.failed) if journal is None else (journal.counts[True], journal.counts[False])

    # --- one batch ---------------------------------------------------------------------------------------

    def start_tasks(self, batches: Sequence[Batch]) -> None:
        self._stops.update((batch.id, asyncio.Event()) for batch in batches)
        super().start_tasks(batches)

    def _task_ended(self, batch_id: str) -> None:
        super()._task_ended(batch_id)
        self._stops.pop(batch_id, None)
        self._journals.pop(batch_id, None)

    async def _work(self, batch: Batch) -> None:
        """Run a batch from its present status to its end."""
        BACKGROUND.set(True)
        while self.store.holds(batch.id):
            try:
                await asyncio.to_thread(self.store.prepare, batch, self._directory / batch.id)
                now = await asyncio.to_thread(self.store.get, batch.tenant, batch.id)
                if now.status in FINAL:
                    break
                await self._advance(now)
            except BatchStateError:  # cancelled concurrently
                continue
            except (StorageFull, DatabaseBusy, RemoteUnavailable) as fault:
                log.warning("batch %s is retried after a fault: %s", batch.id, fault)
                await asyncio.sleep(SPACE_SECONDS)
            except Exception:
                log.exception("batch %s failed", batch.id)
                reason = Fault("server_error", "The batch failed because of a fault in the server.")
                with contextlib.suppress(BatchStateError):
                    await self._move(batch, "failed", faults=[reason])
                break
        else:
            return  # the lease is lost: another server runs it
        await self.remove_files(batch.id)
        await asyncio.to_thread(self.store.delete_files, batch.id)

    async def remove_files(self, id_: str) -> None:
        await asyncio.to_thread(lost.rename_and_remove, self._directory / id_)

    async def _move(self, batch: Batch, status: Status, **changes: object) -> Batch:
        return await asyncio.to_thread(partial(self.store.move, batch, status, **changes))

    async def _advance(self, batch: Batch) -> None:
        """Do the work of the present status, and move to the next."""
        directory = self._directory / batch.id
        match batch.status:
            case "validating":
                async with self._checking:
                    total, faults = await asyncio.to_thread(rows.check, directory / INPUT, batch.endpoint, self._limits)
                if faults:
                    await self._move(batch, "failed", total=total, faults=faults)
                else:
                    await self._move(batch, "in_progress", total=total)
            case "in_progress":
                journal = self._journals[batch.id] = await asyncio.to_thread(self._open_journal, directory)
                if await self._answer_all(batch, journal):
                    await self._move(batch, "finalizing")
                elif not self._stops[batch.id].is_set():  # set when cancelled
                    message = "The completion window ended before this request was answered."
                    await self._finish(batch, "expired", {"code": "batch_expired", "message": message})
            case "finalizing":
                await self._finish(batch, "completed")
            case "cancelling":
                message = "The batch was cancelled before this request was answered."
                await self._finish(batch, "cancelled", {"code": "batch_cancelled", "message": message})

    def _open_journal(self, directory: Path) -> Journal:
        with raising_storage_full():
            return Journal(directory)

    async def _answer_all(self, batch: Batch, journal: Journal) -> bool:
        """Answer all rows without an answer; False when stopped, or out of the batch's time."""
        answering = asyncio.create_task(self._answer_rows(batch, journal))
        stopped = asyncio.create_task(self._stops[batch.id].wait())
        try:
            left = max(0.0, batch.expires_at - time.time())
            await asyncio.wait({answering, stopped}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if answering.done():
                answering.result()
            return answering.done()
        finally:
            answering.cancel()
            stopped.cancel()
            await asyncio.gather(answering, stopped, return_exceptions=True)

    async def _answer_rows(self, batch: Batch, journal: Journal) -> None:
        in_flight: set[asyncio.Task[None]] = set()
        left = rows.read(self._directory / batch.id / INPUT)
        try:
            while (row := await asyncio.to_thread(_next, left, journal)) is not None:
                await self._request_slots.acquire()
                task = asyncio.create_task(self._answer_row(batch, row, journal))
                task.add_done_callback(lambda _: self._request_slots.release())
                in_flight.add(task)
                for done in [one for one in in_flight if one.done()]:
                    in_flight.remove(done)
                    done.result()
            await asyncio.gather(*in_flight)
        finally:
            for task in in_flight:
                task.cancel()
            await asyncio.gather(*in_flight, return_exceptions=True)

    async def _answer_row(self, batch: Batch, row: Row, journal: Journal) -> None:
        assert self.answer is not None
        deaths = 0
        while True:
            async with self._retry_lock if deaths else contextlib.nullcontext():
                reply = await self.answer(batch.caller, batch.endpoint, row.body)
            deaths += reply.died
            if deaths == MAX_DEATHS or (reply.status not in RETRIED_STATUSES and not reply.died):
                break
            await asyncio.sleep(RETRY_SECONDS)
        response = {"status_code": reply.status, "request_id": new_id("req_"), "body": msgspec.Raw(reply.body)}
        if await asyncio.to_thread(journal.add, row.custom_id, response, None):
            self._metrics.ended("completed" if reply.status < 400 else "failed")

    async def _finish(self, batch: Batch, status: Status, unanswered: dict[str, str] | None = None) -> None:
        """Publish the answers as files. `unanswered`: the error for rows without an answer."""
        write = partial(self._write_results, batch, status, unanswered)
        for _ in range(await asyncio.to_thread(write)):
            self._metrics.ended(status)

    def _write_results(self, batch: Batch, status: Status, unanswered: dict[str, str] | None) -> int:
        """Do the work of `_finish`; return the number of rows without an answer."""
        directory = self._directory / batch.id
        # Reuse an open journal: a late answer is either added before its row is marked as unanswered, or dropped.
        journal = self._journals.get(batch.id) or self._open_journal(directory)
        count = 0
        if unanswered is not None and batch.total:  # total: the file has been checked
            for row in rows.read(directory / INPUT):
                if row.custom_id not in journal.done:
                    count += journal.add(row.custom_id, None, unanswered)
        self.store.complete(batch)
        file_ids: dict[bool, str | None] = {True: None, False: None}
        with raising_storage_full(), self._files.staging() as staging:
            for good, path in journal.paths.items():
                if journal.counts[good]:
                    _link_or_copy(path, staging / path.name)
                    # A fixed id: repeating this after a crash makes no second file.
                    file_ids[good] = f"file-{batch.id.removeprefix('batch_')}{path.stem[0]}"
                    self._files.add(
                        batch.tenant,
                        staging / path.name,
                        filename=f"{batch.id}_{path.name}",
                        purpose=RESULTS,
                        file_id=file_ids[good],
                    )
        done = {"completed": journal.counts[True], "failed": journal.counts[False]}
        self.store.move(batch, status, output_file=file_ids[True], error_file=file_ids[False], **done)
        return count


def _next(left: Iterator[Row], journal: Journal) -> Row | None:
    """Return the next row without an answer."""
    return next((row for row in left if row.custom_id not in journal.done), None)


def _link_or_copy(source: Path, target: Path) -> None:
    """Link or copy a file to a second name, which outlives the first."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        sync(target)
