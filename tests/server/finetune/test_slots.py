"""Slots for concurrently training jobs."""

import asyncio
from collections.abc import Callable

from server.finetune.slots import FairSlots


async def test_a_free_place_goes_to_the_tenant_with_fewest() -> None:
    slots = FairSlots(2)
    ends: dict[str, asyncio.Event] = {}
    order: list[str] = []

    async def job(tenant: str, name: str) -> None:
        async with slots.take(tenant):
            order.append(name)
            await ends.setdefault(name, asyncio.Event()).wait()

    async def ended(name: str) -> None:
        ends[name].set()
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    names = ["a1", "a2", "a3", "a4", "b1", "b2"]
    tasks = [asyncio.create_task(job(name[0], name)) for name in names]
    await asyncio.sleep(0)
    assert order == ["a1", "a2"]  # no other tenant was waiting yet
    await ended("a1")
    assert order[2:] == ["b1"]
    await ended("a2")
    assert order[3:] == ["a3"]  # each tenant has had one, and this job has waited longest
    await ended("a3")
    assert order[4:] == ["a4"]
    await ended("b1")
    assert order[5:] == ["b2"]
    for name in ("a4", "b2"):
        ends[name].set()
    await asyncio.gather(*tasks)


async def test_one_that_is_cancelled_leaves_its_place() -> None:
    slots = FairSlots(1)

    async def job(then: Callable[[], None] = lambda: None) -> None:
        async with slots.take(""):
            then()
            await asyncio.sleep(60)

    first, second = (asyncio.create_task(job()) for _ in range(2))
    await asyncio.sleep(0)
    second.cancel()  # while it waits
    first.cancel()  # while it trains
    await asyncio.gather(first, second, return_exceptions=True)
    came: list[bool] = []
    third = asyncio.create_task(job(lambda: came.append(True)))
    await asyncio.sleep(0)
    assert came
    third.cancel()
