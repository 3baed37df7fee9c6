"""`/v1/adapters` over HTTP: a stored upload equals its download, and refused uploads leave no files."""

import asyncio
import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import pytest
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from adapters.peft_format.outline import Outline
from adapters.storage.store import AdapterStore
from server.services import TENANT
from server.tenants.caller import OPERATOR_CALLER
from tests.support.harness import HIDDEN, Site, adapter_files
from tests.support.tiny import tiny_text

CODES = {"message", "type", "param", "code"}


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with contextlib.closing(Site(tmp_path)) as site:
        yield site


def files(config: bytes, weights: bytes) -> dict[str, tuple[str, bytes]]:
    return {"config": ("adapter_config.json", config), "weights": ("adapter_model.safetensors", weights)}


async def push(site: Site, name: str, seed: int = 0, **config: Any) -> httpx.Response:
    async with site.client() as client:
        return await client.post("/v1/adapters", data={"name": name}, files=files(*adapter_files(seed, **config)))


def kept(site: Site) -> list[str]:
    """Every file of every stored version, and any files left behind."""
    return sorted(name for _, _, names in os.walk(site.settings.data_dir / "store") for name in names)


async def refused(site: Site, response: httpx.Response, status: int, param: str | None) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == CODES
    assert (response.status_code, error["param"]) == (status, param), error
    assert kept(site) == []
    return error


async def test_an_upload_is_answered_with_a_receipt(site: Site) -> None:
    response = await push(site, "legal", rank=4)
    assert response.status_code == 201
    receipt = response.json()
    assert receipt["object"] == "adapter"
    assert receipt["name"] == "legal"
    assert receipt["rank"] == 4
    assert receipt["scaling"] == 2.0
    assert receipt["modules_matched"] == 4
    assert receipt["parameters"] == 4 * 2 * 4 * 16
    assert receipt["bytes"] == 4 * receipt["parameters"]
    assert response.headers["X-Adapter-Digest"] == receipt["digest"]
    assert receipt["digest"].startswith("sha256:")


async def test_201_when_the_current_content_changes_and_200_when_not(site: Site) -> None:
    statuses = [(await push(site, "legal", seed)).status_code for seed in (1, 1, 2, 1)]
    assert statuses == [201, 200, 201, 201]


async def test_what_was_uploaded_can_be_seen_and_downloaded(site: Site) -> None:
    config, weights = adapter_files(1)
    digest = (await push(site, "legal", 1)).json()["digest"]
    second = (await push(site, "legal", 2)).json()["digest"]
    async with site.client() as client:
        listed = (await client.get("/v1/adapters")).json()
        assert listed["object"] == "list"
        assert [(item["name"], item["digest"]) for item in listed["data"]] == [("legal", second)]
        one = (await client.get("/v1/adapters/legal")).json()
        assert set(one["versions"]) == {digest, second}

        old = f"legal@{digest.removeprefix('sha256:')[:8]}"
        assert (await client.get(f"/v1/adapters/{old}/config")).json() == json.loads(config)
        response = await client.get(f"/v1/adapters/{old}/weights", headers={"Range": "bytes=oops"})
        assert response.status_code == 200
        assert response.content == weights
        assert int(response.headers["Content-Length"]) == len(weights)
        assert response.headers["X-Adapter-Digest"] == digest
        for asked in (digest, digest.removeprefix("sha256:"), digest[:15]):
            assert (await client.get(f"/v1/adapters/legal@{asked}")).json()["digest"] == digest
        for asked in ("", "sha256:", digest[:14], "sha256:" + "0" * 64):
            response = await client.get(f"/v1/adapters/legal@{asked}")
            assert (response.status_code, response.json()["error"]["param"]) == (404, "name")


async def test_a_deleted_name_is_gone(site: Site) -> None:
    digest = (await push(site, "legal")).json()["digest"]
    async with site.client() as client:
        gone = await client.delete("/v1/adapters/legal")
        assert gone.json() == {"object": "adapter", "name": "legal", "digest": digest, "deleted": True}
        for response in (
            await client.delete("/v1/adapters/legal"),
            await client.get("/v1/adapters/legal"),
            await client.get("/v1/adapters/legal/config"),
            await client.get("/v1/adapters/legal/weights"),
        ):
            await refused(site, response, 404, "name")
    assert site.engine.forgotten == [digest]


