"""Whose turn it is, where few places are wanted by many: nobody's slow or frequent work holds up the rest."""

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

_SLOW_SECONDS = 0.25
_WEIGHT = 10.0  # seconds that one has to wait behind others for each second that it takes
_KEYS = 4096  # that are remembered


@dataclass(eq=False)
class _Key:
    cost: float = 0.0  # seconds that its last turn took
    position: float = 0.0  # of its last call
    taken: int = 0  # places that it has now


class Turns:
    """Places that are given to keys in turn.

    The more time a key's last turn took, the further back its next ones stand, each behind the one before. The last
    place is never given to a key that has one already, nor to one that was slow.
    """

    def __init__(self, places: int) -> None:
        self._places = places
        self._free = places
        self._waiting: list[tuple[float, _Key, asyncio.Future[None]]] = []  # position, whose, call
        self._keys: OrderedDict[str, _Key] = OrderedDict()

    @asynccontextmanager
    async def take(self, name: str) -> AsyncIterator[None]:
        """Wait for a place, and have it until the end."""
        key = self._keys.setdefault(name, _Key())
        self._keys.move_to_end(name)
        if len(self._keys) > _KEYS:
            self._keys.popitem(last=False)
        key.position = max(time.monotonic(), key.position) + _WEIGHT * key.cost
        call = asyncio.get_running_loop().create_future()
        entry = (key.position, key, call)
        self._waiting.append(entry)
        self._give()
        began = None
        try:
            await call
            began = time.monotonic()
            yield
        finally:
            if entry in self._waiting:
                self._waiting.remove(entry)
            else:
                key.taken -= 1
                self._free += 1
            if began is not None:
                key.cost = time.monotonic() - began
            self._give()

    def _give(self) -> None:
        while self._free:
            spare = self._free > 1 or self._places == 1
            ready = [
                entry
                for entry in self._waiting
                if not entry[2].done() and (spare or not (entry[1].taken or entry[1].cost > _SLOW_SECONDS))
            ]
            if not ready:
                return
            first = min(ready, key=lambda entry: entry[0])
            self._waiting.remove(first)
            self._free -= 1
            first[1].taken += 1
            first[2].set_result(None)
