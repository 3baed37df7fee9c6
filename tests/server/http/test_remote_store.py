"""A server whose adapters are in an object store, from its clients' point of view, especially when that store fails."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.storage.remote import RemoteStore
from adapters.storage.store import AdapterStore
from adapters.storage.versions import DamagedAdapter, Pointer, RemoteUnavailable
from server.registry.capacity import PinLimit
from server.services import TENANT
from server.settings import SettingError, Settings
from server.startup import open_store
from tests.server.http.test_adapters import push, read
from tests.support.harness import IdleEngine, Site, base_info


class RemoteSite(Site):
    """A site whose bucket is a directory."""

    def open_store(self, root: Path) -> AdapterStore:
        assert self.settings.adapter_store is not None
        remote = RemoteStore(self.settings.adapter_store)
        return AdapterStore(root / "store", remote, remote=remote, disk_bytes=self.settings.adapter_disk_bytes)


def open_site(root: Path, name: str, **settings: Any) -> RemoteSite:
    (root / name).mkdir()
    return RemoteSite(root / name, adapter_store=f"file://{root / 'bucket'}", **settings)


@pytest.fixture
async def cold(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[RemoteSite]:
    """A site with `legal` and `poet` in the store and nothing on its disk; `poet` is fetched.

    Parameter: the number of seconds for which requests wait for the store.
    """
    seconds = getattr(request, "param", 60.0)
    with contextlib.closing(open_site(tmp_path, "first")) as site:
        for seed, name in enumerate(("legal", "poet")):
            await push(site, name, seed)
    with contextlib.closing(open_site(tmp_path, "second", adapter_store_seconds=seconds)) as site:
        await until_there(site, "poet")
        yield site


@contextlib.contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, fault: Exception, *methods: str) -> Iterator[None]:
    def fail(*_: object, **__: object) -> None:
        raise fault

    with monkeypatch.context() as patch:
        for method in methods:
            patch.setattr(RemoteStore, method, fail)
        yield


async def until_there(site: Site, name: str) -> None:
    """Send requests for the adapter until it has been fetched."""
    async with asyncio.timeout(60):
        while (await ask(site, name)).status_code != 200:  # noqa: ASYNC110 - a thread's doing
            await asyncio.sleep(0.01)


async def ask(site: Site, name: str) -> httpx.Response:
    async with site.client() as client:
        return await client.post(f"/v1/adapters/{name}/warm")


def refused(response: httpx.Response, status: int, code: str) -> httpx.Response:
    assert (response.status_code, response.json()["error"]["code"]) == (status, code), response.text
    return response


async def test_a_cold_adapter_is_fetched_when_asked_for(cold: RemoteSite) -> None:
    assert not cold.store.has(cold.store.get(TENANT, "legal"))
    assert (await ask(cold, "legal")).status_code == 200
    assert cold.store.has(cold.store.get(TENANT, "legal"))


@pytest.mark.parametrize("path", ["", "/config", "/weights"])
async def test_looking_at_one_fetches_it_too(cold: RemoteSite, path: str) -> None:
    async with cold.client() as client:
        response = await client.get(f"/v1/adapters/legal{path}")
    assert response.status_code == 200
    assert cold.store.has(cold.store.get(TENANT, "legal"))
    if path == "/weights":
        assert response.content == read(cold.store.get(TENANT, "legal").path / "adapter_model.safetensors")


async def test_a_store_that_is_down_is_a_503_for_who_needs_it(
    cold: RemoteSite, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with failing(monkeypatch, RemoteUnavailable("no route to 10.0.0.1"), "get", "put", "change"):
        response = refused(await ask(cold, "legal"), 503, "adapter_store_unavailable")
        assert int(response.headers["Retry-After"]) > 0
        assert "10.0.0.1" not in response.text
        assert "10.0.0.1" in caplog.text
        assert (await ask(cold, "poet")).status_code == 200
        refused(await push(cold, "new", 5), 503, "adapter_store_unavailable")
        async with cold.client() as client:
            refused(await client.delete("/v1/adapters/poet"), 503, "adapter_store_unavailable")
            refused(await client.post("/v1/adapters/poet/pin"), 503, "adapter_store_unavailable")
            assert [item["name"] for item in (await client.get("/v1/adapters")).json()["data"]] == ["legal", "poet"]
    assert (await ask(cold, "legal")).status_code == 200
    assert (await push(cold, "new", 5)).status_code == 201


@pytest.fixture
def released(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The store returns no file until this event is set."""
    released, get = threading.Event(), RemoteStore.get

    def slowly(self: RemoteStore, digest: str, directory: Path) -> None:
        assert released.wait(60)
        get(self, digest, directory)

    monkeypatch.setattr(RemoteStore, "get", slowly)
    return released


