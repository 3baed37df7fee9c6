"""`POST /v1/adapters` with a recipe instead of files."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import load

from adapters.peft_format.text import NO_TEXT, AdapterText
from server.services import TENANT
from tests.support.harness import Site, adapter_files, write_adapter

PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"

pytestmark = pytest.mark.usefixtures("forked_helpers")


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with contextlib.closing(Site(tmp_path)) as site:
        yield site


async def mix(site: Site, **body: Any) -> httpx.Response:
    async with site.client() as client:
        return await client.post("/v1/adapters", json=body)


async def sources(site: Site) -> None:
    for seed, name in enumerate(("one", "two")):
        await site.publisher.import_directory(TENANT, name, write_adapter(site.settings.data_dir / name, seed))


def delta(weights: bytes, scaling: float) -> np.ndarray:
    tensors = load(weights)
    product: np.ndarray = tensors[f"{PREFIX}.lora_B.weight"] @ tensors[f"{PREFIX}.lora_A.weight"]
    return product * scaling


async def test_a_mix_is_a_new_adapter_and_the_same_mix_the_same(site: Site) -> None:
    await sources(site)
    body = {"name": "blend", "mix": [{"adapter": "one", "weight": 0.5}, {"adapter": "two", "weight": -2}]}
    made = await mix(site, **body, method="cat")
    assert made.status_code == 201, made.text
    assert (made.json()["rank"], made.json()["scaling"]) == (8, 1.0)
    assert made.json()["base_model_name_or_path"] == site.settings.base_name
    assert (await mix(site, **body, method="cat")).status_code == 200
    async with site.client() as client:
        weights = (await client.get("/v1/adapters/blend/weights")).content
    expected = sum(w * delta(adapter_files(seed)[1], 2.0) for seed, w in enumerate((0.5, -2.0)))
    np.testing.assert_allclose(delta(weights, 1.0), expected, rtol=1e-4, atol=1e-5)

    waiting = await mix(site, **body, promote=False)  # svd, PEFT's default: the rank of the sources
    assert (waiting.status_code, waiting.json()["rank"]) == (201, 4)
    assert site.store.get(TENANT, "blend").digest == made.json()["digest"]


async def test_a_mix_has_the_stop_tokens_and_formats_of_its_sources_fine_tunes(site: Site) -> None:
    learned = {
        "one": AdapterText(stop_tokens=(7, 9), tool_format="hermes"),
        "two": AdapterText(stop_tokens=(5, 7), reasoning_format="deepseek_r1"),
        "other": AdapterText(tool_format="mistral"),
        "plain": NO_TEXT,
    }
    for seed, (name, text) in enumerate(learned.items()):
        async with site.publisher.staging_directory() as staging:
            write_adapter(staging, seed)
            await site.publisher.publish(TENANT, name, staging, from_training=text)

    async def told(*names: str) -> tuple[Any, ...]:
        made = await mix(site, name="-".join(names), mix=[{"adapter": name} for name in names], method="cat")
        assert made.status_code == 201, made.text
        fields = ("stop_token_ids", "trained_tool_format", "trained_reasoning_format")
        return tuple(made.json().get(field) for field in fields)

    assert await told("one", "two", "plain") == ([5, 7, 9], "hermes", "deepseek_r1")
    assert await told("one", "other") == ([7, 9], None, None), "the sources have no format in common"
    assert await told("plain") == (None, None, None)


SOURCE = {"adapter": "one", "weight": 1.0}
REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "no sources": ({"mix": []}, 400, "mix"),
    "a thousand sources": ({"mix": [SOURCE] * 1000}, 400, "mix"),
    "an unknown source": ({"mix": [SOURCE, {"adapter": "nobody"}]}, 404, "mix.1.adapter"),
    "the base": ({"mix": [{"adapter": "smollm2-135m-instruct"}]}, 404, "mix.0.adapter"),
    "an unknown version": ({"mix": [{"adapter": "one@00000000"}]}, 404, "mix.0.adapter"),
    "a huge weight": ({"mix": [{"adapter": "one", "weight": 1e30}]}, 400, "mix.0.weight"),
    "an unknown method": ({"method": "magic"}, 400, "method"),
    "density of nothing": ({"method": "ties", "density": 0}, 400, "density"),
    "density above 1": ({"method": "ties", "density": 1.5}, 400, "density"),
    "density missing": ({"method": "dare_ties"}, 400, "density"),
    "density for nothing": ({"method": "cat", "density": 0.5}, 400, "density"),
    "rank for nothing": ({"method": "cat", "rank": 2}, 400, "rank"),
    "a rank of 2**31": ({"rank": 2**31}, 400, "rank"),
    "a negative seed": ({"seed": -1}, 400, "seed"),
    "an unknown field": ({"densities": [1]}, 400, "densities"),
    "a bad name": ({"name": "../x"}, 400, "name"),
    "the base's name": ({"name": "smollm2-135m-instruct"}, 400, "name"),
    "a name of a wrong type": ({"name": 5}, 400, "name"),
    "more rank than the device holds": ({"mix": [SOURCE] * 9, "method": "cat"}, 400, "r"),
}


@pytest.mark.parametrize("case", REFUSED)
async def test_refusals_name_the_field_and_keep_nothing(site: Site, case: str) -> None:
    await sources(site)
    body, status, param = REFUSED[case]
    response = await mix(site, **{"name": "blend", "mix": [SOURCE, {"adapter": "two"}]} | body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param), error
    assert site.names() == ["one", "two"]
    assert list((site.settings.data_dir / "store" / "staging").iterdir()) == []


async def test_what_the_mixer_refuses_is_a_400(site: Site) -> None:
    await sources(site)
    await site.publisher.import_directory(TENANT, "small", write_adapter(site.settings.data_dir / "small", 5, rank=2))
    response = await mix(site, name="blend", mix=[SOURCE, {"adapter": "small"}], method="linear")
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "mix")
    assert "equal rank" in error["message"]


async def test_a_mix_that_takes_too_long_ends(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    await sources(site)
    monkeypatch.setitem(vars(site.settings), "mix_seconds", 0.01)
    error = (await mix(site, name="blend", mix=[SOURCE])).json()["error"]
    assert error["code"] == "mix_too_slow"
    assert "--mix-seconds" in error["message"]
