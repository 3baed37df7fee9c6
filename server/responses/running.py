"""A response that is made in the background, and its events for whoever follows them."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


class Followed(Protocol):
    """The events of a response."""

    def follow(self, after: int) -> AsyncGenerator[Any, None]:
        """The events behind this number, as they come."""


@dataclass
class Running:
    """A response in the making in the background, and its events so far.

    Attributes:
        streamed: its events are kept with it.
        cancelled: a client wants no more of it; what there is is kept.
        settled: it has come to its end, and is about to be kept.
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
        """Add an event, for all who follow."""
        self.events.append(event)
        self._wake()

    def end(self) -> None:
        """No further event comes: whoever follows is done."""
        self._ended = True
        self._wake()

    def cancel(self) -> None:
        """Cancel the task that makes the response."""
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
        """Events from the one behind this number on, as they come."""
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
    """The events of one that is no longer made."""

    events: Sequence[Any]

    async def follow(self, after: int) -> AsyncGenerator[Any, None]:
        """Events from the one behind this number on."""
        for event in self.events[after + 1 :]:
            yield event
