"""Stored responses of `/v1/responses`, and background responses."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from server.errors import EngineUnavailable
from tests.support.chats import named_events, say, sent_prompt
from tests.support.responses import ended, get, made, post
from tests.support.scripted import TEXT, Served, hold_at, serving


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path, context=4096) as served:
        yield served


# --- stored responses ----------------------------------------------------------------------------------------------


async def test_a_response_is_kept_unless_told_otherwise(served: Served) -> None:
    body = await made(served)
    assert await get(served, body["id"]) == body
    stream = named_events(await post(served, stream=True))
    assert await get(served, stream[-1]["response"]["id"]) == stream[-1]["response"]
    other = await made(served, store=False)
    assert other["store"] is False
    response = await served.client.get(f"/v1/responses/{other['id']}")
    assert (response.status_code, response.json()["error"]["param"]) == (404, "id")


async def test_a_response_goes_on_from_an_earlier_one(served: Served) -> None:
    say(served, "One.")
    first = await made(served, instructions="Forget this.")
    say(served, "Two.")
    second = await made(served, input="More", previous_response_id=first["id"])
    await served.client.delete(f"/v1/responses/{first['id']}")
    await made(served, input="And more", previous_response_id=second["id"])
    texts = [("user", "Hi"), ("assistant", "One."), ("user", "More"), ("assistant", "Two."), ("user", "And more")]
    turns = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in texts)
    assert sent_prompt(served) == f"{turns}<|im_start|>assistant\n"
    error = (await post(served, previous_response_id=first["id"])).json()["error"]
    assert error["param"] == "previous_response_id"


async def test_items_are_named_by_reference(served: Served) -> None:
    say(served, "One.")
    first = await made(served)
    reference = {"type": "item_reference", "id": first["output"][0]["id"]}
    await made(served, input=[reference, {"role": "user", "content": "More"}])
    assert "<|im_start|>assistant\nOne.<|im_end|>" in sent_prompt(served)
    response = await post(served, input=[{"role": "user", "content": "x"}, {"id": "msg_nobody_0"}])
    assert (response.status_code, response.json()["error"]["param"]) == (404, "input.1.id")


async def test_input_items_come_in_pages(served: Served) -> None:
    first = await made(served)
    body = await made(served, input="More", previous_response_id=first["id"])
    whole = await get(served, f"{body['id']}/input_items", order="asc")
    assert [item["role"] for item in whole["data"]] == ["user", "assistant", "user"]
    assert whole["data"][0]["content"] == [{"type": "input_text", "text": "Hi"}]
    assert whole["data"][1] == first["output"][0]
    newest = await get(served, f"{body['id']}/input_items", limit=2)
    assert newest["data"] == whole["data"][:0:-1]
    assert newest["has_more"]
    rest = await get(served, f"{body['id']}/input_items", limit=2, after=newest["last_id"])
    assert (rest["data"], rest["has_more"]) == (whole["data"][:1], False)


async def test_an_item_that_is_sent_twice_is_two_items_of_its_pages(served: Served) -> None:
    say(served, "One.")
    first = await made(served)
    user = {"role": "user", "content": "x", "id": "msg_mine"}
    again = [*first["output"], {"type": "item_reference", "id": first["output"][0]["id"]}, user, user]
    body = await made(served, input=again, previous_response_id=first["id"])
    ids: list[str] = []
    for _ in range(6):
        after = {"after": ids[-1]} if ids else {}
        page = await get(served, f"{body['id']}/input_items", order="asc", limit=1, **after)
        ids.append(page["last_id"])
    assert not page["has_more"]
    assert len(set(ids)) == 6
    assert sent_prompt(served).count("One.") == 3
    await made(served, input=[{"type": "item_reference", "id": ids[-1]}])


async def test_a_deleted_response_is_gone(served: Served) -> None:
    body = await made(served)
    for status in (200, 404):
        response = await served.client.delete(f"/v1/responses/{body['id']}")
        assert response.status_code == status
    assert (await served.client.get(f"/v1/responses/{body['id']}")).status_code == 404


async def test_old_responses_and_too_many_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path, response_bytes=1024**2, response_days=1.0) as served:
        served.engine.info = msgspec.structs.replace(served.engine.info, max_model_len=2**20)  # type: ignore[type-var]
        first = await made(served)
        second = await made(served)
        monkeypatch.setattr("server.responses.store.time.time", lambda: first["created_at"] + 86401 + 5)
        assert (await served.client.get(f"/v1/responses/{second['id']}")).status_code == 404
        monkeypatch.undo()
        large = [await made(served, input="x" * 400_000) for _ in range(3)]
        statuses = [(await served.client.get(f"/v1/responses/{one['id']}")).status_code for one in (first, *large)]
        assert statuses == [404, 404, 200, 200]
        error = (await post(served, input='"' * 600_000)).json()["error"]
        assert "--response-bytes" in error["message"]


async def test_a_server_may_keep_none(tmp_path: Path) -> None:
    async with serving(tmp_path, response_days=0) as served:
        body = await made(served)
        assert body["store"] is False
        assert (await served.client.get(f"/v1/responses/{body['id']}")).status_code == 404
        for field in ("store", "background"):
            error = (await post(served, **{field: True})).json()["error"]
            assert error["param"] == field
            assert "--response-days" in error["message"]


# --- background responses --------------------------------------------------------------------------------------


async def test_a_response_is_made_in_the_background(served: Served) -> None:
    going = hold_at(served, 2)
    body = await made(served, background=True)
    assert (body["status"], body["output"], body["background"]) == ("in_progress", [], True)
    assert await get(served, body["id"]) == body
    assert (await post(served, previous_response_id=body["id"])).status_code == 400
    going.set()
    done = await ended(served, body["id"])
    assert (done["status"], done["output"][0]["content"][0]["text"]) == ("completed", TEXT)


async def test_one_in_the_background_can_be_cancelled(served: Served) -> None:
    going = hold_at(served, 4)
    body = await made(served, background=True)
    await going.until_reached()
    for _ in range(2):
        response = await served.client.post(f"/v1/responses/{body['id']}/cancel")
        cancelled = response.json()
        assert cancelled["status"] == "cancelled"
        assert TEXT.startswith(cancelled["output"][0]["content"][0]["text"])
    assert served.engine.running == set()
    assert served.services.drain.open_requests == 0
    served.engine.gate = None
    plain = await made(served)
    assert (await served.client.post(f"/v1/responses/{plain['id']}/cancel")).status_code == 400


async def test_a_stream_in_the_background_can_be_taken_up_again(served: Served) -> None:
    going = hold_at(served, 6)
    reading = asyncio.create_task(post(served, background=True, stream=True))
    await going.until_reached()
    (id_,) = served.services.responses.running
    other = asyncio.create_task(served.client.get(f"/v1/responses/{id_}?stream=true&starting_after=2"))
    await asyncio.sleep(0.05)
    going.set()
    stream = named_events(await reading)
    assert stream[-1]["type"] == "response.completed"
    assert named_events(await other) == stream[3:]
    again = await served.client.get(f"/v1/responses/{id_}?stream=true&starting_after=4")
    assert named_events(again) == stream[5:]
    plain = await made(served)
    response = await served.client.get(f"/v1/responses/{plain['id']}?stream=true")
    assert (response.status_code, response.json()["error"]["param"]) == (400, "stream")


async def test_refusals_come_before_the_background(served: Served) -> None:
    response = await post(served, background=True, model="nobody")
    assert (response.status_code, response.json()["error"]["param"]) == (404, "model")
    response = await post(served, background=True, max_output_tokens=10**6)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "max_output_tokens")


async def test_a_failure_in_the_background_is_told(served: Served) -> None:
    served.engine.fail = {2: EngineUnavailable("The engine stopped while this request was running.")}
    body = await made(served, background=True)
    done = await ended(served, body["id"])
    assert (done["status"], done["error"]["code"]) == ("failed", "server_error")
    await served.client.delete(f"/v1/responses/{body['id']}")
    assert (await served.client.get(f"/v1/responses/{body['id']}")).status_code == 404


async def test_a_restart_keeps_what_is_done_and_fails_what_is_not(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        done = await made(served)
        hold_at(served, 1)
        body = await made(served, background=True)
        await served.services.responses.stop()
    async with serving(tmp_path) as served:
        assert await get(served, done["id"]) == done
        left = await get(served, body["id"])
        assert (left["status"], left["error"]["code"]) == ("failed", "server_error")
