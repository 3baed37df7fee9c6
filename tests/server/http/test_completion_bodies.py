"""Accepted and refused bodies of `/v1/completions`: parameters, ranges, sizes."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from server.http import body as body_module
from tests.support.completions import complete
from tests.support.scripted import BASE, Served, serving


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path) as served:
        yield served


# --- parameters ---------------------------------------------------------------------------------------


async def test_parameters_reach_the_engine(served: Served) -> None:
    asked: dict[str, Any] = {
        "max_tokens": 9,
        "min_tokens": 3,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.1,
        "seed": 11,
        "presence_penalty": 1,
        "frequency_penalty": -1.5,
        "repetition_penalty": 1.1,
        "stop_token_ids": [9],
        "ignore_eos": True,
    }
    await complete(served, **asked, logit_bias={"5": -100, "6": 1.5}, logprobs=2, cache_salt="mine", priority=-3)
    (request,) = served.engine.requests
    for name, value in asked.items():
        assert getattr(request.sampling, name) == value
    assert request.sampling.logit_bias == {5: -100.0, 6: 1.5}
    assert (request.sampling.logprobs, request.sampling.prompt_logprobs) == (2, None)
    assert (request.cache_salt, request.adapters, request.tenant, request.priority) == ("mine", [], "", -3)


NO_OPS: dict[str, Any] = {
    "best_of": 1,
    "suffix": "",
    "store": False,
    "response_format": {"type": "text"},
    "tools": [],
    "service_tier": "auto",
    "user": "someone",
    "metadata": {"a": "b"},
    "adapter_source": "local",
    "temperature": None,
    "anything_at_all": None,
    "top_k": -1,
    "stop": [],
    "stream": False,
    "logit_bias": {},
}


@pytest.mark.parametrize("name", NO_OPS)
async def test_fields_without_effect_are_accepted(served: Served, name: str) -> None:
    response = await complete(served, **{name: NO_OPS[name]})
    assert response.status_code == 200, response.text


NUMBERS: dict[str, tuple[Any, Any]] = {  # lowest and highest value
    "max_tokens": (1, None),
    "min_tokens": (0, None),
    "n": (1, 128),
    "temperature": (0, 2),
    "top_p": (0, 1),
    "top_k": (-1, 2**31 - 1),
    "min_p": (0, 1),
    "seed": (-(2**63), 2**63 - 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "repetition_penalty": (1e-9, 2),
    "logprobs": (0, 20),
}
INTEGERS = {"max_tokens", "min_tokens", "n", "top_k", "seed", "logprobs"}


@pytest.mark.parametrize("name", NUMBERS)
async def test_numbers_have_ranges_and_are_numbers(served: Served, name: str) -> None:
    lowest, highest = NUMBERS[name]
    for good in (lowest, highest):
        if good is not None:
            response = await complete(served, **{name: good})
            assert response.status_code == 200, response.text
    wrong: list[str] = ["true", '"1"', "[1]", "{}", str(2**63), str(2**70), "1e999", "NaN", "-Infinity"]
    wrong.append(json.dumps(lowest - 1))
    if highest is not None:
        wrong.append(json.dumps(highest + 1))
    if name in INTEGERS:
        wrong += ["1.0", "1.5"]
    served.engine.requests.clear()
    for value in wrong:
        raw = f'{{"model": "{BASE}", "prompt": "Hi", "{name}": {value}}}'
        response = await served.client.post(
            "/v1/completions", content=raw, headers={"content-type": "application/json"}
        )
        error = response.json()["error"]
        assert response.status_code == 400, (value, response.text)
        assert error["type"] == "invalid_request_error"
        assert value in ("NaN", "-Infinity") or name in (error["param"] or ""), (value, error)
    assert served.engine.requests == []


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"frobnicate": 1}, "frobnicate"),
    "unknown with a false value": ({"frobnicate": 0}, "frobnicate"),
    "not quite a no-op": ({"store": 0}, "store"),
    "best_of": ({"best_of": 2}, "best_of"),
    "response_format": ({"response_format": {"type": "xml"}}, "response_format"),
    "tools": ({"tools": [{"type": "function"}]}, "tools"),
    "stop of a wrong type": ({"stop": 5}, "stop"),
    "stop with an empty string": ({"stop": ["a", ""]}, "stop"),
    "stop with a number": ({"stop": ["a", 1]}, "stop"),
    "too many stops": ({"stop": ["a"] * 17}, "stop"),
    "too long a stop": ({"stop": "a" * 1025}, "stop"),
    "too many prompts": ({"prompt": ["a"] * 1025}, "prompt"),
    "too many samples of prompts": ({"prompt": ["a"] * 9, "n": 128}, "n"),
    "logit_bias key": ({"logit_bias": {"x": 1}}, "logit_bias"),
    "logit_bias value": ({"logit_bias": {"1": 101}}, "logit_bias.1"),
    "logit_bias boolean": ({"logit_bias": {"1": True}}, "logit_bias.1"),
    "logit_bias outside": ({"logit_bias": {"512": 1}}, "logit_bias"),
    "stop_token_ids outside": ({"stop_token_ids": [512]}, "stop_token_ids"),
    "stop_token_ids negative": ({"stop_token_ids": [-1]}, "stop_token_ids.0"),
    "min above max": ({"min_tokens": 101}, "min_tokens"),
    "max_tokens 0 without echo": ({"max_tokens": 0}, "max_tokens"),
    "stream_options without stream": ({"stream_options": {"include_usage": True}}, "stream_options"),
    "stream_options unknown": ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
    "stream text": ({"stream": "true"}, "stream"),
    "echo number": ({"echo": 1}, "echo"),
    "model missing": ({"model": None}, "model"),
    "model empty": ({"model": ""}, "model"),
    "model of a wrong type": ({"model": 5}, "model"),
    "prompt missing": ({"prompt": None}, "prompt"),
    "adapter_source": ({"adapter_source": "hub"}, "adapter_source"),
    "cache_salt empty": ({"cache_salt": ""}, "cache_salt"),
    "metadata deep": ({"metadata": {"a": {}}}, "metadata.a"),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_refusals_name_the_field(served: Served, name: str) -> None:
    body, param = REFUSED[name]
    response = await complete(served, **body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert set(error) == {"message", "type", "param", "code"}
    assert served.engine.requests == []


async def test_the_context_is_a_limit_with_numbers(served: Served) -> None:
    response = await complete(served, prompt=[5] * 200, max_tokens=57)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "max_tokens")
    assert all(number in error["message"] for number in ("256", "257", "200", "57"))
    response = await complete(served, prompt=[5] * 256, max_tokens=None)
    assert (response.json()["error"]["code"], response.json()["error"]["param"]) == (
        "context_length_exceeded",
        "prompt",
    )
    assert (await complete(served, prompt=[5] * 200, max_tokens=56)).status_code == 200
    await complete(served, prompt=[5] * 250, max_tokens=None)
    assert served.engine.requests[-1].sampling.max_tokens == 6


# --- the body -------------------------------------------------------------------------------------------


async def test_bodies_are_json_of_bounded_size(tmp_path: Path) -> None:
    async with serving(tmp_path, max_body_bytes=2048) as served:

        async def chunked() -> AsyncIterator[bytes]:
            for _ in range(100):
                yield b" " * 100

        post = served.client.post
        json_type = {"content-type": "application/json"}
        too_large = await post("/v1/completions", content=b" " * 3000, headers=json_type)
        too_large_in_chunks = await post("/v1/completions", content=chunked(), headers=json_type)
        assert (too_large.status_code, too_large_in_chunks.status_code) == (413, 413)
        assert "2048" in too_large.json()["error"]["message"]
        assert (await post("/v1/completions", content=b"{}", headers={"content-type": "text/plain"})).status_code == 415
        assert (await post("/v1/completions", content=b"{}")).status_code == 415
        assert (await post("/v1/completions", json=[])).status_code == 400
        assert (await post("/v1/completions", content=b"[" * 2000, headers=json_type)).status_code == 400


async def test_long_prompts_and_large_bodies_do_not_hold_up_others(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are parsed and tokenised in threads, so other requests continue."""
    begun, going = ({what: threading.Event() for what in ("body", "prompt")} for _ in range(2))

    def held(what: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def wait(*args: Any) -> Any:
            begun[what].set()
            assert going[what].wait(60)
            return work(*args)

        return wait

    monkeypatch.setattr(body_module, "parse_body", held("body", body_module.parse_body))
    monkeypatch.setattr(served.services.text, "_encode", held("prompt", served.services.text._encode))
    asking = asyncio.create_task(complete(served, prompt=["many words " * 60] * 1000, max_tokens=300))
    for what in ("body", "prompt"):
        assert await asyncio.to_thread(begun[what].wait, 60)
        assert (await served.client.get("/v1/models")).status_code == 200
        going[what].set()
    assert (await asking).json()["error"]["code"] == "context_length_exceeded"


async def test_other_methods_and_paths_have_the_same_shape(served: Served) -> None:
    for method, path, status in [
        ("GET", "/v1/completions", 405),
        ("POST", "/v1/nothing", 404),
        ("POST", "/v1/completions/", 404),
    ]:
        response = await served.client.request(method, path)
        assert response.status_code == status
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


async def test_a_path_that_names_no_model_tells_where_the_list_is(served: Served) -> None:
    response = await served.client.get("/v1/models/")
    assert response.status_code == 404
    assert "`/v1/models`" in response.json()["error"]["message"]


@pytest.mark.parametrize(("prompts", "n", "param"), [(5000, 1, "prompt"), (5000, 2, "prompt"), (100, 128, "n")])
async def test_more_answers_than_may_ever_wait_name_the_field(served: Served, prompts: int, n: int, param: str) -> None:
    response = await complete(served, prompt=["a"] * prompts, n=n)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
