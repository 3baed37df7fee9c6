"""Adapters from a hub: only from allowed repositories, completely or not at all, and in bounded time."""

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.hub import Reference, parse_allowed
from server.services import TENANT
from server.settings import SettingError, Settings
from tests.support.fake_hub import FakeHub, fake_hub
from tests.support.harness import Site, adapter_files, base_info
from tests.support.scripted import BASE, serving
from tests.support.tenancy import key


def files(seed: int, prefix: str = "") -> dict[str, bytes]:
    config, weights = adapter_files(seed)
    return {f"{prefix}adapter_config.json": config, f"{prefix}adapter_model.safetensors": weights, "README.md": b"Hi"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with fake_hub(monkeypatch) as one:
        one.put("acme/law", files(1))
        one.put("acme/many", files(2, "inner/one/"))
        one.put("other/law", files(3))
        yield one


@contextlib.contextmanager
def opened(root: Path, *allowed: str, **settings: Any) -> Iterator[Site]:
    with contextlib.closing(Site(root, adapter_hub=allowed, **settings)) as site:
        yield site


async def post(site: Site, path: str, **body: Any) -> httpx.Response:
    async with site.client() as client:
        return await client.post(path, json=body)


async def uploaded(root: Path, seed: int) -> str:
    """The digest of an uploaded adapter."""
    root.mkdir()
    with contextlib.closing(Site(root)) as site:
        config, weights = adapter_files(seed)
        sent = {"config": ("c", config), "weights": ("w", weights)}
        async with site.client() as client:
            return str((await client.post("/v1/adapters", data={"name": "x"}, files=sent)).json()["digest"])


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("hf://acme/law", Reference("acme/law")),
        ("hf://acme/law@v1.0", Reference("acme/law", "v1.0")),
        ("hf://acme/law@v1/a/b", Reference("acme/law", "v1", "a/b")),
        ("hf://acme/law/a", Reference("acme/law", None, "a")),
    ],
)
def test_references(written: str, meant: Reference) -> None:
    assert Reference.parse(written) == meant
    assert str(meant) == written


@pytest.mark.parametrize(
    "written",
    [
        *("", "hf://", "hf://acme", "acme/law", "hf://acme/law@", "hf://acme/law/", "hf://acme/law/../x", "hf://a/.."),
        *(
            "hf://acme/law@../x",
            "hf://acme/law/.git",
            "hf://acme/law?x=1",
            "hf://acme/law#x",
            "hf://a\n/b",
            "hf://a/b\n",
        ),
        *("https://acme/law", "hf://acme//law", "hf://acme/l%2Fw", f"hf://acme/{'x' * 97}", "hf://acme/\u00e4"),
    ],
)
def test_malformed_references_are_refused(written: str) -> None:
    with pytest.raises(ValueError, match="hf://OWNER/NAME"):
        Reference.parse(written)


def test_the_list_names_repositories_or_owners() -> None:
    assert Reference("acme/law").within(["acme/law"])
    assert Reference("acme/law").within(["x/y", "acme/*"])
    assert not Reference("acme/law2").within(["acme/law"])
    assert not Reference("acme2/law").within(["acme/*"])
    for written in ("*", "*/*", "acme", "acme/", "acme/law/x", "hf://acme/law", "*/law"):
        with pytest.raises(ValueError, match="neither OWNER/NAME"):
            parse_allowed(written)
        with pytest.raises(SettingError, match="--adapter-hub"):
            Settings(adapter_hub=(written,))


async def test_without_a_list_nothing_is_fetched(tmp_path: Path, hub: FakeHub) -> None:
    with opened(tmp_path, lora_dir=tmp_path) as site:
        refused = await post(site, "/v1/adapters", name="law", source="hf://acme/law")
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "hub_not_allowed")
        assert refused.json()["error"]["param"] == "source"
        refused = await post(site, "/v1/load_lora_adapter", lora_name="law", lora_path="hf://acme/law")
        assert (refused.status_code, refused.json()["error"]["param"]) == (403, "lora_path")
        assert (await post(site, "/v1/completions", model="acme/law", prompt="a")).status_code == 404
    with opened(tmp_path) as site:
        refused = await post(site, "/v1/load_lora_adapter", lora_name="law", lora_path="hf://acme/law")
        assert refused.json()["error"]["code"] == "unknown_url"
    assert hub.asked == []


