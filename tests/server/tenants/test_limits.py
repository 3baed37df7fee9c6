"""Limits of one tenant: requests and tokens per minute, concurrent sequences, device rows, storage, training."""

import asyncio
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import pytest

from server.errors import TooManyRequests
from server.messages.protocol import Generate
from server.tenants import limits
from server.tenants.limits import Allowance, Limits
from tests.support.harness import adapter_files, write_adapter
from tests.support.scripted import BASE, Served, serving
from tests.support.tenancy import furnish, key

FILES = {"file": ("a.jsonl", b'{"text": "some text to train on"}\n')}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A stopped clock for the limits."""
    now = [100.0]
    monkeypatch.setattr(limits, "time", Mock(monotonic=lambda: now[0]))
    return now


def test_a_minutes_worth_at_once_then_as_it_comes_back(clock: list[float]) -> None:
    allowance = Allowance(Limits(requests_per_minute=3, tokens_per_minute=100))
    for _ in range(3):
        allowance.check(1, 10)
        allowance.take(1, 10)
    with pytest.raises(TooManyRequests, match="3 requests per minute") as refusal:
        allowance.check(1, 10)
    assert refusal.value.headers["Retry-After"] == "20"
    clock[0] += 20
    allowance.check(1, 10)
    assert allowance.headers()["x-ratelimit-limit-requests"] == "3"
    assert allowance.headers()["x-ratelimit-remaining-requests"] == "1"
    assert allowance.headers()["x-ratelimit-reset-requests"] == "40.000s"
    assert allowance.headers()["x-ratelimit-remaining-tokens"] == "100"


def test_an_answer_is_paid_for_afterwards(clock: list[float]) -> None:
    allowance = Allowance(Limits(tokens_per_minute=60))
    allowance.check(1, 500)  # more than the limit is admitted: the tenant goes into debt
    allowance.take(1, 500)
    allowance.spend(20)
    assert allowance.headers()["x-ratelimit-remaining-tokens"] == "0"
    with pytest.raises(TooManyRequests, match="60 tokens per minute") as refusal:
        allowance.check(1, 1)
    assert refusal.value.headers["Retry-After"] == "461"
    clock[0] += 461
    allowance.check(1, 1)


async def limited(served: Served, **limits: Any) -> dict[str, str]:
    """Headers of a tenant with these limits."""
    operator, headers = await key(served), await key(served, "acme")
    response = await served.client.post("/v1/admin/tenants/acme", json={"limits": limits}, headers=operator)
    assert response.status_code == 200, response.text
    assert {name: value for name, value in response.json()["limits"].items() if value is not None} == {
        "weight": 1.0,
        **limits,
    }
    return headers


async def ask(served: Served, headers: dict[str, str], **more: Any) -> httpx.Response:
    body = {"model": BASE, "prompt": "Hi", "max_tokens": 2} | more
    return await served.client.post("/v1/completions", json=body, headers=headers)


async def test_requests_per_minute(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        acme, rival = await limited(served, requests_per_minute=2), await key(served, "rival")
        first, second, third = [await ask(served, acme) for _ in range(3)]
        assert [answer.status_code for answer in (first, second, third)] == [200, 200, 429]
        assert [answer.headers["x-ratelimit-remaining-requests"] for answer in (first, second, third)] == [
            "1",
            "0",
            "0",
        ]
        assert third.json()["error"]["code"] == "rate_limit_exceeded"
        assert 1 <= int(third.headers["Retry-After"]) <= 30
        assert "x-ratelimit-limit-tokens" not in third.headers
        assert (await served.client.get("/v1/models", headers=acme)).status_code == 200
        other = await ask(served, rival)
        assert other.status_code == 200
        assert "x-ratelimit-limit-requests" not in other.headers


async def test_tokens_per_minute_count_prompts_and_answers(tmp_path: Path, clock: list[float]) -> None:
    async with serving(tmp_path) as served:
        acme = await limited(served, tokens_per_minute=1000)
        answer = await ask(served, acme, max_tokens=4)
        used = answer.json()["usage"]["total_tokens"]
        again = await served.client.get("/v1/models", headers=acme)
        assert int(again.headers["x-ratelimit-remaining-tokens"]) == 1000 - used
        clock[0] += 0.6
        again = await served.client.get("/v1/models", headers=acme)
        assert int(again.headers["x-ratelimit-remaining-tokens"]) == min(1000, 1000 - used + 10)


async def test_sequences_under_way(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        acme = await limited(served, running=2)
        release = asyncio.Event()

        async def gate(request: Generate, step: int) -> None:
            await release.wait()

        served.engine.gate = gate
        running = asyncio.create_task(ask(served, acme, n=2))
        while len(served.engine.running) < 1:  # noqa: ASYNC110
            await asyncio.sleep(0)
        refused = await ask(served, acme)
        assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
        release.set()
        assert (await running).status_code == 200
        assert (await ask(served, acme)).status_code == 200
        allowance = served.services.tenants._allowances["acme"]
        assert allowance.running == 0
        served.engine.fail = {0: RuntimeError("the engine")}
        assert (await ask(served, acme)).status_code == 500
        assert allowance.running == 0, "released after a failure too"


async def test_device_rows(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        acme = await key(served, "acme")
        for seed, (name, rank) in enumerate((("one", 4), ("two", 4), ("large", 16))):
            directory = write_adapter(tmp_path / name, seed, rank)
            await served.services.registry.publisher.import_directory("acme", name, directory)
        await limited(served, device_rows=12)  # an fp32 adapter of rank 4 takes 8 rows of each kind
        release = asyncio.Event()

        async def gate(request: Generate, step: int) -> None:
            await release.wait()

        served.engine.gate = gate
        running = [asyncio.create_task(ask(served, acme, model="one", n=2)) for _ in range(2)]
        async with asyncio.timeout(60):
            while len(served.engine.running) < 2:  # noqa: ASYNC110
                await asyncio.sleep(0)
        assert {reference.owner for one in served.engine.requests for reference in one.adapters} == {("acme", 12)}
        refused = await ask(served, acme, model="two")
        assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
        assert "your limit is 12" in refused.json()["error"]["message"]
        assert (await served.client.post("/v1/adapters/two/warm", headers=acme)).status_code == 429
        for name, method in (("large", "warm"), ("large", "pin")):
            beyond = await served.client.post(f"/v1/adapters/{name}/{method}", headers=acme)
            assert (beyond.status_code, beyond.json()["error"]["code"]) == (403, "device_rows_exceeded")
        assert (await ask(served, acme, model="large")).status_code == 403
        release.set()
        assert [(await one).status_code for one in running] == [200, 200]
        assert (await ask(served, acme, model="two")).status_code == 200
        allowance = served.services.tenants._allowances["acme"]
        assert (allowance.running, allowance._users, allowance._rows) == (0, {}, {})
        assert (await served.client.post("/v1/adapters/one/pin", headers=acme)).status_code == 200
        assert (await ask(served, acme, model="one")).status_code == 200
        assert (await ask(served, acme, model="two")).status_code == 403, "pinned rows count against the limit"


async def test_stored_bytes(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        acme = await key(served, "acme")
        await furnish(served, tmp_path, "acme", "one", acme)
        headers = await limited(served, stored_bytes=1)
        config, weights = adapter_files(1)
        parts = {"config": ("c", config), "weights": ("w", weights)}
        for response in (
            await served.client.post("/v1/files", data={"purpose": "fine-tune"}, files=FILES, headers=headers),
            await served.client.post("/v1/adapters", data={"name": "two"}, files=parts, headers=headers),
        ):
            assert response.status_code == 403, response.text
            assert response.json()["error"]["code"] == "storage_quota_exceeded"
        assert (await served.client.delete("/v1/adapters/one", headers=headers)).status_code == 200
        generous = await limited(served, stored_bytes=10**6)
        added = await served.client.post("/v1/adapters", data={"name": "two"}, files=parts, headers=generous)
        assert added.status_code == 201


async def test_training(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        acme = await key(served, "acme")
        owned = await furnish(served, tmp_path, "acme", "one", acme)  # with an unfinished job
        headers = await limited(served, training_jobs=1)
        body = {"model": BASE, "training_file": owned.file}
        refused = await served.client.post("/v1/fine_tuning/jobs", json=body, headers=headers)
        assert (refused.status_code, refused.headers["Retry-After"]) == (429, "60")
        headers = await limited(served, training_tokens_per_day=1000)
        await asyncio.to_thread(served.services.ledger.add_training, "acme", "ft:x", "ftjob-1", 1000, 0.0)
        refused = await served.client.post("/v1/fine_tuning/jobs", json=body, headers=headers)
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["Retry-After"]) <= 86401
