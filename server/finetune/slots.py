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
        slot: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((tenant, slot))
        self._assign()
        try:
            await slot
            yield
        finally:
            if (tenant, slot) in self._waiting:
                self._waiting.remove((tenant, slot))
            else:
                self._held[tenant] -= 1
                self._free += 1
                self._assign()

    def _assign(self) -> None:
        while self._free and self._waiting:
            tenant, slot = first = min(self._waiting, key=lambda one: self._held[one[0]])  # ties: longest waiting
            self._waiting.remove(first)
            self._held[tenant] += 1
            self._free -= 1
            slot.set_result(None)
