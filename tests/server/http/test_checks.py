"""Full receipts, warming and verifying, in front of a scripted engine."""

from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from safetensors.numpy import load, save

from server.client.engine import AdapterLoadFailed
from server.errors import EngineUnavailable
from server.messages.protocol import AdapterRef, Generate, Output, TokenLogprob
from server.services import TENANT
from tests.support.harness import HIDDEN, adapter_files
from tests.support.scripted import BASE, Served, encode, serving


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path) as served:
        yield served


def refused(response: httpx.Response, status: int, param: str | None) -> None:
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (status, param), error


# --- receipts --------------------------------------------------------------------------------------


async def test_a_receipt_in_full(served: Served, tmp_path: Path) -> None:
    config, weights = adapter_files(rank=4, rank_pattern={"v_proj": 2}, base_model_name_or_path="org/Other-7B")
    tensors = load(weights)
    for name, tensor in tensors.items():
        if "v_proj" in name:
            tensors[name] = tensor[:2].copy() if "lora_A" in name else tensor[:, :2].copy()
    files = {"config": ("c", config), "weights": ("w", save(tensors, {"format": "pt", "trained_on": "poems"}))}
    uploaded = await served.client.post("/v1/adapters", data={"name": "poet"}, files=files)
    assert uploaded.status_code == 201, uploaded.text
    assert "Other-7B" in uploaded.json()["warnings"][0]
    assert BASE in uploaded.json()["warnings"][0]
    one = (await served.client.get("/v1/adapters/poet")).json()
    assert one.items() >= uploaded.json().items()
    assert one["modules"]["model.layers.1.self_attn.q_proj"] == {"rank": 4, "scaling": 2.0}
    assert one["modules"]["model.layers.1.self_attn.v_proj"] == {"rank": 2, "scaling": 4.0}
    assert len(one["modules"]) == one["modules_matched"]
    assert one["file_metadata"] == {"format": "pt", "trained_on": "poems"}
    assert one["bytes_on_device"] == 2 * (4 + 2) * 2 * HIDDEN * 4
    assert one["bytes_on_disk"] > one["bytes"]

    served.engine.info = None  # while the engine starts
    assert (await served.client.get("/v1/adapters/poet")).json()["bytes_on_device"] is None


@pytest.mark.parametrize("named", [None, "", BASE, f"someone/{BASE.upper()}", "/models/tiny"])
async def test_the_right_base_is_no_reason_for_a_warning(served: Served, named: str | None) -> None:
    config, weights = adapter_files(base_model_name_or_path=named)
    files = {"config": ("c", config), "weights": ("w", weights)}
    uploaded = await served.client.post("/v1/adapters", data={"name": "poet"}, files=files)
    assert uploaded.json()["warnings"] == []


# --- warming ---------------------------------------------------------------------------------------


async def test_every_version_that_answers_is_warmed(served: Served, tmp_path: Path) -> None:
    warmed: list[str] = []

    async def warm(adapter: AdapterRef) -> float:
        assert (Path(adapter.path) / "adapter_model.safetensors").is_file()
        warmed.append(adapter.digest)
        return 0.25

    served.engine.warm = warm  # type: ignore[method-assign]
    old, new = [await served.add_adapter(tmp_path, "poet", seed) for seed in range(2)]
    body = (await served.client.post("/v1/adapters/poet/warm")).json()
    assert body == {"object": "adapter.residency", "name": "poet", "digests": [new], "seconds": 0.25}
    await served.services.registry.publisher.split(TENANT, "poet", {old: 0.9, new: 0.1}, None)
    body = (await served.client.post("/v1/adapters/poet/warm")).json()
    assert (sorted(body["digests"]), body["seconds"]) == (sorted([old, new]), 0.5)
    await served.client.post(f"/v1/adapters/poet@{old}/warm")
    assert warmed[-1] == old


