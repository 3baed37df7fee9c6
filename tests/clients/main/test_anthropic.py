"""anthropic: create, stream, tools, counting tokens; and litellm's bridge to it."""

from typing import Any

import anthropic
import litellm
import pytest

ASK: Any = [{"role": "user", "content": "How many wings has an owl?"}]
WINGS: Any = {
    "name": "wings",
    "description": "How many wings a bird has.",
    "input_schema": {
        "type": "object",
        "properties": {"bird": {"type": "string", "enum": ["owl", "parrot"]}},
        "required": ["bird"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def client(url: str) -> Any:
    return anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, timeout=120)


def test_create(client: Any, model: str) -> None:
    message = client.messages.create(model=model, max_tokens=12, system="Be brief.", messages=ASK)
    assert message.content[0].type == "text"
    assert message.stop_reason in ("end_turn", "max_tokens")
    assert 0 < message.usage.output_tokens <= 12


def test_stream(client: Any, model: str) -> None:
    whole = client.messages.create(model=model, max_tokens=12, messages=ASK, extra_body={"temperature": 0})
    with client.messages.stream(model=model, max_tokens=12, messages=ASK, extra_body={"temperature": 0}) as stream:
        text = "".join(stream.text_stream)
        last = stream.get_final_message()
    assert text == whole.content[0].text
    assert last.usage.output_tokens == whole.usage.output_tokens
    kinds = [event.type for event in client.messages.create(model=model, max_tokens=4, messages=ASK, stream=True)]
    assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")


def test_tools(client: Any, model: str) -> None:
    choice: Any = {"type": "tool", "name": "wings"}
    asked: Any = {"model": model, "max_tokens": 100, "messages": ASK, "tools": [WINGS], "tool_choice": choice}
    message = client.messages.create(**asked)
    (call,) = [block for block in message.content if block.type == "tool_use"]
    assert (message.stop_reason, call.name) == ("tool_use", "wings")
    assert call.input["bird"] in ("owl", "parrot")
    result: Any = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "2"}]}
    history: Any = [*ASK, {"role": "assistant", "content": message.content}, result]
    again = client.messages.create(model=model, max_tokens=12, messages=history, tools=[WINGS])
    assert again.stop_reason in ("end_turn", "max_tokens", "tool_use")
    with client.messages.stream(**asked) as stream:
        (call,) = [block for block in stream.get_final_message().content if block.type == "tool_use"]
    assert call.input["bird"] in ("owl", "parrot")


def test_count_tokens(client: Any, model: str) -> None:
    counted = client.messages.count_tokens(model=model, messages=ASK, system="Be brief.")
    used = client.messages.create(model=model, messages=ASK, system="Be brief.", max_tokens=1).usage
    assert counted.input_tokens == used.input_tokens + (used.cache_read_input_tokens or 0)


def test_stop_sequences(client: Any, model: str) -> None:
    message = client.messages.create(
        model=model, max_tokens=50, messages=ASK, stop_sequences=["e"], extra_body={"temperature": 0}
    )
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "e")


def test_refusals(client: Any, model: str) -> None:
    with pytest.raises(anthropic.NotFoundError):
        client.messages.create(model="nobody", max_tokens=1, messages=ASK)
    image: Any = [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "x"}}]}]
    with pytest.raises(anthropic.BadRequestError, match=r"messages\.0\.content\.0\.type"):
        client.messages.create(model=model, max_tokens=1, messages=image)


def test_litellm(url: str, model: str) -> None:
    common = {"model": f"anthropic/{model}", "api_base": url, "api_key": "none", "num_retries": 0, "timeout": 120}
    answer = litellm.completion(messages=ASK, max_tokens=8, **common)
    assert answer.choices[0].message.content
    chunks = list(litellm.completion(messages=ASK, max_tokens=8, stream=True, **common))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    function = {"name": "wings", "parameters": WINGS["input_schema"]}
    answer = litellm.completion(
        messages=ASK,
        max_tokens=100,
        tools=[{"type": "function", "function": function}],
        tool_choice="required",
        **common,
    )
    assert answer.choices[0].message.tool_calls[0].function.name == "wings"


def test_litellm_in_front_of_chat(api: str, model: str) -> None:
    """litellm's Anthropic bridge: Messages requests, sent as chat."""
    answer: Any = litellm.anthropic.messages.create(
        model=f"openai/{model}", messages=ASK, max_tokens=8, api_base=api, api_key="none"
    )
    assert answer["content"][0]["text"]
