"""Works on records: one asyncio task for each that is under way here, alone or in turn with other servers."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Generic

from server.finetune.record_table import R, RecordTable

if TYPE_CHECKING:
    from server.finetune.sharing import Sharing


class Worker(ABC, Generic[R]):
    """All work of one kind.

    Args:
        records: the table of what is worked on.

    Attributes:
        tasks: those that work on records, by the records' ids.
        sharing: set before `start` where there are several servers; it then says what is worked on here, and when.
    """

    def __init__(self, records: RecordTable[R, Any]) -> None:
        self._records = records
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.sharing: Sharing | None = None

    async def start(self) -> None:
        """Go on with everything that was under way."""
        if self.sharing is not None:
            await self.sharing.begin()
        await asyncio.to_thread(self._sort_out)
        if self.sharing is not None:
            self.sharing.start()
        else:
            self.begin(await asyncio.to_thread(self._records.take_up))

    async def stop(self) -> None:
        """Let go of everything; the next `start` goes on with it."""
        if self.sharing is not None:
            await self.sharing.stop()
        await asyncio.gather(*map(self.abandon, list(self.tasks)))
        if self.sharing is not None:
            await self.sharing.release()

    def go_on(self, record: R) -> None:
        """See that a record which is new, or goes on, is worked on: here or, among several servers, at one of them."""
        if self.sharing is not None:
            self.sharing.wake()
        else:
            self.begin([record])

    def begin(self, records: Sequence[R]) -> None:
        """Work on these, which are this server's."""
        for record in records:
            task = asyncio.create_task(self._work(record), name=record.id)
            self.tasks[record.id] = task
            task.add_done_callback(lambda _, id_=record.id: self._ended(id_))  # type: ignore[misc]

    async def abandon(self, id_: str) -> None:
        """Work on one no longer, at once, and change nothing of it."""
        if task := self.tasks.get(id_):
            task.cancel()
            await asyncio.wait({task})

    async def heed(self, record: R) -> None:
        """Somebody else has changed the status of one that is worked on here."""

    async def clear(self, id_: str) -> None:
        """Remove what is on this disk of a record that is at its end."""

    @abstractmethod
    async def _work(self, record: R) -> None:
        """From wherever the record stands to its end."""

    def _ended(self, id_: str) -> None:
        self.tasks.pop(id_, None)

    def _sort_out(self) -> None:
        """Deal with what the last process left behind, before anything is worked on."""
