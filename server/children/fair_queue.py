"""Whose turn it is, where few places are wanted by many: nobody's slow or frequent work holds up the rest."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

_SLOW_SECONDS = 0.25
_WEIGHT = 10.0  # seconds that one has to wait behind others for each second that its work takes
_REMEMBERED = 4096  # keys, and works


@dataclass(eq=False)
class _Key:
    position: float = 0.0  # of its last call
    taken: int = 0  # places that it has now


@dataclass(eq=False)
class Call:
    """A wish for a place."""

    position: float
    key: _Key
    work: str
    place: asyncio.Future[None]
    began: float = 0.0  # when its work did; whoever has the place may say later


class FairQueue:
    """Places that are given to keys in turn.

    The longer some work took the last time, the further back its calls stand, those of one key behind each other. The
    last place is never given to a key that has one already, nor to work that was slow.
    """

    def __init__(self, places: int) -> None:
        self._places = places
        self._free = places
        self._waiting: list[Call] = []
        self._keys: dict[str, _Key] = {}  # the first known first, as are works
        self._seconds: dict[str, float] = {}  # work -> how long it took

    @asynccontextmanager
    async def take(self, key: str, work: str) -> AsyncIterator[Call]:
        """Wait for a place, and have it until the end."""
        owner = self._keys.setdefault(key, _Key())
        owner.position = max(time.monotonic(), owner.position) + _WEIGHT * self._seconds.get(work, 0.0)
        call = Call(owner.position, owner, work, asyncio.get_running_loop().create_future())
        self._waiting.append(call)
        self._give()
        try:
            await call.place
            call.began = time.monotonic()
            yield call
        finally:
            if call in self._waiting:
                self._waiting.remove(call)
            else:
                owner.taken -= 1
                self._free += 1
            if call.began:
                self._seconds.pop(work, None)
                self._seconds[work] = time.monotonic() - call.began
            for known in (self._keys, self._seconds):
                if len(known) > _REMEMBERED:
                    del known[next(iter(known))]
            self._give()

    def _give(self) -> None:
        while self._free:
            ready = [call for call in self._waiting if not call.place.done() and self._may_have_place(call)]
            if not ready:
                return
            first = min(ready, key=lambda call: call.position)
            self._waiting.remove(first)
            self._free -= 1
            first.key.taken += 1
            first.place.set_result(None)

    def _may_have_place(self, call: Call) -> bool:
        spare = self._free > 1 or self._places == 1
        return spare or not (call.key.taken or self._seconds.get(call.work, 0.0) > _SLOW_SECONDS)
