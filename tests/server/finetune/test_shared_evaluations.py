"""Evaluations shared by several servers through one object store."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from adapters.storage.bucket import Bucket
from adapters.storage.records import Records
from adapters.storage.versions import RemoteUnavailable
from server.finetune import evaluations, sharing
from server.finetune.evaluation_store import EvaluationStateError
from server.services import TENANT
from tests.support.scripted import BASE, Served, hold_after, serving
from tests.support.several import EXAMPLES, LEASE, asleep, take_over
from tests.support.site import eventually
from tests.support.threads import threads_at_rest

ROWS = 8  # the rows of EXAMPLES


@asynccontextmanager
async def life(directory: Path, **settings: Any) -> AsyncIterator[Served]:
    """Run the API process once, over the files of an earlier run if there are any."""
    directory.mkdir(exist_ok=True)
    async with serving(directory, **settings) as served:
        await served.services.tuning.start()
        try:
            yield served
        finally:
            await served.services.tuning.stop()


class Lives:
    """Opens servers for a test."""

    def __init__(self, root: Path, url: str, stack: AsyncExitStack) -> None:
        self.url, self.root, self._stack = url, root, stack

    async def open(self, name: str) -> Served:
        settings: dict[str, Any] = {"store_poll_seconds": 0.1, "job_lease_seconds": LEASE, "max_training_jobs": 0}
        opened = life(self.root / name, adapter_store=self.url, **settings)
        return await self._stack.enter_async_context(opened)


@pytest.fixture
async def lives(tmp_path: Path, store_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Lives]:
    monkeypatch.setattr(evaluations, "SPACE_SECONDS", 0.05)
    monkeypatch.setattr(sharing, "_RENEWALS", 60)
    async with AsyncExitStack() as stack:
        yield Lives(tmp_path, store_url, stack)


def sharing_of(served: Served) -> sharing.Sharing:
    found = served.services.tuning.evaluations.sharing
    assert found is not None
    return found


def has_room(served: Served, most: int) -> None:
    sharing_of(served).records._max_held = most


async def ask(served: Served, method: str, path: str, **options: Any) -> Any:
    response = await served.client.request(method, path, **options)
    assert response.status_code == 200, response.text
    return response.json()


async def begun(served: Served) -> str:
    """Create an evaluation of the base and return its id."""
    upload = {"files": {"file": ("data.jsonl", EXAMPLES)}, "data": {"purpose": "fine-tune"}}
    file = (await ask(served, "POST", "/v1/files", **upload))["id"]
    return str((await ask(served, "POST", "/v1/evaluations", json={"model": BASE, "file": file}))["id"])


async def until(served: Served, id_: str, *statuses: str) -> dict[str, Any]:
    async with asyncio.timeout(60):
        while True:
            found: dict[str, Any] = await ask(served, "GET", f"/v1/evaluations/{id_}")
            if found["status"] in statuses:
                return found
            await asyncio.sleep(0.02)


async def die(served: Served) -> None:
    """Stop as after `kill -9`: no lease is given back."""
    await sharing_of(served).stop()
    for id_ in list(served.services.tuning.evaluations.tasks):
        await served.services.tuning.evaluations.abandon(id_)
    await threads_at_rest()


def result_files(served: Served) -> list[str]:
    page, _ = served.services.tuning.files.page(TENANT, limit=9, purpose=evaluations.RESULTS)
    return [file.id for file in page]


async def test_an_evaluation_at_one_server_is_visible_at_others(lives: Lives) -> None:
    one, two = await lives.open("one"), await lives.open("two")
    has_room(two, 0)
    going = hold_after(one, 3)
    id_ = await begun(one)
    assert (await until(two, id_, "running"))["id"] == id_  # without waiting for a poll
    going.set()
    done = await until(two, id_, "succeeded")
    assert done == await until(one, id_, "succeeded")
    assert done["examples"] == ROWS
    content = (await two.client.get(f"/v1/files/{done['result_files'][0]}/content")).text
    assert len(content.splitlines()) == ROWS
    third = await lives.open("three")
    for site in (one, two, third):
        assert [found["id"] for found in (await ask(site, "GET", "/v1/evaluations"))["data"]] == [id_]
    assert not two.engine.requests


async def test_another_server_ends_the_evaluation_of_one_that_died(lives: Lives) -> None:
    one, two = await lives.open("one"), await lives.open("two")
    has_room(two, 0)
    hold_after(one, 5)
    id_ = await begun(one)
    await eventually(lambda: len(one.engine.requests) > 5)
    await until(two, id_, "running")
    await die(one)
    await take_over(sharing_of(two), id_)
    done = await until(two, id_, "succeeded")
    assert len(two.engine.requests) == 2 * ROWS
    assert result_files(two) == done["result_files"]


async def test_a_stopped_server_gives_its_evaluations_to_others(lives: Lives, tmp_path: Path) -> None:
    two = await lives.open("two")
    has_room(two, 0)
    settings: dict[str, Any] = {"store_poll_seconds": 0.1, "job_lease_seconds": LEASE, "max_training_jobs": 0}
    async with life(tmp_path / "one", adapter_store=lives.url, **settings) as one:
        hold_after(one, 1)
        id_ = await begun(one)
        await eventually(lambda: len(one.engine.requests) > 1)
        await until(two, id_, "running")
    has_room(two, 1)
    assert (await until(two, id_, "succeeded"))["examples"] == ROWS


async def test_a_running_evaluation_is_deleted_at_another_server(lives: Lives) -> None:
    one, two = await lives.open("one"), await lives.open("two")
    has_room(two, 0)
    going = hold_after(one, 3)
    id_ = await begun(one)
    await eventually(lambda: len(one.engine.requests) > 3)
    await until(two, id_, "running")
    assert (await ask(two, "DELETE", f"/v1/evaluations/{id_}"))["deleted"]
    await eventually(lambda: not one.services.tuning.evaluations.tasks)
    going.set()
    for site in (one, two):
        assert (await site.client.get(f"/v1/evaluations/{id_}")).status_code == 404
        assert (await ask(site, "GET", "/v1/evaluations"))["data"] == []
        assert result_files(site) == []
    third = await lives.open("three")
    assert (await ask(third, "GET", "/v1/evaluations"))["data"] == []


async def test_an_evaluation_deleted_just_before_its_end_leaves_no_files(
    lives: Lives, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = await lives.open("one"), await lives.open("two")
    has_room(two, 0)
    monkeypatch.setattr(sharing, "_RENEWALS", 0.01)  # the server that works on it is not notified
    going = hold_after(one, 3)
    id_ = await begun(one)
    await until(two, id_, "running")
    await eventually(lambda: len(one.engine.requests) > 3)
    await asleep(sharing_of(one))
    await ask(two, "DELETE", f"/v1/evaluations/{id_}")
    going.set()
    await eventually(lambda: not one.services.tuning.evaluations.tasks)
    assert len(one.engine.requests) == 2 * ROWS
    await eventually(lambda: not Bucket(lives.url).list(f"file-contents/file-{id_.removeprefix('eval-')}r"))
    assert result_files(one) == []


async def test_a_server_that_was_asleep_writes_nothing_over_anothers_result(lives: Lives) -> None:
    one, two = await lives.open("one"), await lives.open("two")
    has_room(two, 0)
    going = hold_after(one, 3)
    id_ = await begun(one)
    await until(two, id_, "running")
    await eventually(lambda: len(one.engine.requests) > 3)
    await asleep(sharing_of(one))
    await take_over(sharing_of(two), id_)
    done = await until(two, id_, "succeeded")
    store = one.services.tuning.evaluations.store
    with pytest.raises(EvaluationStateError):
        store.save(store.get(TENANT, id_))
    going.set()
    await eventually(lambda: not one.services.tuning.evaluations.tasks)
    assert await until(one, id_, "succeeded") == done
    answers = await asyncio.gather(
        *(site.client.get(f"/v1/files/{done['result_files'][0]}/content") for site in (one, two))
    )
    assert answers[0].text == answers[1].text != ""


async def test_local_objects_are_moved_to_a_new_store(lives: Lives, tmp_path: Path) -> None:
    async with life(tmp_path / "one") as alone:
        id_ = await begun(alone)
        done = await until(alone, id_, "succeeded")
        hold_after(alone, 0)
        unfinished = await begun(alone)
        await alone.services.tuning.evaluations.abandon(unfinished)
    await lives.open("one")
    two = await lives.open("two")
    assert await until(two, id_, "succeeded") == done
    assert (await until(two, unfinished, "succeeded"))["examples"] == ROWS


async def test_no_evaluation_is_created_while_the_store_is_down(lives: Lives, monkeypatch: pytest.MonkeyPatch) -> None:
    one = await lives.open("one")
    done = await until(one, await begun(one), "succeeded")

    def fail(*_: object, **__: object) -> None:
        raise RemoteUnavailable("no route")

    with monkeypatch.context() as patch:
        patch.setattr(Records, "change", fail)
        response = await one.client.post("/v1/evaluations", json={"model": BASE, "file": done["file"]})
        assert (response.status_code, response.json()["error"]["code"]) == (503, "adapter_store_unavailable")
        assert (await one.client.delete(f"/v1/evaluations/{done['id']}")).status_code == 503
    assert [found["id"] for found in (await ask(one, "GET", "/v1/evaluations"))["data"]] == [done["id"]]
