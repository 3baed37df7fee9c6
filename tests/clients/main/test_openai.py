"""OpenAI's own client: chat, parse, tools, streaming helpers, legacy completions, models."""

from enum import Enum
from typing import Any

import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel, Field

ASK = [{"role": "user", "content": "What is the weather in Paris?"}]


class Sky(str, Enum):
    clear = "clear"
    cloudy = "cloudy"


class Weather(BaseModel):
    """The weather in a city."""

    city: str = Field(max_length=12)
    sky: Sky
    celsius: int = Field(ge=-99, le=99)


@pytest.fixture(scope="module")
def client(api: str) -> OpenAI:
    return OpenAI(base_url=api, api_key="none", max_retries=0, timeout=120)


def test_chat_and_stream(client: OpenAI, model: str) -> None:
    whole = client.chat.completions.create(model=model, messages=ASK, max_completion_tokens=12, seed=1, temperature=0)
    stream = client.chat.completions.create(
        model=model,
        messages=ASK,
        max_completion_tokens=12,
        seed=1,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_parse(client: OpenAI, model: str) -> None:
    answer = client.chat.completions.parse(model=model, messages=ASK, response_format=Weather, max_tokens=80)
    assert isinstance(answer.choices[0].message.parsed, Weather)


def test_the_stream_helper(client: OpenAI, model: str) -> None:
    seen = set()
    with client.chat.completions.stream(
        model=model, messages=ASK, response_format=Weather, max_tokens=80, stream_options={"include_usage": True}
    ) as stream:
        for event in stream:
            seen.add(event.type)
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= seen
    assert isinstance(final.choices[0].message.parsed, Weather)


def _tool() -> dict[str, Any]:
    return openai.pydantic_function_tool(Weather, name="report")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "report"}}])
def test_tools_are_called_and_their_results_read(client: OpenAI, model: str, choice: Any) -> None:
    asked = client.chat.completions.parse(
        model=model, messages=ASK, tools=[_tool()], tool_choice=choice, max_tokens=120, parallel_tool_calls=False
    )
    message = asked.choices[0].message
    [call] = message.tool_calls
    assert isinstance(call.function.parsed_arguments, Weather)
    assert asked.choices[0].finish_reason == ("tool_calls" if choice == "required" else asked.choices[0].finish_reason)
    history = [*ASK, message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    again = client.chat.completions.create(model=model, messages=history, tools=[_tool()], max_tokens=16)
    assert again.choices[0].message.role == "assistant"


def test_tools_in_the_stream_helper(client: OpenAI, model: str) -> None:
    with client.chat.completions.stream(
        model=model, messages=ASK, tools=[_tool()], tool_choice="required", max_tokens=120, parallel_tool_calls=False
    ) as stream:
        done = [event for event in stream if event.type == "tool_calls.function.arguments.done"]
    [event] = done
    assert event.name == "report"
    assert isinstance(event.parsed_arguments, Weather)


def test_legacy_completions(client: OpenAI, model: str) -> None:
    answer = client.completions.create(model=model, prompt=["Once upon", "A bird"], max_tokens=4, logprobs=2, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert len(answer.choices[0].logprobs.tokens) <= 4
    streamed = client.completions.create(model=model, prompt="Once upon", max_tokens=4, stream=True)
    assert all(chunk.object == "text_completion" for chunk in streamed)


def test_models_and_errors(client: OpenAI, model: str) -> None:
    assert model in [one.id for one in client.models.list()]
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nobody", messages=ASK, max_tokens=1)
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model=model, messages=ASK, max_tokens=1, temperature=9)


async def _ask(api: str, model: str) -> str:
    async with openai.AsyncOpenAI(base_url=api, api_key="none") as client:
        answer = await client.chat.completions.create(model=model, messages=ASK, max_tokens=4)
    return answer.choices[0].message.role


def test_the_asynchronous_client(api: str, model: str) -> None:
    import asyncio

    assert asyncio.run(_ask(api, model)) == "assistant"
