"""Merged checkpoints over HTTP: created once, fetched file by file, removed."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file, save_file

from server.client.engine import MergeRefused
from server.services import TENANT
from tests.support.harness import HIDDEN, LAYERS, Site, adapter_files, write_adapter
from tests.support.tiny import _tokenizer, tiny_text

Q = "model.layers.0.self_attn.q_proj"

pytestmark = pytest.mark.usefixtures("forked_helpers")


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """A site whose base has only the linears that adapters change."""
    base = tmp_path / "base"
    base.mkdir()
    (tmp_path / "data").mkdir()
    (base / "config.json").write_text('{"model_type": "llama", "dtype": "float32"}')
    torch.manual_seed(0)
    weights = {
        f"model.layers.{layer}.self_attn.{kind}.weight": torch.randn(HIDDEN, HIDDEN)
        for layer in range(LAYERS)
        for kind in ("q_proj", "v_proj")
    }
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with contextlib.closing(Site(tmp_path / "data", tiny_text(), model=str(base))) as site:
        yield site


async def test_a_checkpoint_is_made_once_fetched_and_removed(site: Site) -> None:
    await site.publisher.import_directory(TENANT, "legal", write_adapter(site.settings.data_dir / "legal"))
    async with site.client() as client:
        assert (await client.get("/v1/adapters/legal/merge")).status_code == 404
        made = await client.post("/v1/adapters/legal/merge", json={"to": "checkpoint"})
        assert made.status_code == 201, made.text
        assert [file["name"] for file in made.json()["checkpoint"]["files"]] == ["config.json", "model.safetensors"]
        again = await client.post("/v1/adapters/legal/merge", json={"to": "checkpoint"})
        assert (again.status_code, again.json()) == (200, made.json())
        assert (await client.get("/v1/adapters/legal/merge")).json() == made.json() | {"resident": None}

        config = (await client.get("/v1/adapters/legal/merge/config.json")).json()
        assert config == {"model_type": "llama", "dtype": "bfloat16"}
        odd = {"Range": "bytes=oops"}  # the whole file is returned all the same
        merged = load((await client.get("/v1/adapters/legal/merge/model.safetensors", headers=odd)).content)
        base = load_file(Path(site.settings.model) / "model.safetensors")
        tensors = load(adapter_files()[1])
        prefix = f"base_model.model.{Q}"
        delta = 2.0 * tensors[f"{prefix}.lora_B.weight"] @ tensors[f"{prefix}.lora_A.weight"]
        torch.testing.assert_close(merged[f"{Q}.weight"].float(), base[f"{Q}.weight"] + delta, rtol=2**-8, atol=1e-2)
        for file in ("nothing", "%2e%2e", "%2e%2e%2fadapters.db", "config.json%00"):
            assert (await client.get(f"/v1/adapters/legal/merge/{file}")).status_code == 404

        assert (await client.delete("/v1/adapters/legal/merge")).json()["deleted"] == ["checkpoint"]
        assert (await client.delete("/v1/adapters/legal/merge")).status_code == 404
        assert (await client.get("/v1/adapters/legal")).status_code == 200
    assert list((site.settings.data_dir / "checkpoints").iterdir()) == []


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "to"),
        ({"to": 1}, "to"),
        ({"to": "checkpoint", "dtype": "nf4"}, "dtype"),
        ({"to": "checkpoint", "prompts": ["x"]}, "prompts"),
        ({"to": "resident"}, "dtype"),
        ({"to": "resident", "dtype": "int8"}, "dtype"),
        ({"to": "resident", "dtype": "bf16", "prompts": []}, "prompts"),
        ({"to": "resident", "dtype": "bf16", "prompts": ["x"] * 17}, "prompts"),
        ({"to": "resident", "dtype": "bf16", "prompts": ["x", ""]}, "prompts.1"),
        ({"to": "resident", "dtype": "bf16", "prompts": ["a b c d " * 200]}, "prompts.0"),
    ],
)
async def test_orders_that_make_no_sense(site: Site, body: dict[str, Any], param: str) -> None:
    await site.publisher.import_directory(TENANT, "legal", write_adapter(site.settings.data_dir / "legal"))
    async with site.client() as client:
        response = await client.post("/v1/adapters/legal/merge", json=body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, param)
        assert (await client.post("/v1/adapters/nobody/merge", json={"to": "checkpoint"})).status_code == 404


async def test_a_merge_that_fails_leaves_nothing(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    await site.publisher.import_directory(TENANT, "legal", write_adapter(site.settings.data_dir / "legal"))
    weights = Path(site.settings.model) / "model.safetensors"
    tensors = load_file(weights)
    del tensors[f"{Q}.weight"]
    save_file(tensors, weights)
    (site.settings.data_dir / "checkpoints" / ".left").mkdir(parents=True)
    async with site.client() as client:
        response = await client.post("/v1/adapters/legal/merge", json={"to": "checkpoint"})
        assert (response.status_code, response.json()["error"]["param"]) == (400, "merge"), response.text
        monkeypatch.setitem(vars(site.settings), "merge_seconds", 0.01)
        response = await client.post("/v1/adapters/legal/merge", json={"to": "checkpoint"})
        assert response.json()["error"]["code"] == "merge_too_slow"
    assert list((site.settings.data_dir / "checkpoints").iterdir()) == []
    assert site.names() == ["legal"]


async def test_a_resident_merge_is_shown_and_undone(site: Site) -> None:
    await site.publisher.import_directory(TENANT, "legal", write_adapter(site.settings.data_dir / "legal"))
    async with site.client() as client:
        assert (await client.get("/v1/adapters/legal")).json()["merged"] is None
        order = {"to": "resident", "dtype": "nf4", "prompts": ["The quick brown fox."]}
        made = await client.post("/v1/adapters/legal/merge", json=order)
        assert made.status_code == 201, made.text
        shown = made.json()["resident"]
        assert shown.pop("prompts") == order["prompts"]
        assert shown["drift"]["positions"] == len(_tokenizer().encode("The quick brown fox."))
        assert shown["decode_tokens_per_second"] == [{"requests": 1, "adapter": 50.0, "merged": 60.0, "gain": 1.2}]
        assert (await client.post("/v1/adapters/legal/merge", json=order)).status_code == 200
        assert (await client.get("/v1/adapters/legal/merge")).json()["resident"] == shown
        assert (await client.get("/v1/adapters/legal")).json()["merged"] == shown

        assert (await client.post("/v1/adapters/legal/merge", json={"to": "checkpoint"})).status_code == 201
        assert (await client.delete("/v1/adapters/legal/merge?to=both")).json()["error"]["param"] == "to"
        gone = await client.delete("/v1/adapters/legal/merge?to=resident")
        assert gone.json()["deleted"] == ["resident"]
        left = (await client.get("/v1/adapters/legal/merge")).json()
        assert (left["resident"], left["checkpoint"] is None) == (None, False)
        await client.post("/v1/adapters/legal/merge", json=order)
        assert (await client.delete("/v1/adapters/legal/merge")).json()["deleted"] == ["resident", "checkpoint"]


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("merge_too_large", 507),
        ("merge_busy", 429),
        ("merge_exists", 409),
        ("merge_given_up", 409),
        ("merge_failed", 500),
        ("adapter_load_failed", 500),
        ("merge_refused", 400),
    ],
)
async def test_what_the_engine_refuses(site: Site, code: str, status: int) -> None:
    await site.publisher.import_directory(TENANT, "legal", write_adapter(site.settings.data_dir / "legal"))
    site.engine.refuses_merges = MergeRefused("the words", code)
    async with site.client() as client:
        response = await client.post("/v1/adapters/legal/merge", json={"to": "resident", "dtype": "nf4"})
        error = response.json()["error"]
        assert response.status_code == status, error
        assert ("the words" in error["message"]) == (status != 500)


async def test_only_the_current_version_of_a_name_is_merged(site: Site) -> None:
    first, _ = await site.publisher.import_directory(TENANT, "legal", write_adapter(site.settings.data_dir / "one"))
    await site.publisher.import_directory(TENANT, "legal", write_adapter(site.settings.data_dir / "two", 1))
    async with site.client() as client:
        order = {"to": "resident", "dtype": "nf4"}
        older = f"legal@{first.digest.removeprefix('sha256:')[:12]}"
        assert (await client.post(f"/v1/adapters/{older}/merge", json=order)).status_code == 409
        assert (await client.post("/v1/adapters/legal/merge", json=order)).status_code == 201
        await site.publisher.import_directory(TENANT, "legal", write_adapter(site.settings.data_dir / "three", 2))
        assert (await client.get("/v1/adapters/legal")).json()["merged"] is None, "it is not merged"
