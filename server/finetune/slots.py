"""Slots for concurrent training jobs: a free one goes to the tenant with the fewest, then to the longest waiting."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class FairSlots:
    """A number of slots; a tenant may hold all of them while no other tenant waits."""

    def __init__(self, count: int) -> None:
        self._free = count
        self._held: Counter[str] = Counter()
        self._waiting: list[tuple[str, asyncio.Future[None]]] = []

    @asynccontextmanager
    async def take(self, tenant: str) -> AsyncIterator[None]:
        """Wait for a slot, and hold it within the context."""
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((tenant, place))
        self._give()
        try:
            await place
            yield
        finally:
            if (tenant, place) in self._waiting:
                self._waiting.remove((tenant, place))
            else:
                self._held[tenant] -= 1
                self._free += 1
                self._give()

    def _give(self) -> None:
        while self._free and self._waiting:
            tenant, place = first = min(self._waiting, key=lambda one: self._held[one[0]])  # ties: longest waiting
            self._waiting.remove(first)
            self._held[tenant] += 1
            self._free -= 1
            place.set_result(None)
