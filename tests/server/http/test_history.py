"""Earlier answers, calls and results, in the forms that clients and other servers send."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.chats import sent_prompt
from tests.support.scripted import BASE, Served, serving

USER = {"role": "user", "content": "Hi"}
RESULT = {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path) as served:
        yield served


async def prompt_of(served: Served, path: str, **body: Any) -> str:
    response = await served.client.post(path, json={"model": BASE} | body)
    assert response.status_code == 200, response.text
    return sent_prompt(served)


async def chat(served: Served, *messages: dict[str, Any]) -> str:
    return await prompt_of(served, "/v1/chat/completions", messages=list(messages), max_tokens=5)


async def respond(served: Served, *items: dict[str, Any]) -> str:
    return await prompt_of(served, "/v1/responses", input=list(items), max_output_tokens=5)


def calling(arguments: Any) -> dict[str, Any]:
    function = {"name": "weather", "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"id": "call_1", "function": function}]}


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"city": "Rö", "days": [1, {"a": None}]}, '{"city": "Rö", "days": [1, {"a": null}]}'),
        ({}, "{}"),
        (None, "{}"),
    ],
)
async def test_arguments_may_be_the_object_itself_or_missing(served: Served, given: Any, told: str) -> None:
    """Chat templates want an object; some servers send no arguments for a function without parameters."""
    written = await chat(served, USER, calling(told), RESULT)
    assert f'"arguments": {told}' in written
    assert await chat(served, USER, calling(given), RESULT) == written
    call = {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": given}
    output = {"type": "function_call_output", "call_id": "call_1", "output": "sunny"}
    assert await respond(served, USER, call, output) == written


@pytest.mark.parametrize(
    "answer",
    [
        {"content": None, "refusal": "I will not."},
        {"content": "", "refusal": "I will not."},
        {"content": [{"type": "refusal", "refusal": "I will not."}]},
    ],
)
async def test_an_answer_that_is_a_refusal(served: Served, answer: dict[str, Any]) -> None:
    written = await chat(served, USER, {"role": "assistant", "content": "I will not."}, USER)
    assert await chat(served, USER, {"role": "assistant"} | answer, USER) == written


async def test_only_an_answer_is_a_refusal(served: Served) -> None:
    body = {"model": BASE, "messages": [USER | {"refusal": "No."}]}
    response = await served.client.post("/v1/chat/completions", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, "messages.0.refusal")


@pytest.mark.parametrize("kind", ["input_text", "output_text"])
async def test_parts_of_a_result(served: Served, kind: str) -> None:
    call = {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": "{}"}
    output: dict[str, Any] = {"type": "function_call_output", "call_id": "call_1", "output": "sunny"}
    written = await respond(served, USER, call, output)
    parts = [{"type": kind, "text": "sunny"}]
    assert await respond(served, USER, call, output | {"output": parts}) == written


async def test_text_between_calls_and_their_results_is_of_the_calls_message(served: Served) -> None:
    """The order in which an answer with text after its calls is streamed."""
    said: dict[str, Any] = {"role": "assistant", "content": [{"type": "output_text", "text": "I look."}]}
    call = {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "call_1", "output": "sunny"}
    written = await chat(served, USER, calling("{}") | {"content": "I look."}, RESULT)
    for items in ([said, call], [call, said]):
        assert await respond(served, USER, *items, output) == written
    later = await chat(served, USER, calling("{}"), RESULT, {"role": "assistant", "content": "I look."}, USER)
    assert await respond(served, USER, call, output, said, USER) == later
