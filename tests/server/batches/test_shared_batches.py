"""Batches that several servers have in one object store."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from adapters.storage.bucket import Bucket
from server.batches import shared as module
from server.batches.store import Batch, BatchStateError
from server.finetune import sharing
from server.services import TENANT
from tests.server.batches.test_batches import create, life, lines_of, row, until
from tests.support.scripted import Served, hold_after
from tests.support.several import LEASE, asleep, take_over
from tests.support.site import eventually
from tests.support.threads import threads_at_rest

ROWS = [row(f"r{i}") for i in range(12)]


class Lives:
    """Servers that are opened as a test needs them."""

    def __init__(self, root: Path, stack: AsyncExitStack) -> None:
        self.url = f"file://{root}/bucket"
        self._root, self._stack = root, stack

    async def open(self, name: str) -> Served:
        (self._root / name).mkdir()
        settings: dict[str, Any] = {"store_poll_seconds": 0.1, "job_lease_seconds": LEASE, "batch_requests": 2}
        opened = life(self._root / name, adapter_store=self.url, **settings)
        return await self._stack.enter_async_context(opened)


@pytest.fixture
async def lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Lives]:
    monkeypatch.setattr(module, "_PART_BYTES", 1)
    monkeypatch.setattr(sharing, "_RENEWALS", 60)
    async with AsyncExitStack() as stack:
        yield Lives(tmp_path, stack)


def has_room(served: Served, most: int) -> None:
    assert served.services.batches.sharing is not None
    served.services.batches.sharing.records._max_held = most


async def die(served: Served) -> None:
    """As by `kill -9`: nothing is given back."""
    batches = served.services.batches
    assert batches.sharing is not None
    await batches.sharing.stop()
    for batch in list(batches.tasks):
        await batches.abandon(batch)
    await threads_at_rest()


async def test_another_server_ends_the_batch_of_one_that_died_and_asks_for_nothing_twice_that_was_sent(
    lives: Lives,
) -> None:
    one, two = await lives.open("one"), await lives.open("two")
    has_room(two, 0)
    hold_after(one, 5)
    batch = await create(one, ROWS)
    assert (await two.client.get(f"/v1/batches/{batch['id']}")).json()["id"] == batch["id"]  # at once
    seen = await until(two, batch, "in_progress", completed=4)
    await one.client.delete(f"/v1/files/{batch['input_file_id']}")
    await die(one)
    await take_over(two.services.batches.sharing, batch["id"])
    done = await until(two, batch)
    assert done["request_counts"] == {"total": 12, "completed": 12, "failed": 0}
    answers = await lines_of(two, done["output_file_id"])
    assert sorted(line["custom_id"] for line in answers) == sorted(line["custom_id"] for line in ROWS)
    assert len(two.engine.requests) <= 12 - seen["request_counts"]["completed"]
    page = two.services.tuning.files.page(TENANT, limit=9, purpose="batch_output")[0]
    assert [file.id for file in page] == [done["output_file_id"]]
    await eventually(lambda: not Bucket(lives.url).list("batch-files"))


async def in_its_middle(lives: Lives) -> tuple[Served, Served, Any]:
    """Two servers, and a batch that the first one works on, which the second has seen."""
    one, two = await lives.open("one"), await lives.open("two")
    has_room(two, 0)
    hold_after(one, 3)
    batch = await create(one, ROWS)
    await until(one, batch, "in_progress", completed=3)
    await until(two, batch, "in_progress", completed=1)
    return one, two, batch


async def test_a_batch_is_cancelled_at_another_server(lives: Lives) -> None:
    _, two, batch = await in_its_middle(lives)
    assert (await two.client.post(f"/v1/batches/{batch['id']}/cancel")).json()["status"] == "cancelling"
    done = await until(two, batch)
    assert (done["status"], done["request_counts"]["total"]) == ("cancelled", 12)
    assert len(await lines_of(two, done["output_file_id"])) == done["request_counts"]["completed"] == 3
    assert len(await lines_of(two, done["error_file_id"])) == 9
    assert not two.engine.requests


async def test_all_answers_are_in_the_store_when_there_is_nothing_more_to_ask(
    lives: Lives, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its server dies in the last moment, with few answers since it sent some."""
    monkeypatch.setattr(module, "_PART_BYTES", 2**30)
    monkeypatch.setattr(module, "_PART_RENEWALS", 10**9)
    one, two = await lives.open("one"), await lives.open("two")
    has_room(two, 0)
    monkeypatch.setattr(one.services.batches, "_finish", lambda *_: asyncio.sleep(3600))
    batch = await create(one, ROWS)
    await until(two, batch, "finalizing")
    await die(one)
    await take_over(two.services.batches.sharing, batch["id"])
    done = await until(two, batch)
    assert (done["status"], done["request_counts"]["completed"]) == ("completed", len(ROWS))
    assert len(await lines_of(two, done["output_file_id"])) == len(ROWS)
    assert not two.engine.requests


async def test_a_server_that_was_asleep_ends_nothing_that_is_anothers(lives: Lives) -> None:
    one, two, batch = await in_its_middle(lives)
    ours = one.services.batches.sharing
    await asleep(ours)
    assert ours is not None
    released = hold_after(two, 4)
    await take_over(two.services.batches.sharing, batch["id"])
    await eventually(lambda: len(two.engine.requests) > 4)
    assert ours.records.leases.holds(batch["id"])
    refused = one.services.batches.store.get(TENANT, batch["id"])
    with pytest.raises(BatchStateError):
        one.services.batches.store.move(refused, "failed")
    released.set()
    done = await until(two, batch)
    assert (done["status"], done["request_counts"]["completed"]) == ("completed", 12)


async def test_a_batch_from_before_there_was_a_store_goes_on_at_another_server(
    lives: Lives, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "one").mkdir()
    async with life(tmp_path / "one") as alone:
        hold_after(alone, 5)
        batch = await create(alone, ROWS)
        await eventually(lambda: sum(alone.services.batches.progress(stored(alone, batch["id"]))) == 5)
    two = await lives.open("two")
    monkeypatch.setattr(sharing.Sharing, "start", lambda self: None)  # it only gives what it has
    async with life(tmp_path / "one", adapter_store=lives.url):
        done = await until(two, batch, "completed")
        assert done["request_counts"] == {"total": 12, "completed": 12, "failed": 0}
        assert len(two.engine.requests) == 7
        assert {line["custom_id"] for line in await lines_of(two, done["output_file_id"])} == {
            f"r{i}" for i in range(12)
        }


def stored(served: Served, batch_id: str) -> Batch:
    return served.services.batches.store.get(TENANT, batch_id)
