"""`/v1/models`, the probes, the metrics page, and vLLM's load and unload."""

import contextlib
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import httpx
import pytest

from server.services import TENANT
from tests.support.harness import BASE_DIGEST, Site, write_adapter

BASE = "smollm2-135m-instruct"


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with contextlib.closing(Site(tmp_path)) as site:
        yield site


async def add(site: Site, name: str, seed: int = 0) -> str:
    source = write_adapter(site.settings.data_dir / f"source-{name}", seed)
    version, _ = await site.publisher.import_directory(TENANT, name, source)
    return version.digest


async def test_the_base_and_its_adapters_are_models(site: Site) -> None:
    digest = await add(site, "legal")
    async with site.client() as client:
        base, adapter = (await client.get("/v1/models")).json()["data"]
        assert base["id"] == base["root"] == BASE
        assert base["parent"] is None
        assert adapter["id"] == "legal"
        assert adapter["root"] == digest
        assert adapter["parent"] == BASE
        assert adapter["object"] == "model"
        assert adapter["max_model_len"] == base["max_model_len"] == 256
        stops = {
            "stop_tokens": [{"id": 2, "token": "<|im_end|>", "named_by": ["chat template"]}],
            "tool_format": "hermes",
            "reasoning_format": None,
        }
        assert (await client.get("/v1/models/legal")).json() == adapter | stops
        assert (await client.get(f"/v1/models/{BASE}")).json() == base | stops


async def test_models_are_anthropics_too_and_paged_by_its_names(site: Site) -> None:
    await add(site, "a")
    await add(site, "b", 1)
    async with site.client() as client:
        base, a, b = (await client.get("/v1/models")).json()["data"]
        for card in (base, a, b):
            assert (card["type"], card["display_name"]) == ("model", card["id"])
            assert datetime.fromisoformat(card["created_at"]).timestamp() == card["created"]
            assert card["max_input_tokens"] == card["max_tokens"] == card["max_model_len"]
        for query, cards, more in (
            ({"limit": "1"}, [base], True),
            ({"limit": "1", "after_id": BASE}, [a], True),
            ({"limit": "1", "after_id": "a"}, [b], False),
            ({"after_id": "b"}, [], False),
            ({"before_id": "b"}, [base, a], False),
            ({"limit": "1", "before_id": "b"}, [a], True),
            ({"before_id": BASE}, [], False),
        ):
            page = (await client.get("/v1/models", params=query)).json()
            assert (page["data"], page["has_more"]) == (cards, more), query
        for name in ("after", "after_id", "before_id"):
            refused = await client.get("/v1/models", params={name: "nobody"})
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, name)


async def test_a_version_is_a_model_too(site: Site) -> None:
    digest = await add(site, "legal")
    current = await site.publisher.import_directory(TENANT, "legal", write_adapter(site.settings.data_dir / "new", 1))
    async with site.client() as client:
        for asked in (f"legal@{digest[7:15]}", f"legal@{digest}"):
            card = (await client.get(f"/v1/models/{asked}")).json()
            assert (card["id"], card["root"]) == (asked, digest)
        assert (await client.get("/v1/models/legal")).json()["root"] == current[0].digest
        assert (await client.get("/v1/models/legal@00000000")).json()["error"]["code"] == "model_not_found"
        assert (await client.get("/v1/models/legal@123")).status_code == 400


async def test_a_base_with_a_slash_in_its_name(tmp_path: Path) -> None:
    with contextlib.closing(Site(tmp_path, served_model_name="org/base")) as site:
        async with site.client() as client:
            assert (await client.get("/v1/models/org/base")).json()["id"] == "org/base"


async def test_adapters_can_be_deleted_as_models_and_the_base_cannot(site: Site) -> None:
    await add(site, "legal")
    async with site.client() as client:
        assert (await client.delete("/v1/models/legal")).json() == {"id": "legal", "object": "model", "deleted": True}
        for method in ("GET", "DELETE"):
            unknown = await client.request(method, "/v1/models/legal")
            assert unknown.status_code == 404
            assert unknown.json()["error"]["code"] == "model_not_found"
            assert unknown.json()["error"]["message"] == "The model `legal` does not exist."
        assert (await client.delete(f"/v1/models/{BASE}")).status_code == 403


