"""A response generated in the background, and its events for clients that follow them."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


class Followed(Protocol):
    """The events of a response."""

    def follow(self, after: int) -> AsyncGenerator[Any, None]:
        """Yield the events after this sequence number, as they occur."""


@dataclass
class Running:
    """A response being generated in the background, and its events so far.

    Attributes:
        streamed: its events are stored with it.
        cancelled: a client cancelled it; its output so far is stored.
        settled: it has finished and is about to be stored.
    """

    tenant: str
    id: str
    streamed: bool = False
    events: list[Any] = field(default_factory=list)
    task: asyncio.Task[None] | None = None
    cancelled: bool = False
    settled: bool = False
    _more: asyncio.Event = field(default_factory=asyncio.Event)
    _ended: bool = False

    def publish(self, event: Any) -> None:
        """Add an event for all followers."""
        self.events.append(event)
        self._wake()

    def end(self) -> None:
        """Mark the events as complete, which ends all followers."""
        self._ended = True
        self._wake()

    def cancel(self) -> None:
        """Cancel the task that generates the response."""
        if self.task is not None:
            self.task.cancel()

    async def stop(self) -> None:
        """Cancel the task, and wait for its end."""
        self.cancel()
        if self.task is not None:
            await asyncio.gather(self.task, return_exceptions=True)

    def _wake(self) -> None:
        more, self._more = self._more, asyncio.Event()
        more.set()

    async def follow(self, after: int) -> AsyncGenerator[Any, None]:
        """Yield the events after this sequence number, as they occur."""
        position = after + 1
        while True:
            more = self._more
            for event in self.events[position:]:
                yield event
            position = max(position, len(self.events))
            if self._ended and position >= len(self.events):
                return
            if not self._ended:
                await more.wait()


@dataclass(frozen=True)
class Ended:
    """The events of a finished response."""

    events: Sequence[Any]

    async def follow(self, after: int) -> AsyncGenerator[Any, None]:
        """Yield the events after this sequence number."""
        for event in self.events[after + 1 :]:
            yield event