async def test_a_download_outlives_its_name(site: Site) -> None:
    _, weights = adapter_files(0)
    await push(site, "legal")
    version = site.store.get(TENANT, "legal")
    with site.store.lease(version):
        await site.registry.delete(OPERATOR_CALLER, "legal")
        assert read(version.path / "adapter_model.safetensors") == weights
    async with asyncio.timeout(60):
        while kept(site):  # noqa: ASYNC110 - removed by a thread
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    "name",
    [
        *("", ".x", "..", "a b", "a\n", "x" * 129, "x" * 2000, "ä", "ft:x:y:z", "smollm2-135m-instruct", "a@b"),
        *("/a", "a/", "a//b", "a/../b", "a/.b", "a:", ":a", "a::b", "a/-b", "a/config", "a/merge/b", "a/pin/b", "a\\b"),
    ],
)
async def test_bad_names(site: Site, name: str) -> None:
    response = await push(site, name)
    status = 413 if len(name) > 1024 else 400
    await refused(site, response, status, "name")


@pytest.mark.parametrize("name", ["org/adapter", "support:v2", "org/team/support:v2.1", "config/a", "a:config"])
async def test_a_name_may_have_slashes_and_colons(site: Site, name: str) -> None:
    """In both forms that clients use: percent-encoded in paths, or not."""
    digest = (await push(site, name)).json()["digest"]
    async with site.client() as client:
        for path in (quote(name, safe=""), quote(name), name):
            for rest in ("", "/versions", "/config", "/weights", f"@{digest[7:19]}"):
                assert (await client.get(f"/v1/adapters/{path}{rest}")).status_code == 200, (path, rest)
            assert (await client.get(f"/v1/models/{path}")).json()["id"] == name
            assert (await client.post(f"/v1/adapters/{path}/pin")).json()["name"] == name
            assert (await client.delete(f"/v1/adapters/{path}/pin")).status_code == 200
        assert [item["name"] for item in (await client.get("/v1/adapters")).json()["data"]] == [name]
        assert (await client.delete(f"/v1/adapters/{quote(name, safe='')}")).json()["name"] == name
        assert (await client.get("/v1/adapters")).json()["data"] == []


async def test_a_name_that_is_not_text(site: Site) -> None:
    config, weights = adapter_files()
    async with site.client() as client:
        response = await client.post("/v1/adapters", files={"name": (None, b"\xff"), **files(config, weights)})
    await refused(site, response, 400, "name")


@pytest.mark.parametrize("missing", ["name", "config", "weights"])
async def test_missing_parts(site: Site, missing: str) -> None:
    config, weights = adapter_files()
    parts: dict[str, Any] = {"name": (None, "legal"), **files(config, weights)}
    del parts[missing]
    async with site.client() as client:
        await refused(site, await client.post("/v1/adapters", files=parts), 400, missing)


async def test_bad_configs_and_weights_name_the_culprit(site: Site) -> None:
    config, weights = adapter_files()
    async with site.client() as client:

        async def post(config: bytes, weights: bytes) -> httpx.Response:
            return await client.post("/v1/adapters", data={"name": "legal"}, files=files(config, weights))

        await refused(site, await post(b"not json", weights), 400, "config")
        await refused(site, await post(b'{"r": 4}', weights), 400, "peft_type")
        await refused(site, await post(adapter_files(use_qalora=True)[0], weights), 400, "use_qalora")
        await refused(site, await post(b" " * (1 << 20) + b"{}", weights), 413, "config")
        await refused(site, await post(config, weights[:-1]), 400, "weights")
        await refused(site, await post(config, b"\x80\x04\x95pickled"), 400, "weights")
    error = await refused(site, await push(site, "legal", rank=40), 400, "r")
    assert error["code"] == "adapter_too_large"


async def test_a_vocabulary_smaller_than_the_tokenizers(tmp_path: Path) -> None:
    """The tokenizer would produce token ids that the adapter does not have."""
    table = np.arange(512 * HIDDEN, dtype=np.float32).reshape(512, HIDDEN)
    (tmp_path / "model.safetensors").write_bytes(save_safetensors({"model.embed_tokens.weight": table}))
    config, weights = adapter_files()
    size = tiny_text().tokenizer.get_vocab_size()
    with contextlib.closing(Site(tmp_path)) as site:
        site.publisher._outline = Outline.read(tmp_path)
        async with site.client() as client:
            for rows, status in ((size - 1, 400), (size, 201)):
                shrunk = {f"base_model.model.{name}.weight": table[:rows] for name in ("model.embed_tokens", "lm_head")}
                both = files(config, save_safetensors(load_safetensors(weights) | shrunk))
                response = await client.post("/v1/adapters", data={"name": "legal"}, files=both)
                assert response.status_code == status, response.text
                answer = response.json()
                if status == 400:
                    assert answer["error"]["param"] == "weights"
                    assert f"{size - 1} tokens, fewer than the {size} of the tokenizer" in answer["error"]["message"]
                else:
                    assert answer["new_tokens"] == rows - 512


