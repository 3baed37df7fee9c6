"""Versions of a name over HTTP: promotion, rollback, splits, and the version that serves a request."""

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.logs import FIELDS
from server.services import TENANT
from tests.support.harness import adapter_files
from tests.support.scripted import BASE, Served, serving

CODES = {"message", "type", "param", "code"}


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path) as served:
        yield served


async def upload(served: Served, seed: int, **fields: str) -> httpx.Response:
    config, weights = adapter_files(seed)
    files = {"config": ("c", config), "weights": ("w", weights)}
    return await served.client.post("/v1/adapters", data={"name": "poet", **fields}, files=files)


async def digests(served: Served, count: int) -> list[str]:
    """Upload this many versions of `poet` and return their digests, oldest first."""
    return [(await upload(served, seed)).json()["digest"] for seed in range(count)]


async def change(served: Served, what: str, body: Any = None, **headers: str) -> httpx.Response:
    return await served.client.post(f"/v1/adapters/poet/{what}", json=body, headers=headers)


async def answered_by(served: Served, **body: Any) -> str:
    question = {"model": "poet", "prompt": "Hi", "max_tokens": 1} | body
    response = await served.client.post("/v1/completions", json=question)
    assert response.status_code == 200, response.text
    digest: str = response.headers["x-adapter-digest"]
    return digest


def refused(response: httpx.Response, status: int, param: str | None) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == CODES
    assert (response.status_code, error["param"]) == (status, param), error
    return error


async def test_a_promotion_and_a_rollback_change_who_answers(served: Served) -> None:
    old, new = await digests(served, 2)
    assert await answered_by(served) == new
    response = await change(served, "promote", {"digest": old})
    assert response.status_code == 200
    assert response.headers["etag"] == f'"{old}"'
    assert [(v["digest"], v["current"], v["share"]) for v in response.json()["data"]] == [
        (old, True, 1.0),
        (new, False, 0.0),
    ]
    assert await answered_by(served) == old
    assert (await change(served, "rollback")).status_code == 200
    assert await answered_by(served) == new


async def test_a_version_can_wait_until_it_is_promoted(served: Served) -> None:
    (old,) = await digests(served, 1)
    response = await upload(served, 7, promote="false")
    assert response.status_code == 201
    new = response.json()["digest"]
    assert await answered_by(served) == old
    assert await answered_by(served, model=f"poet@{new}") == new
    refused(await change(served, "rollback"), 409, "name")
    await change(served, "promote", {"digest": new.removeprefix("sha256:")[:8]})
    assert await answered_by(served) == new
    assert (await upload(served, 7, promote="false")).status_code == 200
    refused(await upload(served, 8, promote="maybe"), 400, "promote")


async def test_a_split_is_sticky_per_user_and_ends_with_a_rollback(served: Served) -> None:
    old, new = await digests(served, 2)
    response = await change(served, "promote", {"split": {old: 0.5, new: 0.5}})
    assert response.json()["split"] == {old: 0.5, new: 0.5}
    seen = {user: await answered_by(served, user=user) for user in map(str, range(12))}
    assert set(seen.values()) == {old, new}
    assert seen == {user: await answered_by(served, user=user) for user in seen}
    body = {"model": BASE, "adapter_id": "poet", "messages": [{"role": "user", "content": "Hi"}], "user": "3"}
    chat = await served.client.post("/v1/chat/completions", json=body)
    assert chat.headers["x-adapter-digest"] == seen["3"]
    one = await served.client.get("/v1/adapters/poet")
    assert (one.json()["split"], one.headers["etag"]) == ({old: 0.5, new: 0.5}, response.headers["etag"])
    assert (await change(served, "rollback")).json()["split"] is None
    assert await answered_by(served) == new


