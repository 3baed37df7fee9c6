"""`/v1/batches` in front of a scripted engine: what becomes of every row, whatever happens meanwhile."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.disk import StorageFull
from server.batches import runner
from server.batches.rows import Journal
from server.client.engine import EngineDied
from server.http.inside import respond
from server.messages.protocol import Generate
from tests.support.scripted import BASE, TEXT, Served, serving, unavailable
from tests.support.site import eventually

CHAT = "/v1/chat/completions"
FINAL = ("completed", "failed", "expired", "cancelled")


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(runner, "SPACE_SECONDS", 0.01)


@asynccontextmanager
async def life(directory: Path, **settings: Any) -> AsyncIterator[Served]:
    """One life of the API process, with whatever batches it finds."""
    async with serving(directory, **settings) as served:
        served.services.batches.answer = partial(respond, served.app)
        await served.services.batches.start()
        try:
            yield served
        finally:
            await served.services.batches.stop()


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with life(tmp_path) as served:
        yield served


def row(name: str, url: str = CHAT, **body: Any) -> dict[str, Any]:
    content = {"model": BASE, "messages": [{"role": "user", "content": name}], "max_tokens": 4}
    return {"custom_id": name, "method": "POST", "url": url, "body": content | body}


async def upload(served: Served, lines: list[Any], purpose: str = "batch") -> str:
    content = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    response = await served.client.post("/v1/files", files={"file": ("in.jsonl", content)}, data={"purpose": purpose})
    assert response.status_code == 200, response.text
    return str(response.json()["id"])


async def create(served: Served, lines: list[Any], **body: Any) -> dict[str, Any]:
    fields = {"input_file_id": await upload(served, lines), "endpoint": CHAT, "completion_window": "24h"}
    response = await served.client.post("/v1/batches", json=fields | body)
    assert response.status_code == 200, response.text
    made: dict[str, Any] = response.json()
    return made


async def until(served: Served, batch: dict[str, Any], *statuses: str, completed: int = 0) -> dict[str, Any]:
    async with asyncio.timeout(60):
        while True:
            now: dict[str, Any] = (await served.client.get(f"/v1/batches/{batch['id']}")).json()
            if now["status"] in (statuses or FINAL) and now["request_counts"]["completed"] >= completed:
                return now
            await asyncio.sleep(0.01)


async def lines_of(served: Served, file: str | None) -> list[dict[str, Any]]:
    if file is None:
        return []
    content = (await served.client.get(f"/v1/files/{file}/content")).content
    return [json.loads(line) for line in content.splitlines()]


async def test_answers_and_refusals_go_to_their_files(served: Served) -> None:
    rows = [row("a"), row("b", model="nobody"), row("c", temperature=9), row("d", n=2)]
    batch = await create(served, rows, metadata={"of": "mine"})
    assert (batch["object"], batch["status"], batch["metadata"]) == ("batch", "validating", {"of": "mine"})
    done = await until(served, batch)
    assert done["status"] == "completed"
    assert done["request_counts"] == {"total": 4, "completed": 2, "failed": 2}
    good = {line["custom_id"]: line["response"] for line in await lines_of(served, done["output_file_id"])}
    assert good.keys() == {"a", "d"}
    assert (good["a"]["status_code"], good["a"]["body"]["object"]) == (200, "chat.completion")
    assert TEXT.startswith(good["a"]["body"]["choices"][0]["message"]["content"])
    assert len(good["d"]["body"]["choices"]) == 2
    bad = {line["custom_id"]: line["response"] for line in await lines_of(served, done["error_file_id"])}
    assert bad["b"]["body"]["error"]["code"] == "model_not_found"
    assert (bad["c"]["status_code"], bad["c"]["body"]["error"]["param"]) == (400, "temperature")
    assert all(request.background for request in served.engine.requests)
    page = (await served.client.get("/v1/batches")).json()
    assert [one["id"] for one in page["data"]] == [batch["id"]]
    text = (await served.client.get("/metrics")).text
    assert 'batch_requests_total{outcome="completed"} 2.0' in text
    assert 'batches{status="completed"} 1.0' in text


async def test_completions_too_and_clients_are_no_background(served: Served) -> None:
    line = {"custom_id": "x", "method": "POST", "url": "/v1/completions", "body": {"model": BASE, "prompt": "hi"}}
    done = await until(served, await create(served, [line], endpoint="/v1/completions"))
    [answer] = await lines_of(served, done["output_file_id"])
    assert answer["response"]["body"]["object"] == "text_completion"
    await served.client.post("/v1/completions", json=line["body"])
    assert [request.background for request in served.engine.requests] == [True, False]


async def test_files_of_every_editor_are_read(served: Served) -> None:
    rows = ["\ufeff" + json.dumps(row("a")) + "\r", "", " \t", json.dumps(row("b")), ""]
    done = await until(served, await create(served, rows))
    assert (done["status"], done["request_counts"]["completed"]) == ("completed", 2), done


async def test_responses_too(served: Served) -> None:
    line = {"custom_id": "x", "method": "POST", "url": "/v1/responses", "body": {"model": BASE, "input": "hi"}}
    done = await until(served, await create(served, [line], endpoint="/v1/responses"))
    [answer] = await lines_of(served, done["output_file_id"])
    assert answer["response"]["body"]["object"] == "response"
    assert [request.background for request in served.engine.requests] == [True]


@pytest.mark.parametrize(
    ("bad", "code", "param"),
    [
        ("{", "invalid_json_line", None),
        ("[1]", "invalid_json_line", None),
        (row("a"), "duplicate_custom_id", "custom_id"),
        ({**row("b"), "method": "GET"}, "invalid_method", "method"),
        (row("b", url="/v1/files"), "mismatched_url", "url"),
        ({**row("b"), "body": []}, "invalid_body", "body"),
        (row("b", stream=True), "invalid_body", "body.stream"),
        ({**row("b"), "custom_id": 5}, "invalid_custom_id", "custom_id"),
        ({**row("b"), "custom_id": "\ud800"}, "invalid_json_line", None),
        (row("b", user="\ud800"), "invalid_json_line", None),
        ({**row("b"), "more": 1}, "unknown_field", "more"),
    ],
)
async def test_a_faulty_file_fails_with_its_line(served: Served, bad: Any, code: str, param: str | None) -> None:
    done = await until(served, await create(served, [row("a"), "", bad]))
    assert done["status"] == "failed"
    [fault] = done["errors"]["data"]
    assert (fault["code"], fault["param"], fault["line"]) == (code, param, 3)
    assert not served.engine.requests


async def test_files_without_rows_or_with_too_many(tmp_path: Path) -> None:
    async with life(tmp_path, batch_file_requests=2) as served:
        for rows, code in ([], "empty_file"), ([row(name) for name in "abc"], "too_many_requests"):
            lines: list[Any] = [*rows, ""]
            done = await until(served, await create(served, lines))
            assert [fault["code"] for fault in done["errors"]["data"]] == [code]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input_file_id": "file-none"}, "input_file_id"),
        ({"endpoint": "/v1/files"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
    ],
)
async def test_bodies_that_are_refused(served: Served, body: dict[str, Any], param: str) -> None:
    fields = {"input_file_id": await upload(served, [row("a")]), "endpoint": CHAT, "completion_window": "24h"}
    response = await served.client.post("/v1/batches", json=fields | body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)
    missing: httpx.Response = await served.client.get("/v1/batches/batch_none")
    assert missing.status_code == 404


async def test_cancelling_keeps_what_was_answered(served: Served) -> None:
    async def gate(request: Generate, step: int) -> None:
        if request is not served.engine.requests[0]:
            await asyncio.Event().wait()

    served.engine.gate = gate
    rows = [row(f"r{i}") for i in range(20)]
    batch = await create(served, rows)
    await until(served, batch, "in_progress", completed=1)
    response = await served.client.post(f"/v1/batches/{batch['id']}/cancel")
    assert response.json()["status"] in ("cancelling", "cancelled")
    done = await until(served, batch)
    assert (done["status"], done["request_counts"]) == ("cancelled", {"total": 20, "completed": 1, "failed": 19})
    errors = await lines_of(served, done["error_file_id"])
    assert {line["error"]["code"] for line in errors} == {"batch_cancelled"}
    assert len(await lines_of(served, done["output_file_id"])) == 1
    assert not served.engine.running
    assert (await served.client.post(f"/v1/batches/{batch['id']}/cancel")).status_code == 409


async def test_time_runs_out(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    async def gate(request: Generate, step: int) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr("server.batches.store.WINDOW_SECONDS", 1)
    served.engine.gate = gate
    done = await until(served, await create(served, [row("a"), row("b")]))
    assert (done["status"], done["output_file_id"]) == ("expired", None)
    errors = await lines_of(served, done["error_file_id"])
    assert [line["error"]["code"] for line in errors] == ["batch_expired"] * 2


async def test_a_server_that_comes_back_goes_on_and_says_nothing_twice(tmp_path: Path) -> None:
    async with life(tmp_path, batch_requests=2) as served:
        engine = served.engine

        async def gate(request: Generate, step: int) -> None:
            if len(engine.requests) > 5:
                await asyncio.Event().wait()

        engine.gate = gate
        batch = await create(served, [row(f"r{i}") for i in range(12)])
        await until(served, batch, "in_progress", completed=4)
        assert (await served.client.delete(f"/v1/files/{batch['input_file_id']}")).status_code == 200
    output = tmp_path / "batches" / batch["id"] / "output.jsonl"
    whole = output.read_bytes()
    output.write_bytes(whole + whole.splitlines()[0][:40])  # a line that a crash cut short
    async with life(tmp_path) as served:
        done = await until(served, batch)
        assert done["request_counts"] == {"total": 12, "completed": 12, "failed": 0}
        answers = await lines_of(served, done["output_file_id"])
        assert sorted(line["custom_id"] for line in answers) == sorted(f"r{i}" for i in range(12))
        assert len(served.engine.requests) == 12 - len(whole.splitlines())
        await eventually(lambda: not list((tmp_path / "batches").iterdir()))  # nothing is left behind


async def test_an_engine_that_is_away_or_a_full_queue_only_delays(served: Served) -> None:
    served.engine.fail = {0: unavailable()}
    batch = await create(served, [row("a")])
    await eventually(lambda: len(served.engine.requests) >= 3)
    served.engine.fail = {}
    assert (await until(served, batch))["request_counts"]["completed"] == 1


async def test_a_row_that_kills_engines_is_not_sent_a_third_time(served: Served) -> None:
    async def gate(request: Generate, step: int) -> None:
        if "poison" in served.services.text.decode(request.prompt, skip_special_tokens=False):
            raise EngineDied("The engine died.")

    served.engine.gate = gate
    done = await until(served, await create(served, [row("poison"), row("b"), row("c")]))
    assert done["request_counts"] == {"total": 3, "completed": 2, "failed": 1}
    [line] = await lines_of(served, done["error_file_id"])
    assert (line["custom_id"], line["response"]["status_code"]) == ("poison", 503)
    assert len(served.engine.requests) == 4


async def test_the_background_takes_no_place_in_the_queue(tmp_path: Path) -> None:
    async def gate(request: Generate, step: int) -> None:
        if request.background:
            await asyncio.Event().wait()

    async with life(tmp_path, max_queued_requests=1) as served:
        served.engine.gate = gate
        await create(served, [row(f"r{i}") for i in range(3)])
        await eventually(lambda: len(served.engine.running) == 3)
        assert (await served.client.post(CHAT, json=row("live")["body"])).status_code == 200


async def test_a_full_disk_only_delays(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    real, left = Journal._append, [2]

    def full(self: Journal, path: Path, text: bytes) -> None:
        if left[0]:
            left[0] -= 1
            raise StorageFull(28, "full")
        real(self, path, text)

    monkeypatch.setattr(Journal, "_append", full)
    done = await until(served, await create(served, [row("a"), row("b"), row("c")]))
    assert done["request_counts"] == {"total": 3, "completed": 3, "failed": 0}


async def test_embeddings_are_refused_with_the_reason(served: Served) -> None:
    response = await served.client.post("/v1/embeddings", json={"model": BASE, "input": "hi"})
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "embeddings_unsupported"
    assert "1_Pooling" in response.json()["error"]["message"]
    assert (await served.client.post("/v1/embeddings", json={"model": "nobody", "input": "hi"})).status_code == 404
