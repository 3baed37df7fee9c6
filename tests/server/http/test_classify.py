"""`/v1/classify`: shapes, limits and refusals, with an engine that returns given scores."""

import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from msgspec.structs import replace
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from adapters.peft_format.outline import Outline, Parameter
from adapters.peft_format.sizes import EXTRAS
from tests.support.harness import HIDDEN, adapter_files
from tests.support.scripted import BASE, Served, encode, serving

OUTLINE = Outline(
    {"model.embed_tokens.weight": Parameter((512, HIDDEN), "F32", Path("model.safetensors"), 0)},
    "model.embed_tokens",
    "lm_head",
)
HEAD = "base_model.model.score.weight"


def classifier_files(labels: int = 3, width: int = HIDDEN, head: str = HEAD, **config: Any) -> dict[str, bytes]:
    """The parts of an upload: a classifier."""
    fields = {"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]} | config
    configuration, weights = adapter_files(**fields)
    tensors = load_safetensors(weights) | {head: np.full((labels, width), 0.5, np.float32)}
    return {"config": configuration, "weights": save_safetensors(tensors)}


async def upload(served: Served, name: str, files: dict[str, bytes]) -> httpx.Response:
    return await served.client.post("/v1/adapters", data={"name": name}, files=files)


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path, outline=OUTLINE) as served:
        info = served.engine.info
        assert info is not None
        served.engine.info = replace(info, pool_rows=info.pool_rows | {EXTRAS: 64})
        assert (await upload(served, "topics", classifier_files())).status_code == 201
        yield served


async def ask(served: Served, **body: Any) -> httpx.Response:
    return await served.client.post("/v1/classify", json={"model": "topics"} | body)


async def test_the_receipt_says_that_it_classifies(served: Served) -> None:
    receipt = (await served.client.get("/v1/adapters/topics")).json()
    assert (receipt["task"], receipt["num_labels"], receipt["variants"]) == ("SEQ_CLS", 3, ["classifier"])
    assert not [warning for warning in receipt["warnings"] if "modules_to_save" in warning]
    assert "topics" in {model["id"] for model in (await served.client.get("/v1/models")).json()["data"]}
    await served.add_adapter(Path(served.services.settings.data_dir), "plain")
    assert "task" not in (await served.client.get("/v1/adapters/plain")).json()


async def test_one_text(served: Served) -> None:
    served.engine.cached_tokens = 1
    response = await ask(served, input="The quick brown fox", user="me")
    body = response.json()
    total = math.exp(1) + math.exp(3) + math.exp(2)
    [entry] = body.pop("data")
    assert entry.pop("probs") == pytest.approx([math.exp(score) / total for score in (1, 3, 2)])
    assert entry == {"index": 0, "label": "LABEL_1", "num_classes": 3}
    count = len(encode("The quick brown fox"))
    assert body.pop("id").startswith("classify-")
    assert body.pop("created") > 1_700_000_000
    assert body == {
        "object": "list",
        "model": "topics",
        "usage": {
            "prompt_tokens": count,
            "completion_tokens": 0,
            "total_tokens": count,
            "prompt_tokens_details": {"cached_tokens": 1},
        },
    }
    [asked] = served.engine.requests
    assert (asked.sampling.classify, asked.sampling.max_tokens, len(asked.adapters)) == (True, 0, 1)
    assert response.headers["X-Adapter-Digest"] == asked.adapters[0].digest
    usage = (await served.client.get("/v1/adapters/topics")).json()
    assert (usage["requests"], usage["tokens"]) == (1, count)


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        (["a fox", "a dog"], [encode("a fox"), encode("a dog")]),
        ([5, 6, 7], [[5, 6, 7]]),
        ([[5, 6], [7]], [[5, 6], [7]]),
    ],
)
async def test_other_inputs(given: Any, prompts: list[list[int]], served: Served) -> None:
    served.engine.scores = lambda request: [float(len(request.prompt)), 1.5]
    body = (await ask(served, input=given, use_activation=False)).json()
    assert [(entry["index"], entry["probs"]) for entry in body["data"]] == [
        (index, [len(prompt), 1.5]) for index, prompt in enumerate(prompts)
    ]
    assert sorted(asked.prompt for asked in served.engine.requests) == sorted(prompts)
    assert body["usage"]["prompt_tokens"] == sum(map(len, prompts))


async def test_a_reward_is_a_single_score(served: Served) -> None:
    served.engine.scores = lambda request: [-800.0]
    assert (await ask(served, input="x")).json()["data"][0]["probs"] == [0.0]
    served.engine.scores = lambda request: [0.75]
    [entry] = (await ask(served, input="x")).json()["data"]
    assert entry == {
        "index": 0,
        "label": "LABEL_0",
        "probs": [pytest.approx(1 / (1 + math.exp(-0.75)))],
        "num_classes": 1,
    }
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    [entry] = (await ask(served, messages=messages, use_activation=False)).json()["data"]
    assert entry["probs"] == [0.75]
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    assert served.engine.requests[-1].prompt == encode(text)


