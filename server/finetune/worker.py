"""Base of the workers on records: one asyncio task per record that this server works on."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Generic

from server.finetune.record_table import R, RecordTable

if TYPE_CHECKING:
    from server.finetune.sharing import Sharing


class Worker(ABC, Generic[R]):
    """A worker on the records of one table.

    Args:
        records: the table.

    Attributes:
        tasks: by record id.
        sharing: set before `start` if there are several servers; it then decides which records this server works on.
    """

    def __init__(self, records: RecordTable[R, Any]) -> None:
        self._records = records
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.sharing: Sharing | None = None

    async def start(self) -> None:
        """Resume all unfinished records."""
        if self.sharing is not None:
            await self.sharing.import_records()
        await asyncio.to_thread(self._clean_up_at_start)
        if self.sharing is not None:
            self.sharing.start()
        else:
            self.start_tasks(await asyncio.to_thread(self._records.claim))

    async def stop(self) -> None:
        """Stop all work; the next `start` resumes it."""
        if self.sharing is not None:
            await self.sharing.stop()
        await asyncio.gather(*map(self.abandon, list(self.tasks)))
        if self.sharing is not None:
            await self.sharing.release()

    def enqueue(self, record: R) -> None:
        """Start work on a new or resumed record: here or, with several servers, at one of them."""
        if self.sharing is not None:
            self.sharing.wake()
        else:
            self.start_tasks([record])

    def start_tasks(self, records: Sequence[R]) -> None:
        """Start tasks for records of this server."""
        for record in records:
            task = asyncio.create_task(self._work(record), name=record.id)
            self.tasks[record.id] = task
            task.add_done_callback(lambda _, id_=record.id: self._task_ended(id_))  # type: ignore[misc]

    async def abandon(self, id_: str) -> None:
        """Cancel work on a record, without changing the record."""
        if task := self.tasks.get(id_):
            task.cancel()
            await asyncio.wait({task})

    async def status_changed(self, record: R) -> None:
        """Handle another server's change of status of a record that this server works on."""

    async def remove_files(self, id_: str) -> None:
        """Remove an ended record's files from this disk."""

    @abstractmethod
    async def _work(self, record: R) -> None:
        """Work on a record from its present status to its end."""

    def _task_ended(self, id_: str) -> None:
        self.tasks.pop(id_, None)

    def _clean_up_at_start(self) -> None:
        """Clean up the remains of the last process, before any work starts."""
