"""Responses shared by several servers through one object store: created at one, read, continued and ended at others."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from adapters.storage.bucket import Bucket
from adapters.storage.records import Records
from adapters.storage.versions import RemoteUnavailable
from server.http.quotas import stored_bytes
from server.responses import store
from server.responses.shared import PREFIX, SharedResponses
from server.services import TENANT
from server.tenants.caller import DEFAULT_NAME
from tests.support.chats import named_events, sent_prompt
from tests.support.responses import get, made, post
from tests.support.scripted import TEXT, Served, hold_at, serving
from tests.support.several import LEASE
from tests.support.site import eventually
from tests.support.threads import threads_at_rest


class Lives:
    """Opens servers for a test."""

    def __init__(self, root: Path, url: str, stack: AsyncExitStack) -> None:
        self.url, self.root, self._stack = url, root, stack

    async def open(self, name: str, **more: Any) -> Served:
        (self.root / name).mkdir(exist_ok=True)
        settings: dict[str, Any] = {"store_poll_seconds": 0.1, "job_lease_seconds": LEASE, "adapter_store": self.url}
        return await self._stack.enter_async_context(serving(self.root / name, **settings | more))


@pytest.fixture
async def lives(tmp_path: Path, store_url: str) -> AsyncIterator[Lives]:
    async with AsyncExitStack() as stack:
        yield Lives(tmp_path, store_url, stack)


async def status(served: Served, id_: str, method: str = "GET") -> int:
    return (await served.client.request(method, f"/v1/responses/{id_}")).status_code


async def until(served: Served, id_: str, wanted: str) -> dict[str, Any]:
    async with asyncio.timeout(60):
        while (found := await get(served, id_))["status"] != wanted:
            assert found["status"] == "in_progress", found
            await asyncio.sleep(0.02)
    return found


def responses_of(served: Served) -> SharedResponses:
    found = served.services.responses
    assert isinstance(found, SharedResponses)
    return found


async def die(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop as after `kill -9`: no lease is given back."""
    with monkeypatch.context() as patch:
        patch.setattr(responses_of(served), "_release_lease", lambda key: None)
        await served.services.responses.stop()
    await threads_at_rest()


async def believed_dead(served: Served, id_: str) -> dict[str, Any]:
    """The response once this server assumes its holder dead, having seen no renewal for the duration of the lease.

    A last renewal may still be on its way, so the times are set back repeatedly.
    """
    leases, key = responses_of(served)._leases, f"{DEFAULT_NAME}/{id_}"
    async with asyncio.timeout(60):
        while (found := await get(served, id_))["status"] == "in_progress":
            if seen := leases._seen.get(key):
                leases._seen[key] = seen[0], seen[1] - LEASE - 1
    kept: dict[str, Any] = found
    return kept


async def test_a_response_is_read_continued_and_deleted_at_other_servers(lives: Lives) -> None:
    one, two, three = [await lives.open(name) for name in ("one", "two", "three")]
    first = await made(one)
    assert await get(two, first["id"]) == first
    items = await get(two, f"{first['id']}/input_items")
    assert [item["role"] for item in items["data"]] == ["user"]
    second = await made(two, input="More", previous_response_id=first["id"])
    assert f"assistant\n{TEXT}" in sent_prompt(two)
    third = await made(three, input=[{"role": "user", "content": "x"}, {"id": second["output"][0]["id"]}])
    assert await get(one, third["id"]) == third
    assert await status(two, first["id"], "DELETE") == 200
    for site in (one, two, three):
        assert await status(site, first["id"]) == 404
        assert await status(site, first["id"], "DELETE") == 404
    assert (await post(one, previous_response_id=first["id"])).status_code == 404
    assert (await get(one, f"{second['id']}/input_items"))["data"][-1]["content"][0][
        "text"
    ] == "Hi"  # it has its own copy of the input


async def test_a_restart_on_an_empty_disk_finds_them(lives: Lives) -> None:
    first = await made(await lives.open("one"))
    assert await get(await lives.open("two"), first["id"]) == first
    assert len(Bucket(lives.url).list(PREFIX)) == 1


async def test_other_tenants_responses_are_not_found(lives: Lives) -> None:
    one, two = await lives.open("one"), await lives.open("two")
    first = await made(one)
    with pytest.raises(Exception, match="No such response"):
        responses_of(two).get("rival", first["id"])
    for id_ in ("resp_" + "0" * 32, f"..%2f{DEFAULT_NAME}%2f{first['id']}", "resp_x", f"{first['id']}.json"):
        assert await status(two, id_) == 404