async def test_a_fetched_adapter_has_the_digest_of_its_upload(tmp_path: Path, hub: FakeHub) -> None:
    with opened(tmp_path, "acme/*") as site:
        made = await post(site, "/v1/adapters", name="law", source="hf://acme/law")
        assert made.status_code == 201, made.text
        assert made.json()["digest"] == await uploaded(tmp_path / "other", 1)
        assert (await post(site, "/v1/adapters", name="law", source="hf://acme/law")).status_code == 200
        inner = await post(site, "/v1/adapters", name="inner", source="hf://acme/many/inner/one", promote=True)
        assert inner.json()["digest"] == await uploaded(tmp_path / "another", 2)
        hub.put("acme/law", files(4))
        waiting = await post(site, "/v1/adapters", name="law", source="hf://acme/law", promote=False)
        assert waiting.status_code == 201
        assert site.store.get(TENANT, "law").digest == made.json()["digest"]
        assert {version.digest for version in site.store.versions(TENANT, "law")} > {waiting.json()["digest"]}
        asked = "".join(hub.asked)
        assert "README" not in asked
        version = site.store.get(TENANT, "law").path
        assert [path.name for path in version.iterdir() if path.name.startswith(".")] == []
    assert list((tmp_path / "store" / "staging").iterdir()) == []


async def test_vllms_route_takes_references_too(tmp_path: Path, hub: FakeHub) -> None:
    commit = hub.put("acme/law", files(7), "v2")
    with opened(tmp_path, "acme/law") as site:
        body = {"lora_name": "law", "lora_path": "hf://acme/law"}
        answer = await post(site, "/v1/load_lora_adapter", **body)
        assert (answer.status_code, answer.text) == (200, "Success: LoRA adapter 'law' added successfully.")
        assert (await post(site, "/v1/load_lora_adapter", **body)).status_code == 400
        first = site.store.get(TENANT, "law").digest
        body["lora_path"] = "hf://acme/law@v2"
        assert (await post(site, "/v1/load_lora_adapter", **body, load_inplace=True)).status_code == 200
        assert site.store.get(TENANT, "law").digest != first
        assert any(f"/resolve/{commit}/" in path for path in hub.asked), "files are fetched from the resolved commit"
        on_disk = await post(site, "/v1/load_lora_adapter", lora_name="x", lora_path=str(tmp_path))
        assert (on_disk.status_code, on_disk.json()["error"]["param"]) == (404, "lora_path")
        assert (await post(site, "/v1/unload_lora_adapter", lora_name="law")).status_code == 200


@pytest.mark.parametrize(
    ("source", "status", "code"),
    [
        ("hf://acme/nothing", 400, "hub_not_found"),
        ("hf://acme/law@v9", 400, "hub_not_found"),
        ("hf://other/law", 403, "hub_not_allowed"),
        ("hf://acme/law/../../other/law", 400, "invalid_reference"),
        ("/etc/passwd", 400, "invalid_reference"),
        ("hf://acme/many", 400, None),
    ],
)
async def test_refusals_name_the_reference(
    tmp_path: Path, hub: FakeHub, source: str, status: int, code: str | None
) -> None:
    with opened(tmp_path, "acme/*") as site:
        refused = await post(site, "/v1/adapters", name="law", source=source)
        error = refused.json()["error"]
        assert (refused.status_code, error["code"]) == (status, code), error
        assert code is None or error["param"] == "source"
        assert site.names() == []
    assert "other/law" not in "".join(hub.asked)
    assert list((tmp_path / "store" / "staging").iterdir()) == []