async def test_a_change_can_insist_on_what_it_replaces(served: Served) -> None:
    old, new = await digests(served, 2)
    etag = (await served.client.get("/v1/adapters/poet/versions")).headers["etag"]
    assert etag == f'"{new}"'
    answers = await asyncio.gather(
        *(change(served, "promote", {"digest": old}, **{"If-Match": etag}) for _ in range(4)),
        *(change(served, "promote", {"split": {old: 0.5, new: 0.5}}, **{"If-Match": etag}) for _ in range(4)),
    )
    statuses = sorted(response.status_code for response in answers)
    assert statuses == [200] + [412] * 7  # one of them changed the pointer
    error = refused(next(r for r in answers if r.status_code == 412), 412, "If-Match")
    assert error["code"] == "precondition_failed"
    now = (await served.client.get("/v1/adapters/poet")).headers["etag"]
    assert all(response.headers["etag"] == now for response in answers)
    assert (await change(served, "rollback", **{"If-Match": f'"x", {now}'})).status_code == 200
    assert (await change(served, "promote", {"digest": new}, **{"If-Match": "*"})).status_code == 200


async def test_a_request_keeps_the_version_it_began_with(served: Served) -> None:
    old, new = await digests(served, 2)
    begun = asyncio.Event()
    changed = asyncio.Event()

    async def gate(request: Any, step: int) -> None:
        begun.set()
        await changed.wait()

    served.engine.gate = gate
    running = asyncio.create_task(answered_by(served, max_tokens=5))
    await begun.wait()
    await change(served, "promote", {"digest": old})
    served.engine.gate = None
    changed.set()
    assert await running == new
    assert await answered_by(served) == old
    assert served.engine.forgotten[-1] == new


async def test_the_engine_keeps_what_still_has_a_share(served: Served) -> None:
    old, new = await digests(served, 2)
    served.engine.forgotten.clear()
    await change(served, "promote", {"split": {old: 0.5, new: 0.5}})
    await change(served, "promote", {"split": {old: 0.1, new: 0.9}})
    assert served.engine.forgotten == []
    await change(served, "promote", {"digest": new})
    await asyncio.sleep(0)
    assert served.engine.forgotten == [old]


async def test_every_change_is_an_audit_line(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "server.audit"):
        old, new = await digests(served, 2)
        await upload(served, 1)  # no change of the pointer
        await upload(served, 2, promote="false")
        await change(served, "promote", {"digest": old})
        await change(served, "promote", {"digest": old})  # no change of the pointer
        await change(served, "promote", {"split": {old: 0.5, new: 0.5}})
        await change(served, "rollback")
        await served.client.delete("/v1/adapters/poet")
    fields = [getattr(record, FIELDS) for record in caplog.records if record.name == "server.audit"]
    actions = ["upload", "upload", "stage", "promote", "split", "rollback", "delete"]
    assert [field["action"] for field in fields] == actions
    assert fields[3] == {"action": "promote", "adapter": "poet", "before": {new: 1.0}, "after": old, "split": None}