async def test_models_in_the_adapter_directory_are_found(tmp_path: Path) -> None:
    with contextlib.closing(Site(tmp_path, adapter_dir=tmp_path / "adapters")) as site:
        write_adapter(tmp_path / "adapters" / "late")
        async with site.client() as client:
            assert (await client.get("/v1/models/late")).json()["id"] == "late"


# --- probes ------------------------------------------------------------------------------------------


async def test_ready_means_that_a_request_would_be_served(site: Site) -> None:
    async with site.client() as client:
        response = await client.get("/ready")
        assert response.status_code == 200
        assert response.json() == {
            "status": "ready",
            "engine_pid": 4242,
            "base_digest": BASE_DIGEST,
            "stop_tokens": [{"id": 2, "token": "<|im_end|>", "named_by": ["chat template"]}],
            "int8_drift": None,
            "kv_cache": None,
        }

        site.engine.unready_reason, site.engine.pid = "the engine is being restarted", None
        response = await client.get("/ready")
        assert response.status_code == 503
        assert response.headers["Retry-After"]
        assert response.json()["engine_pid"] is None
        assert response.json()["error"]["message"] == "the engine is being restarted"
        assert (await client.get("/health")).status_code == 200


async def test_not_ready_while_draining_or_importing(site: Site) -> None:
    async with site.client() as client:
        site.registry.discovery.pending = True
        assert (await client.get("/ready")).status_code == 503
        site.registry.discovery.pending = False
        assert (await client.get("/ready")).status_code == 200
        site.drain.begin()
        assert (await client.get("/ready")).status_code == 503
        assert (await client.get("/health")).status_code == 200


async def test_version(site: Site) -> None:
    async with site.client() as client:
        assert set((await client.get("/version")).json()) == {"version"}


async def test_the_metrics_page(site: Site) -> None:
    async with site.client() as client:
        page = await client.get("/metrics")
        assert page.headers["content-type"].startswith("text/plain; version=")
        assert "lorakeet:engine_up 1.0" in page.text
        assert "lorakeet:num_requests_running 0.0" in page.text
        site.engine.pid = None
        assert "lorakeet:engine_up 0.0" in (await client.get("/metrics")).text


async def test_every_prometheus_gets_the_names_that_are_documented(site: Site) -> None:
    asked = [  # by Prometheus 2.42, 2.53 and 3.5
        "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,"
        "text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
        "application/openmetrics-text;version=1.0.0;q=0.5,application/openmetrics-text;version=0.0.1;q=0.4,"
        "text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
        "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,"
        "application/openmetrics-text;version=0.0.1;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.4,"
        "text/plain;version=0.0.4;q=0.3,*/*;q=0.2",
    ]
    async with site.client() as client:
        for accept in asked:
            page = await client.get("/metrics", headers={"Accept": accept})
            assert page.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
            samples = {line.split("{")[0].split(" ")[0] for line in page.text.splitlines() if line[0] != "#"}
            assert "lorakeet:engine_up" in samples
            assert not [name for name in samples if name.startswith("lorakeet_")]
            assert "# TYPE lorakeet:engine_up gauge" in page.text


async def test_junk_names_make_no_series(site: Site) -> None:
    async with site.client() as client:
        before = (await client.get("/metrics")).text.count("\n")
        for i in range(50):
            await client.get(f"/v1/models/junk{i}")
            await client.get(f"/junk{i}")
        assert (await client.get("/metrics")).text.count("\n") == before


# --- vLLM's endpoints ------------------------------------------------------------------------------------