@pytest.mark.parametrize(
    ("failure", "status"),
    [(EngineUnavailable("starting"), 503), (AdapterLoadFailed("/secret", "adapter_load_failed"), 500)],
)
async def test_an_adapter_that_cannot_be_warmed(
    served: Served, tmp_path: Path, failure: Exception, status: int
) -> None:
    async def warm(adapter: AdapterRef) -> float:
        raise failure

    served.engine.warm = warm  # type: ignore[method-assign]
    await served.add_adapter(tmp_path, "poet")
    response = await served.client.post("/v1/adapters/poet/warm")
    refused(response, status, None)
    assert "secret" not in response.text


# --- verifying ---------------------------------------------------------------------------------------


def scored_by(served: Served, shift: float) -> None:
    """Let the engine score every token of a prompt, with `shift` added for requests with an adapter."""

    async def generate(request: Generate) -> AsyncGenerator[Output, None]:
        served.engine.requests.append(request)
        logprob = -1.0 + (shift if request.adapters else 0.0)
        entries: list[TokenLogprob | None] = [None, *(TokenLogprob(t, logprob, 1) for t in request.prompt[1:])]
        yield Output(id=request.id, prompt_logprobs=entries, finish_reason="length")

    served.engine.generate = generate  # type: ignore[method-assign]


async def test_an_adapter_that_does_something_and_one_that_does_not(served: Served, tmp_path: Path) -> None:
    digest = await served.add_adapter(tmp_path, "poet")
    scored_by(served, 0.5)
    body: dict[str, Any] = (await served.client.post("/v1/adapters/poet/verify", json={"prompt": "The fox"})).json()
    assert body == {
        "object": "adapter.verification",
        "name": "poet",
        "digest": digest,
        "prompt_tokens": len(encode("The fox")),
        "changes_anything": True,
        "mean_logprob": {"adapter": -0.5, "base": -1.0},
        "logprob_difference": {"mean": 0.5, "max": 0.5},
        "difference_from_peft": None,
    }
    scored_by(served, 0.0)
    body = (await served.client.post("/v1/adapters/poet/verify")).json()
    assert (body["changes_anything"], body["logprob_difference"]["max"]) == (False, 0.0)
    assert served.services.admission.requests == 0


@pytest.mark.parametrize(
    "body", [{"prompt": ""}, {"prompt": "x"}, {"prompt": "fox " * 400}, {"prompt": 5}, {"prompt": ["x"]}]
)
async def test_prompts_that_cannot_be_scored(served: Served, tmp_path: Path, body: dict[str, Any]) -> None:
    await served.add_adapter(tmp_path, "poet")
    refused(await served.client.post("/v1/adapters/poet/verify", json=body), 400, "prompt")


async def test_an_adapter_that_fails_while_it_is_verified(served: Served, tmp_path: Path) -> None:
    await served.add_adapter(tmp_path, "poet")
    served.engine.fail = {0: "non_finite_logits"}
    response = await served.client.post("/v1/adapters/poet/verify")
    assert (response.status_code, response.json()["error"]["code"]) == (400, "non_finite_logits")
    assert (served.services.admission.requests, served.engine.running) == (0, set())


async def test_peft_where_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(tmp_path, quantization="int8") as served:
        await served.add_adapter(tmp_path, "poet")
        refused(await served.client.post("/v1/adapters/poet/verify", json={"peft": True}), 400, "peft")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "again").mkdir()
    async with serving(tmp_path / "again") as served:
        response = await served.client.post("/v1/adapters/poet/verify", json={"peft": True})
        refused(response, 400, "peft")
        assert "not installed" in response.text


@pytest.mark.parametrize("what", ["warm", "verify"])
async def test_names_that_are_no_adapter(served: Served, what: str) -> None:
    for name in ("nobody", BASE, "poet@00000000"):
        refused(await served.client.post(f"/v1/adapters/{name}/{what}"), 404, "name")
