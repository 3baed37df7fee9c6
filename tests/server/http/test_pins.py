"""Pinned adapters over HTTP: digests sent to the engine, the limit, and pins after a restart."""

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock, Mock

import httpx
import pytest

from server.registry import pins
from server.services import TENANT
from tests.server.http.test_adapters import push
from tests.support.harness import Site, base_info


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with contextlib.closing(Site(tmp_path)) as site:
        yield site


async def pin(site: Site, name: str) -> httpx.Response:
    async with site.client() as client:
        return await client.post(f"/v1/adapters/{name}/pin")


async def unpin(site: Site, name: str) -> httpx.Response:
    async with site.client() as client:
        return await client.delete(f"/v1/adapters/{name}/pin")


async def details(site: Site, name: str) -> dict[str, Any]:
    async with site.client() as client:
        body: dict[str, Any] = (await client.get(f"/v1/adapters/{name}")).json()
        return body


async def metrics(site: Site) -> dict[str, float]:
    async with site.client() as client:
        text = (await client.get("/metrics")).text
    samples = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in samples if "pinned" in name}


async def test_a_pin_is_told_to_the_engine_and_shown(site: Site) -> None:
    digest = (await push(site, "legal")).json()["digest"]
    await push(site, "other", 1)
    response = await pin(site, "legal")
    assert response.status_code == 200
    size = (await details(site, "legal"))["bytes_on_device"]
    assert response.json() == {
        "object": "adapter.pin",
        "name": "legal",
        "pinned": True,
        "digests": [digest],
        "bytes_on_device": size,
    }
    assert site.engine.pinned == [digest]
    assert (await details(site, "legal"))["pinned"] is True
    async with site.client() as client:
        listed = (await client.get("/v1/adapters")).json()["data"]
    assert {item["name"]: item["pinned"] for item in listed} == {"legal": True, "other": False}
    shown = await metrics(site)
    assert shown["lorakeet:num_pinned_lora_adapters"] == 1
    assert shown["lorakeet:pinned_lora_adapter_bytes"] == size

    assert (await pin(site, "legal")).json()["pinned"] is True
    assert (await unpin(site, "legal")).json()["pinned"] is False
    assert site.engine.pinned == []
    assert (await details(site, "legal"))["pinned"] is False
    assert (await metrics(site))["lorakeet:num_pinned_lora_adapters"] == 0


async def test_a_pin_follows_the_names_pointer(site: Site) -> None:
    old = (await push(site, "legal", 1)).json()["digest"]
    await pin(site, "legal")
    new = (await push(site, "legal", 2)).json()["digest"]
    assert site.engine.pinned == [new]
    await asyncio.sleep(0)
    assert site.engine.forgotten == [old]
    async with site.client() as client:
        split = {old: 0.5, new: 0.5}
        assert (await client.post("/v1/adapters/legal/promote", json={"split": split})).status_code == 200
        assert set(site.engine.pinned) == {old, new}
        assert (await client.post("/v1/adapters/legal/rollback")).status_code == 200
        assert site.engine.pinned == [new]
        assert (await client.delete("/v1/adapters/legal")).status_code == 200
    assert site.engine.pinned == []
    await push(site, "legal", 1)
    assert (await details(site, "legal"))["pinned"] is False


async def test_one_content_of_two_pinned_names_is_pinned_once(site: Site) -> None:
    for name in ("a", "b"):
        digest = (await push(site, name)).json()["digest"]
        await pin(site, name)
    assert site.engine.pinned == [digest]
    await unpin(site, "a")
    assert site.engine.pinned == [digest]


async def test_pins_survive_a_restart(tmp_path: Path) -> None:
    with contextlib.closing(Site(tmp_path)) as site:
        digest = (await push(site, "legal")).json()["digest"]
        await pin(site, "legal")
    with contextlib.closing(Site(tmp_path)) as site:
        await site.registry.discovery.import_configured(TENANT)
        assert site.engine.pinned == [digest]
        assert (await details(site, "legal"))["pinned"] is True


async def test_the_limit_refuses_and_changes_nothing(tmp_path: Path) -> None:
    with contextlib.closing(Site(tmp_path)) as site:  # the limit is half of 64 rows of each kind
        for i in range(5):
            await push(site, f"n{i}", i)
        for i in range(4):
            assert (await pin(site, f"n{i}")).status_code == 200
        before = site.engine.pinned
        response = await pin(site, "n4")
        error = response.json()["error"]
        assert (response.status_code, error["param"], error["code"]) == (409, "name", "pin_limit")
        assert "40 rows" in error["message"]
        assert "32 (--adapter-pinned-bytes)" in error["message"]
        larger = await push(site, "n0", 9, rank=8)
        assert (larger.status_code, larger.json()["error"]["code"]) == (409, "pin_limit")
        assert site.engine.pinned == before
        assert (await details(site, "n4"))["pinned"] is False
        await unpin(site, "n1")
        assert (await push(site, "n0", 9, rank=8)).status_code == 201


async def test_the_limit_in_bytes(tmp_path: Path) -> None:
    total = sum(2 * 64 * (linear.in_features + linear.out_features) for linear in base_info().linears.values())
    with contextlib.closing(Site(tmp_path, adapter_pinned_bytes=total // 8)) as site:
        await push(site, "small")
        await push(site, "large", rank=8)
        assert (await pin(site, "small")).status_code == 200
        assert (await pin(site, "large")).status_code == 409
    with contextlib.closing(Site(tmp_path, adapter_pinned_bytes=0)) as site:
        await site.registry.discovery.import_configured(TENANT)
        assert site.engine.pinned == [], "a limit lowered between runs applies"


async def test_a_name_that_nobody_has(site: Site) -> None:
    for response in (await pin(site, "nobody"), await unpin(site, "nobody"), await pin(site, "nobody@" + "0" * 12)):
        error = response.json()["error"]
        assert (response.status_code, error["param"], error["code"]) == (404, "name", "adapter_not_found")


async def test_pins_at_the_same_time_do_not_pass_the_limit_together(site: Site) -> None:
    for i in range(8):
        await push(site, f"n{i}", i)
    answers = await asyncio.gather(*(pin(site, f"n{i}") for i in range(8)))
    assert sorted(answer.status_code for answer in answers) == [200] * 4 + [409] * 4
    assert len(site.engine.pinned) == 4


async def test_fetching_what_is_pinned_goes_on_after_any_fault(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    made = site.publisher.pins
    fetch, version = AsyncMock(side_effect=[RuntimeError("nobody thought of it"), None]), Mock(digest="sha256:1")
    monkeypatch.setattr(pins, "_RETRY_SECONDS", 0)
    monkeypatch.setattr(made, "_fetch_files", fetch)
    monkeypatch.setitem(made._leases, version.digest, contextlib.ExitStack())
    monkeypatch.setattr(made, "renew", Mock())
    await asyncio.wait_for(made._fetch(version), 60)
    assert fetch.await_count == 2