# --- background responses ------------------------------------------------------------------------------------------


async def test_one_in_the_background_is_seen_and_cancelled_at_another(lives: Lives) -> None:
    one, two = await lives.open("one"), await lives.open("two")
    going = hold_at(one, 4)
    begun = await made(one, background=True)
    await going.until_reached()
    assert await get(two, begun["id"]) == begun
    assert (await post(two, previous_response_id=begun["id"])).status_code == 400  # it is not finished
    for _ in range(2):
        cancelled = await two.client.post(f"/v1/responses/{begun['id']}/cancel")
        assert cancelled.json()["status"] == "cancelled"
    await eventually(lambda: not one.engine.running)
    await eventually(lambda: not one.services.responses.running)
    left = await get(two, begun["id"])
    assert left["status"] == "cancelled"
    assert TEXT.startswith(left["output"][0]["content"][0]["text"])
    assert one.services.drain.open_requests == 0


async def test_one_in_the_background_ends_for_all(lives: Lives) -> None:
    one, two = await lives.open("one"), await lives.open("two")
    going = hold_at(one, 2)
    begun = await made(one, background=True)
    await asyncio.sleep(0.5)  # long enough for some renewals
    assert await get(two, begun["id"]) == begun
    going.set()
    done = await until(two, begun["id"], "completed")
    assert done["output"][0]["content"][0]["text"] == TEXT
    assert await get(one, begun["id"]) == done


async def test_its_stream_is_followed_at_another(lives: Lives) -> None:
    one, two = await lives.open("one"), await lives.open("two")
    going = hold_at(one, 6)
    reading = asyncio.create_task(post(one, background=True, stream=True))
    await eventually(lambda: bool(one.services.responses.running))
    (id_,) = one.services.responses.running
    await eventually(lambda: bool(Bucket(lives.url).list(PREFIX)))
    other = asyncio.create_task(two.client.get(f"/v1/responses/{id_}?stream=true&starting_after=2"))
    await asyncio.sleep(0.3)
    assert not other.done()
    going.set()
    stream = named_events(await reading)
    assert stream[-1]["type"] == "response.completed"
    assert named_events(await other) == stream[3:]
    again = await two.client.get(f"/v1/responses/{id_}?stream=true&starting_after=4")
    assert named_events(again) == stream[5:]
    plain = await made(one)
    assert (await two.client.get(f"/v1/responses/{plain['id']}?stream=true")).status_code == 400


