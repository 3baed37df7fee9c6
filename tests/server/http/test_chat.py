"""`/v1/chat/completions` in front of a scripted engine. Behaviour shared with completions is tested there."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.chats import sent_prompt
from tests.support.completions import events
from tests.support.scripted import BASE, BASE_DIGEST, EOS, TEXT, Served, encode, serving

HELLO = [{"role": "user", "content": "Hi"}]
PROMPT = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path) as served:
        yield served


async def chat(served: Served, **body: Any) -> httpx.Response:
    return await served.client.post("/v1/chat/completions", json={"model": BASE, "messages": HELLO} | body)


# --- responses ---------------------------------------------------------------------------------------


async def test_an_answer_has_openais_shape(served: Served) -> None:
    response = await chat(served)
    assert response.status_code == 200
    assert response.headers["x-adapter-digest"] == BASE_DIGEST
    body = response.json()
    assert body.pop("id").startswith("chatcmpl-")
    assert body.pop("created") > 1.7e9
    assert body.pop("usage")["prompt_tokens"] == len(encode(PROMPT))
    message = {"role": "assistant", "content": TEXT, "refusal": None}
    assert body == {
        "object": "chat.completion",
        "model": BASE,
        "system_fingerprint": BASE_DIGEST,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop", "stop_reason": None}],
    }


async def test_a_stream_starts_with_the_role_and_says_the_same(served: Served) -> None:
    chunks = events(await chat(served, stream=True, n=2, stream_options={"include_usage": True}))
    assert chunks[-1] == "[DONE]"
    assert chunks[-2]["usage"]["completion_tokens"] == 2 * (len(encode(TEXT)) + 1)
    for index in range(2):
        choices = [c for chunk in chunks[:-1] for c in chunk["choices"] if c["index"] == index]
        assert choices[0]["delta"]["role"] == "assistant"
        assert all("role" not in choice["delta"] for choice in choices[1:])
        assert "".join(choice["delta"].get("content", "") for choice in choices) == TEXT
        assert choices[-1]["finish_reason"] == "stop"
    assert {chunk["object"] for chunk in chunks[:-1]} == {"chat.completion.chunk"}


async def test_an_empty_answer_is_an_empty_message(served: Served) -> None:
    served.engine.reply = lambda request: [EOS]
    assert (await chat(served)).json()["choices"][0]["message"]["content"] == ""
    chunks = events(await chat(served, stream=True))
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}


async def test_max_tokens_is_the_rest_of_the_context_unless_told(served: Served) -> None:
    await chat(served)
    assert served.engine.requests[-1].sampling.max_tokens == 256 - len(encode(PROMPT))
    for name in ("max_tokens", "max_completion_tokens"):
        await chat(served, **{name: 5})
        assert served.engine.requests[-1].sampling.max_tokens == 5
    await chat(served, max_tokens=5, max_completion_tokens=5)


async def test_logprobs_are_a_list_that_spells_the_text(served: Served) -> None:
    served.engine.reply = lambda request: [*encode("a 漢"), EOS]
    content = (await chat(served, logprobs=True, top_logprobs=2)).json()["choices"][0]["logprobs"]["content"]
    assert bytes(byte for token in content for byte in token["bytes"]).decode() == "a 漢"
    assert [token["logprob"] for token in content] == [-id_ / 1000 for id_ in encode("a 漢")]
    assert all(len(token["top_logprobs"]) == 2 for token in content)
    assert set(content[0]["top_logprobs"][0]) == {"token", "logprob", "bytes"}
    bare = (await chat(served, logprobs=True)).json()["choices"][0]["logprobs"]["content"]
    assert bare[0]["top_logprobs"] == []
    chunks = events(await chat(served, logprobs=True, stream=True))
    streamed = [token for chunk in chunks[:-1] for token in chunk["choices"][0]["logprobs"]["content"]]
    assert streamed == bare


# --- messages ---------------------------------------------------------------------------------------------


async def test_content_is_text_or_text_parts(served: Served) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    await chat(served, messages=[{"role": "system", "content": "S"}, {"role": "user", "content": parts}])
    assert sent_prompt(served) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\na\nb<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant", "tool"])
async def test_roles(served: Served, role: str) -> None:
    extra = {"tool_call_id": "call-1"} if role == "tool" else {}
    assert (await chat(served, messages=[{"role": role, "content": "x"} | extra])).status_code == 200


async def test_an_answers_message_can_be_sent_back(served: Served) -> None:
    message = (await chat(served)).json()["choices"][0]["message"]
    sent_back = message | {"annotations": [], "audio": None, "function_call": None, "tool_calls": None}
    assert (await chat(served, messages=[*HELLO, sent_back, *HELLO])).status_code == 200


@pytest.mark.parametrize("content", [None, []])
async def test_answers_and_results_of_tools_that_say_nothing_can_be_sent_back(served: Served, content: Any) -> None:
    silent = [{"role": "assistant", "content": content}, {"role": "tool", "tool_call_id": "c", "content": content}]
    response = await chat(served, messages=[*HELLO, *silent])
    assert response.status_code == 200, response.text
    given = sent_prompt(served)
    await chat(served, messages=[*HELLO, *({**message, "content": ""} for message in silent)])
    assert given == sent_prompt(served)


async def test_a_message_can_be_continued(served: Served) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "Once upon"}]
    await chat(served, messages=messages, continue_final_message=True, add_generation_prompt=False)
    assert sent_prompt(served) == PROMPT + "Once upon"
    await chat(served, add_generation_prompt=False)
    assert sent_prompt(served) == PROMPT.removesuffix("<|im_start|>assistant\n")


NO_OPS: dict[str, Any] = {
    "tools": [],
    "tool_choice": "none",
    "functions": [],
    "parallel_tool_calls": True,
    "response_format": {"type": "text"},
    "logprobs": False,
    "top_logprobs": 0,
    "modalities": ["text"],
    "store": False,
    "service_tier": "default",
    "metadata": {},
    "user": "x",
    "audio": None,
    "prediction": None,
    "max_tokens": None,
}


@pytest.mark.parametrize("name", NO_OPS)
async def test_fields_without_effect_are_accepted(served: Served, name: str) -> None:
    response = await chat(served, **{name: NO_OPS[name]})
    assert response.status_code == 200, response.text


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no messages": ({"messages": []}, "messages"),
    "messages missing": ({"messages": None}, "messages"),
    "messages text": ({"messages": "Hi"}, "messages"),
    "role": ({"messages": [{"role": "narrator", "content": "x"}]}, "messages.0.role"),
    "role missing": ({"messages": [{"content": "x"}]}, "messages.0.role"),
    "content missing": ({"messages": [{"role": "user"}]}, "messages.0.content"),
    "content number": ({"messages": [*HELLO, {"role": "user", "content": 5}]}, "messages.1.content"),
    "image": ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content"),
    "content null": ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
    "tool calls": ({"messages": [HELLO[0] | {"tool_calls": [{"id": "x"}]}]}, "messages.0.tool_calls.0.function"),
    "tool_choice": ({"tool_choice": "required"}, "tool_choice"),
    "response_format": ({"response_format": {"type": "xml"}}, "response_format"),
    "modalities": ({"modalities": ["text", "audio"]}, "modalities"),
    "max_tokens 0": ({"max_tokens": 0}, "max_tokens"),
    "max_completion_tokens 0": ({"max_completion_tokens": 0}, "max_completion_tokens"),
    "max_tokens twice": ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens"),
    "top_logprobs alone": ({"top_logprobs": 1}, "top_logprobs"),
    "top_logprobs 21": ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    "top_logprobs true": ({"logprobs": True, "top_logprobs": True}, "top_logprobs"),
    "logprobs number": ({"logprobs": 5}, "logprobs"),
    "prompt": ({"prompt": "Hi"}, "prompt"),
    "echo": ({"echo": True}, "echo"),
    "chat_template": ({"chat_template": "{{ 1 }}"}, "chat_template"),
    "chat_template in kwargs": ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs"),
    "tokenize in kwargs": ({"chat_template_kwargs": {"tokenize": False}}, "chat_template_kwargs"),
    "messages in kwargs": ({"chat_template_kwargs": {"messages": "x"}}, "chat_template_kwargs"),
    "deep kwargs": ({"chat_template_kwargs": {"x": {"chat_template": "y"}}}, "chat_template_kwargs"),
    "list in kwargs": ({"chat_template_kwargs": {"x": []}}, "chat_template_kwargs"),
    "kwargs text": ({"chat_template_kwargs": "x"}, "chat_template_kwargs"),
    "continue and prompt": ({"continue_final_message": True}, "continue_final_message"),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_refusals_name_the_field(served: Served, name: str) -> None:
    body, param = REFUSED[name]
    response = await chat(served, **body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert served.engine.requests == []


async def test_the_context_is_a_limit_with_numbers(served: Served) -> None:
    response = await chat(served, messages=[{"role": "user", "content": "漢" * 300}])
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "context_length_exceeded", "messages")
    assert "256" in error["message"]


async def test_adapters_answer_chats_too(served: Served, tmp_path: Path) -> None:
    digest = await served.add_adapter(tmp_path, "poet")
    response = await chat(served, model="poet")
    assert response.json()["system_fingerprint"] == digest
    assert response.json()["model"] == "poet"
