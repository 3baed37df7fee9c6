"""A fair queue for a few places: slow or frequent work of one key does not hold up others."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

_SLOW_SECONDS = 0.25
_WEIGHT = 10.0  # seconds that a call is moved back for each second that its work took the last time
_MAX_REMEMBERED = 4096  # keys, and kinds of work


@dataclass(eq=False)
class _Key:
    position: float = 0.0  # of its last call
    held: int = 0  # places held now


@dataclass(eq=False)
class Call:
    """A request for a place."""

    position: float
    key: _Key
    work: str
    place: asyncio.Future[None]
    began: float = 0.0  # start of its work, monotonic; the holder of the place may move it later


class FairQueue:
    """Places given to keys in turn.

    The longer a kind of work took the last time, the further back its calls are queued; calls of one key queue behind
    each other. The last free place never goes to a key that already holds one, nor to work that was slow.
    """

    def __init__(self, places: int) -> None:
        self._places = places
        self._free = places
        self._waiting: list[Call] = []
        self._keys: dict[str, _Key] = {}  # the oldest first
        self._seconds: dict[str, float] = {}  # kind of work -> its last duration; the oldest first

    @asynccontextmanager
    async def acquire(self, key: str, work: str) -> AsyncIterator[Call]:
        """Wait for a place and hold it until the context ends."""
        owner = self._keys.setdefault(key, _Key())
        owner.position = max(time.monotonic(), owner.position) + _WEIGHT * self._seconds.get(work, 0.0)
        call = Call(owner.position, owner, work, asyncio.get_running_loop().create_future())
        self._waiting.append(call)
        self._assign_places()
        try:
            await call.place
            call.began = time.monotonic()
            yield call
        finally:
            if call in self._waiting:
                self._waiting.remove(call)
            else:
                owner.held -= 1
                self._free += 1
            if call.began:
                self._seconds.pop(work, None)
                self._seconds[work] = time.monotonic() - call.began
            for table in (self._keys, self._seconds):
                if len(table) > _MAX_REMEMBERED:
                    del table[next(iter(table))]
            self._assign_places()

    def _assign_places(self) -> None:
        while self._free:
            ready = [call for call in self._waiting if not call.place.done() and self._may_get_place(call)]
            if not ready:
                return
            first = min(ready, key=lambda call: call.position)
            self._waiting.remove(first)
            self._free -= 1
            first.key.held += 1
            first.place.set_result(None)

    def _may_get_place(self, call: Call) -> bool:
        spare = self._free > 1 or self._places == 1
        return spare or not (call.key.held or self._seconds.get(call.work, 0.0) > _SLOW_SECONDS)