async def test_truncation(served: Served) -> None:
    long = list(range(3, 303))
    await ask(served, input=long, truncate_prompt_tokens=4)
    await ask(served, input=long, truncate_prompt_tokens=4, truncation_side="left")
    await ask(served, input=long, truncate_prompt_tokens=-1)
    await ask(served, input=long[:5], truncate_prompt_tokens=9, truncation_side="left")
    assert [asked.prompt for asked in served.engine.requests] == [long[:4], long[-4:], long[:256], long[:5]]


CONVERSATION = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "input"),
        ({"input": ""}, 400, "input"),
        ({"input": []}, 400, "input"),
        ({"input": [[]]}, 400, "input"),
        ({"input": [1, "x"]}, 400, "input"),
        ({"input": [512]}, 400, "input"),
        ({"input": [True]}, 400, "input"),
        ({"input": [5] * 257}, 400, "input"),
        ({"input": "x", "truncate_prompt_tokens": 300, "model": "nobody"}, 404, "model"),
        ({"input": [5] * 300, "truncate_prompt_tokens": 257}, 400, "input"),
        ({"input": ["x"] * 100_000}, 400, "input"),
        ({"input": "x", "truncate_prompt_tokens": 0}, 400, "truncate_prompt_tokens"),
        ({"input": "x", "truncate_prompt_tokens": -2}, 400, "truncate_prompt_tokens"),
        ({"input": "x", "truncation_side": "middle"}, 400, "truncation_side"),
        ({"input": "x", "use_activation": 1}, 400, "use_activation"),
        ({"input": "x", "stream": True}, 400, "stream"),
        ({"input": "x", "messages": CONVERSATION}, 400, "input"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "user"}]}, 400, "messages.0.content"),
        ({"messages": CONVERSATION, "add_generation_prompt": True, "continue_final_message": True}, 400, None),
        ({"input": "x", "model": BASE}, 400, "model"),
        ({"input": "x", "model": "plain"}, 400, "model"),
        ({"input": "x", "model": BASE, "adapter_id": "plain"}, 400, "adapter_id"),
    ],
)
async def test_refusals(body: dict[str, Any], status: int, param: str | None, served: Served, tmp_path: Path) -> None:
    await served.add_adapter(tmp_path, "plain")
    response = await ask(served, **body)
    error = response.json()["error"]
    assert response.status_code == status, error
    assert error["param"] == (param or "continue_final_message")
    assert served.engine.requests == []


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"model": "topics", "prompt": "x"}, "model"),
        ("/v1/chat/completions", {"model": "topics", "messages": CONVERSATION}, "model"),
        ("/v1/chat/completions", {"model": BASE, "adapter_id": "topics", "messages": CONVERSATION}, "adapter_id"),
        (
            "/v1/completions",
            {"model": BASE, "adapters": [{"id": "topics", "weight": 0.5}], "prompt": "x"},
            "adapters.0",
        ),
        ("/v1/completions", {"model": BASE, "adapters": [{"id": "topics"}], "prompt": "x"}, "adapters"),
        ("/v1/responses", {"model": "topics", "input": "x"}, "model"),
        ("/v1/messages", {"model": "topics", "max_tokens": 5, "messages": CONVERSATION}, None),
        ("/v1/adapters/topics/verify", {}, "name"),
        ("/v1/adapters/topics/merge", {"to": "resident", "dtype": "bf16"}, "to"),
        ("/v1/fine_tuning/estimate", {"model": "topics"}, "model"),
    ],
)
async def test_generating_routes_refuse_classifiers(
    path: str, body: dict[str, Any], param: str | None, served: Served
) -> None:
    response = await served.client.post(path, json=body)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert param is None or error["param"] == param
    assert "classif" in error["message"]
    assert served.engine.requests == []


async def test_its_prompts_can_be_tokenised(served: Served) -> None:
    response = await served.client.post("/tokenize", json={"model": "topics", "prompt": "a fox"})
    assert response.json()["tokens"] == encode("a fox")


async def test_a_failure_of_one_prompt_ends_the_others(served: Served) -> None:
    served.engine.fail = {0: "non_finite_logits"}
    response = await ask(served, input=["a", "b", "c"])
    assert (response.status_code, response.json()["error"]["code"]) == (400, "non_finite_logits")
    assert served.services.admission.requests == 0


@pytest.mark.parametrize(
    ("files", "param", "words"),
    [
        (classifier_files(width=HIDDEN + 1), HEAD, "shape"),
        (classifier_files(head="base_model.model.head.weight"), HEAD, "lack"),
        ({"config": adapter_files(task_type="SEQ_CLS")[0], "weights": adapter_files()[1]}, HEAD, "lack"),
        (classifier_files(labels=5000), HEAD, "5000 labels; 1 to 4096"),
        (classifier_files(task_type="CAUSAL_LM"), HEAD, "is not expected"),
        (classifier_files(task_type="TOKEN_CLS"), "task_type", "SEQ_CLS"),
        (classifier_files(modules_to_save=None, alora_invocation_tokens=[5]), "task_type", "alora"),
    ],
)
async def test_uploads_that_are_refused(files: dict[str, bytes], param: str, words: str, served: Served) -> None:
    response = await upload(served, "other", files)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert words in error["message"]


async def test_a_base_without_an_outline_has_no_place_for_a_head(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        error = (await upload(served, "topics", classifier_files())).json()["error"]
        assert error["param"] == "task_type"
