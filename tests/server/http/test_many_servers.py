"""Two servers on one object store, from their clients' point of view."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from adapters.storage.bucket import Bucket
from adapters.storage.versions import RemoteUnavailable
from server.registry import following
from server.services import TENANT
from tests.server.http.test_adapters import push
from tests.server.http.test_remote_store import RemoteSite, open_site

Pair = tuple[RemoteSite, RemoteSite]


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with (
        contextlib.closing(open_site(tmp_path, "one", store_poll_seconds=0.2)) as one,
        contextlib.closing(open_site(tmp_path, "two", store_poll_seconds=0.2)) as two,
    ):
        yield one, two


async def ask(site: RemoteSite, method: str, path: str, **options: Any) -> httpx.Response:
    async with site.client() as client:
        return await client.request(method, path, **options)


async def status(site: RemoteSite, name: str) -> int:
    return (await ask(site, "POST", f"/v1/adapters/{name}/warm")).status_code


async def test_an_upload_serves_at_the_other_at_once(pair: Pair) -> None:
    one, two = pair
    await push(one, "legal", 1)
    assert await status(two, "legal") == 200


async def test_changes_at_one_server_reach_the_other_within_the_poll_interval(pair: Pair) -> None:
    one, two = pair
    polling = asyncio.create_task(two.registry.following.run())
    try:
        await push(one, "legal", 1)
        await until(lambda: two.names() == ["legal"])
        first = two.store.get(TENANT, "legal").digest
        await push(one, "legal", 2)
        await until(lambda: two.store.get(TENANT, "legal").digest != first)
        await until(lambda: two.engine.forgotten == [first])
        await ask(one, "POST", "/v1/adapters/legal/pin")
        await until(lambda: two.engine.pinned == [two.store.get(TENANT, "legal").digest])
        assert (await ask(one, "DELETE", "/v1/adapters/legal")).status_code == 200
        await until(lambda: two.names() == [])
        assert await status(two, "legal") == 404
        await until(lambda: two.engine.pinned == [])
    finally:
        polling.cancel()


async def until(condition: Any) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - a thread's doing
            await asyncio.sleep(0.01)


async def test_a_stale_etag_is_a_412_also_if_the_other_server_changed_the_name(pair: Pair) -> None:
    one, two = pair
    await push(one, "legal", 1)
    digests = [one.store.get(TENANT, "legal").digest]
    await push(one, "legal", 2)
    digests.append(one.store.get(TENANT, "legal").digest)
    etag = (await ask(two, "GET", "/v1/adapters/legal/versions")).headers["ETag"]
    assert etag == f'"{digests[1]}"'
    path, body = "/v1/adapters/legal/promote", {"digest": digests[0]}
    assert (await ask(one, "POST", path, json=body)).status_code == 200
    stale = await ask(two, "POST", path, json=body, headers={"If-Match": etag})
    assert (stale.status_code, stale.headers["ETag"]) == (412, f'"{digests[0]}"')
    fresh = await ask(two, "GET", "/v1/adapters/legal/versions")
    assert fresh.headers["ETag"] == stale.headers["ETag"]
    again = await ask(two, "POST", path, json={"digest": digests[1]}, headers={"If-Match": stale.headers["ETag"]})
    assert again.status_code == 200


async def test_a_name_can_be_changed_at_a_server_that_has_not_heard_of_it(pair: Pair) -> None:
    one, two = pair
    for method, path in (("POST", "/pin"), ("DELETE", "/pin"), ("GET", "/versions"), ("GET", ""), ("DELETE", "")):
        name = f"n{method}{path.replace('/', '-')}"
        await push(one, name, 1)
        assert (await ask(two, method, f"/v1/adapters/{name}{path}")).status_code == 200, (method, path)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Paths of the objects read."""
    paths: list[str] = []
    read = Bucket.read

    def noting(self: Bucket, path: str) -> Any:
        paths.append(path)
        return read(self, path)

    monkeypatch.setattr(Bucket, "read", noting)
    return paths


async def test_unknown_names_do_not_reach_the_store_again_and_again(pair: Pair, reads: list[str]) -> None:
    _, two = pair
    assert set(await asyncio.gather(*(status(two, "nobody") for _ in range(20)))) == {404}
    assert len(reads) == 1
    await two.registry.following.poll()
    assert await status(two, "nobody") == 404
    assert len(reads) == 2


async def test_lookups_of_many_unknown_names_are_limited_between_polls(
    pair: Pair, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = pair
    monkeypatch.setattr(following, "_MAX_LOOKUPS", 4)
    assert [await status(two, f"nobody{i}") for i in range(20)] == [404] * 20
    assert len(reads) == 4
    await push(one, "legal", 1)
    assert await status(two, "legal") == 404
    await two.registry.following.poll()
    assert await status(two, "legal") == 200


async def test_while_the_store_is_down_known_adapters_are_served(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = pair
    await push(one, "legal", 1)
    assert await status(two, "legal") == 200
    await push(one, "poet", 2)

    def fail(*_: object) -> None:
        raise RemoteUnavailable("no route")

    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "list", fail)
        patch.setattr(Bucket, "read", fail)
        unknown = await ask(two, "POST", "/v1/adapters/poet/warm")
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (503, "adapter_store_unavailable")
        for _ in range(3):
            await two.registry.following.poll()
        assert caplog.text.count("no route") == 1
        assert await status(two, "legal") == 200
        assert await status(two, "nobody") == 503
    await two.registry.following.poll()
    assert await status(two, "poet") == 200
    assert await status(two, "nobody") == 404


async def test_a_fault_of_this_disk_does_not_end_the_polling(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = pair
    await push(one, "legal", 1)
    await two.registry.following.poll()
    await ask(one, "DELETE", "/v1/adapters/legal")

    def fail(*_: object) -> None:
        raise OSError("read-only")

    with monkeypatch.context() as patch:
        patch.setattr(two.store._files, "remove_unused", fail)
        await two.registry.following.poll()
    assert two.names() == []
    await push(one, "poet", 2)
    await two.registry.following.poll()
    assert two.names() == ["poet"]


async def test_a_hanging_store_delays_only_requests_for_unknown_names(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = pair
    await push(one, "legal", 1)
    assert await status(two, "legal") == 200
    released, look = threading.Event(), Bucket.read

    def hang(self: Bucket, path: str) -> Any:
        assert released.wait(60)
        return look(self, path)

    monkeypatch.setattr(Bucket, "read", hang)
    with monkeypatch.context() as patch:
        patch.setattr(two.registry.following, "_timeout", 0.1)
        assert await status(two, "nobody") == 503
    monkeypatch.setattr(two.registry.following, "_timeout", 60)
    waiting = asyncio.create_task(status(two, "somebody"))
    assert await status(two, "legal") == 200
    assert not waiting.done()
    released.set()
    assert await waiting == 404


async def test_a_shared_adapter_is_looked_for_under_its_owners_name(pair: Pair) -> None:
    one, two = pair
    await push(one, "legal", 1)
    async with one.client() as client:
        assert (await client.post("/v1/adapters/legal/share", json={"tenants": "all"})).status_code == 200
    assert two.names() == []
    await two.registry.following.look_up("someone", "default/legal")
    assert two.store.readable_pointer("someone", "default/legal").current.name == "legal"