async def test_limits_hold_for_what_is_fetched(tmp_path: Path, hub: FakeHub) -> None:
    with opened(tmp_path, "acme/*", max_upload_bytes=2048) as site:
        refused = await post(site, "/v1/adapters", name="law", source="hf://acme/law")
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "too_large")
        assert "--max-upload-bytes" in refused.json()["error"]["message"]
        assert not [path for path in hub.asked if "/resolve/" in path]
    async with serving(tmp_path, adapter_hub=("acme/*",)) as served:
        headers = await key(served, "acme", ["upload"])
        bound = await key(served, "acme", ["upload"], adapters=["mine"])
        body = {"name": "law", "source": "hf://acme/law"}
        assert (await served.client.post("/v1/adapters", json=body, headers=bound)).status_code == 404
        operator = await key(served)
        limits = {"limits": {"stored_bytes": 100}}
        changed = await served.client.post("/v1/admin/tenants/acme", json=limits, headers=operator)
        assert changed.status_code == 200
        refused = await served.client.post("/v1/adapters", json=body, headers=headers)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "storage_quota_exceeded")
        asks = await key(served, "acme", ["serve"])
        refused = await served.client.post("/v1/adapters", json=body, headers=asks)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "permission_denied")


async def test_a_hub_that_is_silent_or_down_is_a_503(tmp_path: Path, hub: FakeHub) -> None:
    hub.holding.clear()
    with opened(tmp_path, "acme/*", adapter_hub_seconds=3) as site:
        late = await post(site, "/v1/adapters", name="law", source="hf://acme/law")
        assert (late.status_code, late.json()["error"]["code"]) == (503, "hub_unavailable")
        assert "--adapter-hub-seconds" in late.json()["error"]["message"]
    hub.holding.set()
    with pytest.MonkeyPatch.context() as patch, opened(tmp_path, "acme/*") as site:
        patch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
        down = await post(site, "/v1/adapters", name="law", source="hf://acme/law")
        assert (down.status_code, down.json()["error"]["code"]) == (503, "hub_unavailable"), down.text
        assert down.headers["retry-after"]
    assert list((tmp_path / "store" / "staging").iterdir()) == []


async def test_a_repository_of_the_list_is_found_by_its_name(tmp_path: Path, hub: FakeHub) -> None:
    async with serving(tmp_path, adapter_hub=("acme/law", "other/*")) as served:
        body = {"model": "acme/law", "prompt": "Hi", "max_tokens": 2}
        answers = await asyncio.gather(*(served.client.post("/v1/completions", json=body) for _ in range(5)))
        assert {answer.status_code for answer in answers} == {200}, answers[0].text
        assert sum("/api/models/" in path for path in hub.asked) == 1, "concurrent requests share one fetch"
        assert "acme/law" in (await served.client.get("/v1/models")).text
        count = len(hub.asked)
        others = body | {"model": "other/law"}  # OWNER/* allows references only, not fetches by name
        assert (await served.client.post("/v1/completions", json=others)).status_code == 404
        assert (await served.client.delete("/v1/adapters/acme/law")).status_code == 200
        assert (await served.client.post("/v1/completions", json=body)).status_code == 404, "not fetched again"
        headers = await key(served, "rival", ["serve"])
        assert (await served.client.post("/v1/completions", json=body, headers=headers)).status_code == 404
        assert len(hub.asked) == count


async def test_a_failed_fetch_is_not_repeated_on_each_request(tmp_path: Path, hub: FakeHub) -> None:
    async with serving(tmp_path, adapter_hub=("acme/none",)) as served:
        body = {"model": "acme/none", "prompt": "Hi", "max_tokens": 2}
        for _ in range(4):
            assert (await served.client.post("/v1/completions", json=body)).status_code == 404
    assert len(hub.asked) == 1


async def test_the_command_line_takes_references(tmp_path: Path, hub: FakeHub) -> None:
    hub.put("someone/x", files(5), "v1")
    with contextlib.closing(Site(tmp_path, adapter=("law=hf://someone/x@v1",), served_model_name=BASE)) as site:
        site.engine.info = base_info()
        await site.registry.discovery.import_configured(TENANT)
        assert site.names() == ["law"]
    with (
        contextlib.closing(Site(tmp_path, adapter=("law=hf://someone/gone",))) as site,
        pytest.raises(SettingError, match="--adapter law: hf://someone/gone: the hub has no such repository"),
    ):
        await site.registry.discovery.import_configured(TENANT)
    with pytest.raises(SettingError, match="hf://OWNER/NAME"):
        Settings(adapter=("law=hf://someone",))
