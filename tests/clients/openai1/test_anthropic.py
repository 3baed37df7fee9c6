"""anthropic of 2024: create, stream, tools, caching and counting in its beta."""

from typing import Any

import anthropic
import pytest

ASK: Any = [{"role": "user", "content": "How many wings has an owl?"}]
SCHEMA = {"type": "object", "properties": {"bird": {"type": "string", "enum": ["owl", "parrot"]}}, "required": ["bird"]}
WINGS: Any = {"name": "wings", "description": "How many wings a bird has.", "input_schema": SCHEMA}


@pytest.fixture(scope="module")
def client(url: str) -> Any:
    return anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, timeout=120)


def test_create_and_stream(client: Any, model: str) -> None:
    asked: Any = {"model": model, "max_tokens": 8, "messages": ASK, "temperature": 0}
    whole = client.messages.create(**asked)
    with client.messages.stream(**asked) as stream:
        assert "".join(stream.text_stream) == whole.content[0].text
        assert stream.get_final_message().usage.output_tokens == whole.usage.output_tokens


def test_tools(client: Any, model: str) -> None:
    choice = {"type": "tool", "name": "wings"}
    message = client.messages.create(model=model, max_tokens=60, messages=ASK, tools=[WINGS], tool_choice=choice)
    (call,) = message.content
    assert set(call.input) == {"bird"}
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "2"}]}
    history = [*ASK, {"role": "assistant", "content": message.content}, result]
    assert client.messages.create(model=model, max_tokens=8, messages=history, tools=[WINGS]).content


def test_the_beta(client: Any, model: str) -> None:
    cached: Any = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    usage = client.beta.prompt_caching.messages.create(model=model, max_tokens=4, messages=ASK, system=cached).usage
    counted = client.beta.messages.count_tokens(model=model, messages=ASK, system="Be brief.").input_tokens
    assert usage.input_tokens + usage.cache_read_input_tokens == counted


def test_a_prompt_that_is_too_long(client: Any, model: str) -> None:
    long: Any = [{"role": "user", "content": "word " * 20_000}]
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long: "):
        client.messages.create(model=model, max_tokens=4, messages=long)