@pytest.mark.parametrize("size", [0, 2 << 20])
async def test_config_and_weights_swapped(site: Site, size: int) -> None:
    """However large the weights are: the limit on a config's size is not the reason for the refusal."""
    config, _ = adapter_files()
    weights = save_safetensors({"a": np.zeros(size, np.float32)})
    async with site.client() as client:
        response = await client.post("/v1/adapters", data={"name": "legal"}, files=files(weights, config))
    error = await refused(site, response, 400, "config")
    assert "config and weights are swapped" in error["message"]
    assert error["code"] == "parts_swapped"


async def test_an_upload_over_the_limit(tmp_path: Path) -> None:
    with contextlib.closing(Site(tmp_path, max_upload_bytes=2048)) as site:
        await refused(site, await push(site, "legal"), 413, "weights")


async def test_before_the_first_engine_nothing_is_received(site: Site) -> None:
    site.engine.info, site.engine.unready_reason = None, "the engine is loading the model"
    response = await push(site, "legal")
    await refused(site, response, 503, None)
    assert int(response.headers["Retry-After"]) > 0


async def test_a_full_disk_keeps_nothing_and_serving_goes_on(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/secret/path")

    with monkeypatch.context() as patch:
        patch.setattr(AdapterStore, "publish", full)
        response = await push(site, "legal")
    error = await refused(site, response, 507, None)
    assert "secret" not in error["message"]
    assert (await push(site, "legal")).status_code == 201


async def test_a_client_that_leaves_leaves_nothing(site: Site) -> None:
    """Straight ASGI, because httpx's transport never disconnects."""
    app: Any = site.client()._transport.app  # type: ignore[attr-defined]
    messages = [
        {
            "type": "http.request",
            "body": b'--x\r\nContent-Disposition: form-data; name="weights"\r\n\r\nabc',
            "more_body": True,
        },
        {"type": "http.disconnect"},
    ]
    sent: list[Any] = []

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"content-type", b"multipart/form-data; boundary=x")]
    scope = {"type": "http", "method": "POST", "path": "/v1/adapters", "headers": headers, "query_string": b""}
    await app(scope, receive, send)
    assert sent == []
    assert kept(site) == []
    assert list((site.settings.data_dir / "store").rglob("*weights*")) == []


async def test_checking_ends_with_its_client(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    checking, ended = asyncio.Event(), asyncio.Event()

    async def endless(*args: Any) -> None:
        checking.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    monkeypatch.setattr(site.publisher, "_run", endless)
    config, weights = adapter_files(1)
    request = httpx.Request(
        "POST", "http://x/v1/adapters", data={"name": "a"}, files={"config": config, "weights": weights}
    )
    bodies = [{"type": "http.request", "body": request.read(), "more_body": False}]

    async def receive() -> Any:
        if bodies:
            return bodies.pop()
        await checking.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        raise AssertionError(message)

    headers = [(b"content-type", request.headers["content-type"].encode())]
    scope = {"type": "http", "method": "POST", "path": "/v1/adapters", "headers": headers, "query_string": b""}
    await asyncio.wait_for(site.app()(scope, receive, send), 60)
    assert ended.is_set()
    assert kept(site) == []


async def test_uploads_beyond_the_limit_wait_their_turn(tmp_path: Path) -> None:
    with contextlib.closing(Site(tmp_path, max_uploads=1)) as site:
        async with site.services.uploads.slot():
            waiting = asyncio.create_task(push(site, "legal"))
            await asyncio.sleep(0.02)
            assert not waiting.done()
        assert (await waiting).status_code == 201


async def test_waiting_uploads_time_out(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.admission._SLOT_SECONDS", 0.01)
    async with contextlib.AsyncExitStack() as taken:
        for _ in range(site.settings.max_uploads):
            await taken.enter_async_context(site.services.uploads.slot())
        response = await push(site, "legal")
    assert response.status_code == 429
    assert "Retry-After" in response.headers


async def test_concurrent_uploads_of_one_name(site: Site) -> None:
    responses = await asyncio.gather(*(push(site, "legal", seed) for seed in range(5)))
    assert [response.status_code for response in responses] == [201] * 5
    current = site.store.get(TENANT, "legal")
    seed = next(s for s, r in enumerate(responses) if r.json()["digest"] == current.digest)
    assert (
        read(current.path / "adapter_config.json"),
        read(current.path / "adapter_model.safetensors"),
    ) == adapter_files(seed)


def read(path: Path) -> bytes:
    return path.read_bytes()