DIGEST = "sha256:" + "0" * 64
REFUSED: dict[str, tuple[str, Any, int, str]] = {
    "nothing": ("promote", {}, 400, "digest"),
    "both": ("promote", {"digest": DIGEST, "split": {DIGEST: 1}}, 400, "digest"),
    "unknown field": ("promote", {"digest": DIGEST, "force": True}, 400, "force"),
    "unknown digest": ("promote", {"digest": DIGEST}, 404, "digest"),
    "short digest": ("promote", {"digest": "sha256:0"}, 404, "digest"),
    "digest of a wrong type": ("promote", {"digest": 5}, 400, "digest"),
    "long digest": ("promote", {"digest": "0" * 10**6}, 404, "digest"),
    "empty split": ("promote", {"split": {}}, 400, "split"),
    "split that is a list": ("promote", {"split": [DIGEST]}, 400, "split"),
    "share that is text": ("promote", {"split": {DIGEST: "1"}}, 400, f"split.{DIGEST}"),
    "shares of less than 1": ("promote", {"split": {DIGEST: 0.4}}, 400, "split"),
    "a negative share": ("promote", {"split": {DIGEST: -1.0, "x": 2.0}}, 400, "split"),
    "a thousand shares": ("promote", {"split": {f"{i:064x}": 0.001 for i in range(1000)}}, 400, "split"),
    "unknown digest in a split": ("promote", {"split": {DIGEST: 1.0}}, 404, "split"),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_refusals_name_the_field_and_change_nothing(served: Served, name: str) -> None:
    await digests(served, 1)
    before = served.services.store.pointer(TENANT, "poet")
    what, body, status, param = REFUSED[name]
    refused(await change(served, what, body), status, param)
    assert served.services.store.pointer(TENANT, "poet") == before


async def test_names_that_nobody_has(served: Served) -> None:
    (digest,) = await digests(served, 1)
    for name in ("nobody", f"poet@{digest}", "x" * 3000, "%00"):
        refused(await served.client.get(f"/v1/adapters/{name}/versions"), 404, "name")
        refused(await served.client.post(f"/v1/adapters/{name}/rollback"), 404, "name")
        response = await served.client.post(f"/v1/adapters/{name}/promote", json={"digest": digest})
        refused(response, 404, "name")


# --- several adapters at once --------------------------------------------------------------------------


async def test_several_adapters_reach_the_engine_in_normal_form(served: Served, tmp_path: Path) -> None:
    one, two = [await served.add_adapter(tmp_path, name, seed) for seed, name in enumerate(("one", "two"))]
    weights = {one: 0.25, two: -2.0}
    chosen = [{"id": "one", "weight": 0.25}, {"id": f"two@{two}", "weight": -2}]
    seen = {await answered_by(served, model=BASE, adapters=pair) for pair in (chosen, chosen[::-1])}
    assert seen == {"+".join(f"{digest}*{weights[digest]!r}" for digest in sorted(weights))}
    for request in served.engine.requests:
        assert [(ref.digest, ref.weight) for ref in request.adapters] == sorted(weights.items())
    metrics = (await served.client.get("/metrics")).text
    for name in ("one", "two"):
        assert f'lora_requests_total{{adapter_name="{name}"}} 2.0' in metrics


async def test_an_adapter_of_weight_zero_is_ignored(served: Served, tmp_path: Path) -> None:
    digest = await served.add_adapter(tmp_path, "one", 1)
    await served.add_adapter(tmp_path, "two", 2)
    assert (
        await answered_by(served, model=BASE, adapters=[{"id": "one"}, {"id": "two", "weight": 0}]) == f"{digest}*1.0"
    )
    assert served.engine.requests[-1].adapters[0].weight == 1.0
    base = await answered_by(served, model=BASE, adapters=[{"id": "one", "weight": 0.0}])
    assert base == await answered_by(served, model=BASE)


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"adapters": [{"id": "one"}], "adapter_id": "one"}, 400, "adapters"),
        ({"adapters": [{"id": "one"}], "model": "one"}, 400, "adapters"),
        ({"adapters": [{"id": "one"}], "model": "nobody"}, 404, "model"),
        ({"adapters": [{"id": "one"}, {"id": "nobody"}]}, 404, "adapters.1.id"),
        ({"adapters": [{"id": "one"}, {"id": "same"}]}, 400, "adapters.1.id"),
        ({"adapters": [{"id": "one", "weight": 101}]}, 400, "adapters.0.weight"),
        ({"adapters": [{"id": "one", "weight": "1"}]}, 400, "adapters.0.weight"),
        ({"adapters": [{"weight": 1}]}, 400, "adapters.0.id"),
        ({"adapters": [{"id": ""}]}, 400, "adapters.0.id"),
        ({"adapters": [{"id": "one@12"}]}, 400, "adapters.0.id"),
        ({"adapters": {"id": "one"}}, 400, "adapters"),
        ({"adapters": [{"id": "one"}] * 1000}, 400, "adapters"),
        ({"adapters": [{"id": "one"}, {"id": "large"}]}, 400, "adapters"),
    ],
)
async def test_several_adapters_that_cannot_be(
    served: Served, tmp_path: Path, body: dict[str, Any], status: int, param: str
) -> None:
    await served.add_adapter(tmp_path, "one")
    await served.add_adapter(tmp_path / "again", "same")
    config, weights = adapter_files(3, rank=30)  # in fp32 it fits the pool's 64 rows only alone
    files = {"config": ("c", config), "weights": ("w", weights)}
    assert (await served.client.post("/v1/adapters", data={"name": "large"}, files=files)).status_code == 201
    question = {"model": BASE, "prompt": "Hi", "max_tokens": 1} | body
    refused(await served.client.post("/v1/completions", json=question), status, param)
    assert served.engine.requests == []