@pytest.fixture
def lora_site(tmp_path: Path) -> Iterator[Site]:
    (tmp_path / "data").mkdir()
    (tmp_path / "loras").mkdir()
    with contextlib.closing(Site(tmp_path / "data", lora_dir=tmp_path / "loras")) as site:
        yield site


async def load(site: Site, **body: object) -> httpx.Response:
    async with site.client() as client:
        return await client.post("/v1/load_lora_adapter", json=body)


async def unload(site: Site, **body: object) -> httpx.Response:
    async with site.client() as client:
        return await client.post("/v1/unload_lora_adapter", json=body)


async def test_off_by_default(site: Site) -> None:
    for response in (await load(site, lora_name="a", lora_path="a"), await unload(site, lora_name="a")):
        assert response.status_code == 404
        assert response.json()["error"]["code"] == "unknown_url"


async def test_load_and_unload_as_vllm_does(lora_site: Site, tmp_path: Path) -> None:
    path = write_adapter(tmp_path / "loras" / "one")
    loaded = await load(lora_site, lora_name="a", lora_path=str(path))
    assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'a' added successfully.")
    again = await load(lora_site, lora_name="a", lora_path="one")
    assert again.status_code == 400
    assert again.json()["error"]["type"] == "InvalidUserInput"
    of_gateways = {"base_model_name": "meta-llama/Llama-3.1-8B-Instruct", "is_3d_lora_weight": False}
    again = await load(lora_site, lora_name="a", lora_path="one", load_inplace=True, **of_gateways)
    assert again.status_code == 200, again.text
    assert lora_site.names() == ["a"]

    gone = await unload(lora_site, lora_name="a", lora_int_id=1)
    assert (gone.status_code, gone.text) == (200, "Success: LoRA adapter 'a' removed successfully.")
    missing = await unload(lora_site, lora_name="a")
    assert (missing.status_code, missing.json()["error"]["type"]) == (404, "NotFoundError")


@pytest.mark.parametrize("body", [{}, {"lora_name": "a"}, {"lora_path": "one"}, {"lora_name": "a", "lora_path": 3}])
async def test_incomplete_bodies(lora_site: Site, body: dict[str, object]) -> None:
    assert (await load(lora_site, **body)).status_code == 400
    assert (await unload(lora_site)).status_code == 400


async def test_only_under_the_directory(lora_site: Site, tmp_path: Path) -> None:
    outside = write_adapter(tmp_path / "outside")
    root = tmp_path / "loras"
    (root / "link").symlink_to(outside)
    (root / "files").mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (root / "files" / name).symlink_to(outside / name)
    write_adapter(root / "template")
    (outside / "chat_template.jinja").write_text("secret")
    (root / "template" / "chat_template.jinja").symlink_to(outside / "chat_template.jinja")
    (root / "loop").symlink_to(root / "loop")
    paths = [
        str(outside),
        "../outside",
        "x/../../outside",
        "link",
        "files",
        "template",
        "loop",
        "/etc",
        "nowhere",
        "a\0b",
        "x" * 5000,
    ]
    answers = {(r.status_code, r.text) for r in [await load(lora_site, lora_name="a", lora_path=p) for p in paths]}
    assert [status for status, _ in answers] == [404]  # one response for all: it does not reveal existing paths
    assert lora_site.names() == []


async def test_a_bad_adapter_is_named(lora_site: Site, tmp_path: Path) -> None:
    write_adapter(tmp_path / "loras" / "one", use_qalora=True)
    response = await load(lora_site, lora_name="a", lora_path="one")
    assert (response.status_code, response.json()["error"]["param"]) == (400, "use_qalora")


@pytest.mark.parametrize("name", ["a b", "../x", "x" * 129, BASE])
async def test_a_bad_name_is_refused_under_its_field(lora_site: Site, tmp_path: Path, name: str) -> None:
    write_adapter(tmp_path / "loras" / "one")
    response = await load(lora_site, lora_name=name, lora_path="one")
    assert (response.status_code, response.json()["error"]["param"]) == (400, "lora_name"), response.text
