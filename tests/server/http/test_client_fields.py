"""Fields that client libraries send: accepted where they have no effect on the answer; and usage in every chunk."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.openai.chat import ChatBody
from server.openai.schema import GenerationBody
from tests.support.scripted import BASE, EOS, TEXT, Served, encode, serving


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path) as served:
        yield served


CHAT = {"model": BASE, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 100}
COMPLETION = {"model": BASE, "prompt": "Hi", "max_tokens": 100}
ENDPOINTS = [("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)]
HINTS: list[dict[str, Any]] = [
    {"safety_identifier": "u1"},
    {"prompt_cache_key": "k"},
    {"prompt_cache_retention": "24h"},
    {"prompt_cache_options": {"mode": "implicit", "ttl": "30m"}},
    {"store": True},
    {"n": 2, "best_of": 2},
    {"stream": True, "stream_options": {"include_obfuscation": False}},
    {"stream": True, "stream_options": {"include_obfuscation": True}},
]


@pytest.mark.parametrize("hint", HINTS)
@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
async def test_hints_and_labels_are_accepted(
    served: Served, path: str, body: dict[str, Any], hint: dict[str, Any]
) -> None:
    assert (await served.client.post(path, json=body | hint)).status_code == 200


# vLLM's and OpenAI's fields that we do not support, at the values without effect, and at one that would have one.
NO_OPS: dict[str, tuple[list[Any], Any]] = {
    "use_beam_search": ([False], True),
    "length_penalty": ([1, 1.0], 2.0),
    "early_stopping": ([False], True),
    "detokenize": ([True], False),
    "spaces_between_special_tokens": ([True], False),
    "bad_words": ([[]], ["word"]),
    "logits_processors": ([[]], ["mine"]),
    "allowed_token_ids": ([[]], [5]),
    "return_tokens_as_token_ids": ([False], True),
    "service_tier": (["auto", "default", "flex", "priority", "scale"], "first"),
    "documents": ([[]], [{"text": "x"}]),
    # from llama.cpp and other servers
    "typical_p": ([1, 1.0], 0.9),
    "tfs_z": ([1, 1.0], 0.9),
    "top_a": ([0, 0.0], 0.1),
    "mirostat": ([0], 2),
    "repeat_penalty": ([1, 1.0], 1.1),
    "dry_multiplier": ([0, 0.0], 0.8),
    "xtc_probability": ([0, 0.0], 0.5),
    "cache_prompt": ([True], False),
    "mm_processor_kwargs": ([{}], {"num_crops": 4}),
    "vllm_xargs": ([{}], {"a": 1}),
}
CHAT_NO_OPS: dict[str, tuple[list[Any], Any]] = {
    "functions": ([[]], [{"name": "f"}]),
    "function_call": (["none", "auto"], {"name": "f"}),
    "modalities": ([["text"]], ["text", "audio"]),
    "echo": ([False], True),
}
FIELDS = [
    *((path, body, name) for path, body in ENDPOINTS for name in NO_OPS),
    *(("/v1/chat/completions", CHAT, name) for name in CHAT_NO_OPS),
]


def test_every_field_that_changes_nothing_is_here() -> None:
    assert set(GenerationBody.no_ops) == set(NO_OPS)
    assert set(ChatBody.no_ops) == set(NO_OPS | CHAT_NO_OPS)


@pytest.mark.parametrize(("path", "body", "name"), FIELDS)
async def test_a_field_that_changes_nothing_is_accepted_at_that_value_alone(
    served: Served, path: str, body: dict[str, Any], name: str
) -> None:
    harmless, other = (NO_OPS | CHAT_NO_OPS)[name]
    bare = (await served.client.post(path, json=body | {"seed": 1})).json()["choices"]
    for value in [*harmless, None]:
        response = await served.client.post(path, json=body | {"seed": 1, name: value})
        assert (response.status_code, response.json().get("choices")) == (200, bare), response.text
        first, *_, last = served.engine.requests
        assert (last.prompt, last.sampling) == (first.prompt, first.sampling)
    response = await served.client.post(path, json=body | {name: other})
    assert (response.status_code, response.json()["error"]["param"]) == (400, name)


MARKS: dict[str, Any] = {
    "id": "msg_1",
    "opts": {"visible": False},
    "created_at": 1.5,
    "cache_control": {"type": "ephemeral"},
    "copilot_cache_control": {"type": "ephemeral"},
    "annotations": [{"type": "url_citation"}],
    "provider_specific_fields": {"refusal": None},
    "reasoning_details": [{"type": "reasoning.text", "text": "Hm."}],
    "extra_content": {"google": {"thought_signature": "x"}},
}


@pytest.mark.parametrize("name", MARKS)
async def test_notes_of_clients_and_other_servers_reach_no_prompt(served: Served, name: str) -> None:
    note = {name: MARKS[name]}
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    of_call = note if name in ("provider_specific_fields", "extra_content") else {}
    for notes, of_calls in (({}, {}), (note, of_call)):
        said = {"role": "assistant", "content": None, "tool_calls": [call | of_calls]}
        result = {"role": "tool", "tool_call_id": "c1", "content": "2"}
        messages = [message | notes for message in ({"role": "user", "content": "Hi"}, said, result)]
        response = await served.client.post("/v1/chat/completions", json=CHAT | {"messages": messages})
        assert response.status_code == 200, response.text
    plain, marked = served.engine.requests[-2:]
    assert plain.prompt == marked.prompt


async def test_notes_on_tools_reach_no_prompt(tmp_path: Path) -> None:
    note = {"cache_control": {"type": "ephemeral"}}
    async with serving(tmp_path, context=1024) as served:
        for mark in ({}, note):
            tool = {"type": "function", "function": {"name": "f"} | mark} | mark
            response = await served.client.post("/v1/chat/completions", json=CHAT | {"tools": [tool]})
            assert response.status_code == 200, response.text
    plain, marked = served.engine.requests
    assert plain.prompt == marked.prompt


async def test_content_elsewhere_in_a_message_is_refused(served: Served) -> None:
    for name in ("audio", "images", "parts", "prefix", "refusal"):
        messages = [{"role": "assistant", "content": "x", name: True}]
        response = await served.client.post("/v1/chat/completions", json=CHAT | {"messages": messages})
        assert (response.status_code, response.json()["error"]["param"]) == (400, f"messages.0.{name}")


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
async def test_a_thought_without_an_answer_can_be_sent_back(served: Served, name: str) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None, name: "Hm."}]
    response = await served.client.post("/v1/chat/completions", json=CHAT | {"messages": messages})
    assert response.status_code == 200, response.text


PARTS = [{"type": "text", "text": "A fox."}]


@pytest.mark.parametrize(
    "hint",
    [
        {"reasoning_effort": "low"},
        {"verbosity": "high"},
        {"prediction": {"type": "content", "content": "A fox."}},
        {"prediction": {"type": "content", "content": PARTS}},
    ],
)
async def test_hints_of_chat_are_accepted(served: Served, hint: dict[str, Any]) -> None:
    assert (await served.client.post("/v1/chat/completions", json=CHAT | hint)).status_code == 200


@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
async def test_best_of_more_than_n_is_refused_by_name(served: Served, path: str, body: dict[str, Any]) -> None:
    response = await served.client.post(path, json=body | {"n": 1, "best_of": 2})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "best_of"


@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
@pytest.mark.parametrize("continuous", [True, False])
async def test_usage_so_far_is_in_every_chunk_when_asked_for(
    served: Served, path: str, body: dict[str, Any], continuous: bool
) -> None:
    options = {"include_usage": True, "continuous_usage_stats": continuous}
    response = await served.client.post(path, json=body | {"stream": True, "stream_options": options})
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    chunks = [json.loads(line) for line in lines if line != "[DONE]"]
    counts = [chunk["usage"] and chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts[-1] > 5
    if continuous:
        assert counts == sorted(counts)
        assert counts[0] == 1
        assert counts[-2] == counts[-1]
    else:
        assert counts[:-1] == [None] * (len(chunks) - 1)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stop", [None, "lazy"])
async def test_token_ids_are_where_vllm_has_them(served: Served, stream: bool, stop: str | None) -> None:
    generated = [*encode(TEXT), EOS]
    if stop:
        generated = generated[: next(i for i in range(99) if stop in decoded(served, generated[:i]))]
    for path, body in ENDPOINTS:
        asked = body | {"return_token_ids": True, "stream": stream, "n": 2, "stop": stop}
        objects = _objects(await served.client.post(path, json=asked))
        choices = [choice for each in objects for choice in each["choices"]]
        prompt = served.engine.requests[-1].prompt
        for index in range(2):
            ids = [choice["token_ids"] for choice in choices if choice["index"] == index]
            assert [id_ for piece in ids for id_ in piece] == generated
        holders = choices if path == "/v1/completions" else objects
        found = [each["prompt_token_ids"] for each in holders if "prompt_token_ids" in each]
        assert found == [prompt] * (2 if stream or path == "/v1/completions" else 1)


@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
async def test_token_ids_are_left_out_unless_asked_for(served: Served, path: str, body: dict[str, Any]) -> None:
    response = await served.client.post(path, json=body | {"return_token_ids": False})
    assert "token_ids" not in response.text


def decoded(served: Served, ids: list[int]) -> str:
    return served.services.text.decode(ids, skip_special_tokens=True)


def _objects(response: httpx.Response) -> list[dict[str, Any]]:
    if not response.headers["content-type"].startswith("text/event-stream"):
        return [response.json()]
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [json.loads(line) for line in lines if line != "[DONE]"]


@pytest.mark.parametrize("pairs", [{str(i): "x" for i in range(17)}, {"k" * 65: "x"}, {"k": "x" * 513}, {"k": 1}])
@pytest.mark.parametrize(("path", "body"), ENDPOINTS)
async def test_labels_have_limits(served: Served, path: str, body: dict[str, Any], pairs: dict[str, Any]) -> None:
    assert (await served.client.post(path, json=body | {"metadata": {"a": "b"}})).status_code == 200
    response = await served.client.post(path, json=body | {"metadata": pairs})
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("metadata")


@pytest.mark.parametrize("label", ["user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"])
@pytest.mark.parametrize(("path", "body"), [*ENDPOINTS, ("/v1/responses", {"model": "tiny", "input": "hi"})])
async def test_a_label_has_a_limit(served: Served, path: str, body: dict[str, Any], label: str) -> None:
    """A response repeats it, and is stored."""
    assert (await served.client.post(path, json=body | {label: "x" * 4096})).status_code == 200
    response = await served.client.post(path, json=body | {label: "x" * 4097})
    assert (response.status_code, response.json()["error"]["param"]) == (400, label)