async def test_when_its_server_dies_it_has_failed(lives: Lives, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = await lives.open("one"), await lives.open("two")
    hold_at(one, 6)
    reading = asyncio.create_task(post(one, background=True, stream=True))
    await eventually(lambda: bool(one.services.responses.running))
    (id_,) = one.services.responses.running
    await eventually(lambda: bool(Bucket(lives.url).list(PREFIX)))
    following = asyncio.create_task(two.client.get(f"/v1/responses/{id_}?stream=true"))
    await asyncio.sleep(0.5)
    await die(one, monkeypatch)
    assert (await get(two, id_))["status"] == "in_progress"  # the server may still be alive
    left = await believed_dead(two, id_)
    assert (left["status"], left["error"]["code"]) == ("failed", "server_error")
    events = named_events(await following)
    assert events[0]["type"] == "response.created"
    assert (events[-1]["type"], events[-1]["response"]["status"]) == ("response.failed", "failed")
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert await get(one, id_) == left
    await reading


async def test_a_server_that_was_taken_for_dead_changes_nothing(lives: Lives, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = await lives.open("one"), await lives.open("two")
    monkeypatch.setattr(responses_of(one), "_renew", lambda running: asyncio.sleep(3600))
    going = hold_at(one, 4)
    begun = await made(one, background=True)
    left = await believed_dead(two, begun["id"])
    assert left["status"] == "failed"
    going.set()
    await eventually(lambda: not one.services.responses.running)
    assert await get(one, begun["id"]) == await get(two, begun["id"]) == left


async def test_a_server_that_stops_says_so(lives: Lives) -> None:
    one, two = await lives.open("one"), await lives.open("two")
    hold_at(one, 1)
    begun = await made(one, background=True)
    assert (await get(two, begun["id"]))["status"] == "in_progress"
    await one.services.responses.stop()
    left = await get(two, begun["id"])
    assert (left["status"], left["error"]["code"]) == ("failed", "server_error")


async def test_one_that_runs_is_deleted_at_another(lives: Lives) -> None:
    one, two = await lives.open("one"), await lives.open("two")
    hold_at(one, 4)
    begun = await made(one, background=True)
    assert await status(two, begun["id"], "DELETE") == 200
    await eventually(lambda: not one.services.responses.running)
    assert not one.engine.running
    assert await status(one, begun["id"]) == 404
    assert Bucket(lives.url).list(PREFIX) == []


# --- limits, and a store that is down -----------------------------------------------------------------------------


async def test_old_ones_and_too_many_go_first(lives: Lives) -> None:
    room: dict[str, Any] = {"response_bytes": 1024**2, "max_body_bytes": 2**21, "context": 2**20}
    one, two = [await lives.open(name, **room) for name in ("one", "two")]
    first = await made(one)
    large = []
    for _ in range(3):
        await asyncio.sleep(1.1)  # a bucket's times are whole seconds
        large.append(await made(one, input="x" * 400_000))
    responses_of(two).sweep()
    assert [await status(one, found["id"]) for found in (first, *large)] == [404, 404, 200, 200]
    assert 800_000 < stored_bytes(two.services, TENANT) < 2**20
    assert "--response-bytes" in (await post(one, input='"' * 600_000)).json()["error"]["message"]
    responses_of(two)._seconds = 0.0
    responses_of(two).sweep()
    assert [await status(one, found["id"]) for found in large] == [404, 404, 404]
    assert Bucket(lives.url).list(PREFIX) == []


async def test_bytes_are_counted_over_all_servers(lives: Lives) -> None:
    one, two = await lives.open("one"), await lives.open("two")
    first = await made(one, input="x" * 100)
    mine = stored_bytes(one.services, TENANT)
    assert mine > 500
    assert stored_bytes(two.services, TENANT) == 0
    responses_of(two).sweep()
    assert stored_bytes(two.services, TENANT) >= mine
    assert await status(two, first["id"], "DELETE") == 200
    assert stored_bytes(two.services, TENANT) == 0  # without a sweep at the server that deleted it
    responses_of(one).sweep()
    assert stored_bytes(one.services, TENANT) == 0


async def test_local_objects_are_moved_to_a_new_store(lives: Lives, tmp_path: Path) -> None:
    async with serving(tmp_path / "one") as alone:
        first = await made(alone)
        hold_at(alone, 1)
        left = await made(alone, background=True)
        await alone.services.responses.stop()
    one, two = await lives.open("one"), await lives.open("two")
    assert await get(one, first["id"]) == first  # before and after it is moved
    working = asyncio.create_task(one.services.responses.run())
    await eventually(lambda: len(Bucket(lives.url).list(PREFIX)) == 2)
    assert await get(two, first["id"]) == first
    assert (await get(two, left["id"]))["status"] == "failed"
    assert await status(two, first["id"], "DELETE") == 200
    assert await status(one, first["id"]) == 404
    working.cancel()


async def test_while_the_store_is_down_a_response_is_not_said_to_be_kept(
    lives: Lives, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = await lives.open("one")
    first = await made(one)
    monkeypatch.setattr(store, "RETRY_SECONDS", 0.05)

    def fail(*_: object, **__: object) -> None:
        raise RemoteUnavailable("no route")

    going = hold_at(one, 4)
    begun = await made(one, background=True)
    with monkeypatch.context() as patch:
        for method in ("change", "fetch"):
            patch.setattr(Records, method, fail)
        going.set()  # the background response waits until it can be stored
        for response in (
            await post(one),
            await post(one, background=True),
            await one.client.get(f"/v1/responses/{first['id']}"),
            await one.client.delete(f"/v1/responses/{first['id']}"),
            await post(one, previous_response_id=first["id"]),
        ):
            error = response.json()["error"]
            assert (response.status_code, error["code"]) == (503, "adapter_store_unavailable")
        events = named_events(await post(one, stream=True))
        assert events[-1]["type"] in ("error", "response.failed")
        assert (await post(one, store=False)).status_code == 200
        await asyncio.sleep(0.3)
    assert (await until(one, begun["id"], "completed"))["output"]
    assert await get(one, first["id"]) == first


async def test_nothing_is_remembered_of_those_that_have_ended(lives: Lives) -> None:
    one, two = await lives.open("one"), await lives.open("two")
    for background in (False, True):
        done = await made(one, background=background)
        await until(two, done["id"], "completed")
    await eventually(lambda: not one.services.responses.running)
    for site in (one, two):
        responses = responses_of(site)
        assert responses._records._known == {}
        assert (responses._leases._seen, responses._leases.held_keys()) == ({}, [])