async def test_others_do_not_wait_for_a_store_that_is_slow(cold: RemoteSite, released: threading.Event) -> None:
    waiting = [asyncio.create_task(ask(cold, "legal")) for _ in range(50)]  # more than there are threads
    await asyncio.sleep(0.05)
    assert (await ask(cold, "poet")).status_code == 200
    assert (await push(cold, "new", 5)).status_code == 201
    assert not any(task.done() for task in waiting)
    released.set()
    assert {response.status_code for response in await asyncio.gather(*waiting)} == {200}


@pytest.mark.parametrize("cold", [0.2], indirect=True)
async def test_a_store_that_is_slow_is_a_503_in_time(cold: RemoteSite, released: threading.Event) -> None:
    for response in await asyncio.gather(*(ask(cold, "legal") for _ in range(50))):
        refused(response, 503, "adapter_store_unavailable")
    released.set()
    await until_there(cold, "legal")  # the fetch continued in the meantime


async def test_changes_waiting_for_a_slow_store_do_not_block_other_requests(
    cold: RemoteSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    released, change = threading.Event(), RemoteStore.change

    def slowly(self: RemoteStore, *args: Any) -> Pointer | None:
        assert released.wait(60)
        return change(self, *args)

    monkeypatch.setattr(RemoteStore, "change", slowly)
    async with cold.client() as client:
        waiting = [asyncio.create_task(client.delete("/v1/adapters/legal")) for _ in range(60)]
        await asyncio.sleep(0.05)
        assert (await ask(cold, "poet")).status_code == 200
        assert (await client.get("/v1/adapters/poet/weights")).status_code == 200
        released.set()
        statuses = [response.status_code for response in await asyncio.gather(*waiting)]
    assert sorted(statuses) == [200] + [404] * 59


async def test_a_damaged_object_is_a_502(cold: RemoteSite, monkeypatch: pytest.MonkeyPatch) -> None:
    with failing(monkeypatch, DamagedAdapter("bits fell out"), "get"):
        response = refused(await ask(cold, "legal"), 502, "adapter_damaged")
        assert "Retry-After" not in response.headers


async def test_pinned_files_come_by_themselves_and_stay_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.registry.pins._RETRY_SECONDS", 0.01)
    with contextlib.closing(open_site(tmp_path, "first")) as site:
        await push(site, "legal", 1)
        await push(site, "poet", 2)
        async with site.client() as client:
            assert (await client.post("/v1/adapters/legal/pin")).status_code == 200
    with contextlib.closing(open_site(tmp_path, "second", adapter_disk_bytes=0)) as site:
        version = site.store.get(TENANT, "legal")
        with failing(monkeypatch, RemoteUnavailable("down"), "get"):
            await site.registry.discovery.import_configured(TENANT)
            await asyncio.sleep(0.05)
            assert site.engine.pinned == []
        async with asyncio.timeout(60):
            while site.engine.pinned != [version.digest]:  # noqa: ASYNC110 - a thread's doing
                await asyncio.sleep(0.01)
        assert (await ask(site, "poet")).status_code == 200
        assert site.store.has(version)
        assert not site.store.has(site.store.get(TENANT, "poet"))
        async with site.client() as client:
            assert (await client.delete("/v1/adapters/legal/pin")).status_code == 200
        await push(site, "other", 3)
        assert not site.store.has(version)


@pytest.mark.parametrize("url", ["nonsense", "ftp://host/x", "file:///proc/nowhere"])
def test_a_store_that_cannot_be_is_named_at_start(url: str, tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path, adapter_store=url)
    limit = PinLimit(settings, IdleEngine(base_info()))
    with pytest.raises(SettingError, match=r"^--adapter-store: "):
        open_store(settings, limit)
