"""openai-agents with its chat model: text, tools, structured output, streaming."""

import asyncio
from typing import Literal

import pytest
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from pydantic import BaseModel, Field

set_tracing_disabled(True)


class Bird(BaseModel):
    name: str = Field(max_length=12)
    colour: Literal["red", "green"]


@function_tool
def wings(bird: Literal["parrot", "owl"]) -> int:
    """How many wings a bird has."""
    return 2


@pytest.fixture
def chat(api: str, model: str) -> OpenAIChatCompletionsModel:
    return OpenAIChatCompletionsModel(model, AsyncOpenAI(base_url=api, api_key="none", max_retries=0))


def test_text(chat: OpenAIChatCompletionsModel) -> None:
    agent = Agent("plain", instructions="Be brief.", model=chat, model_settings=ModelSettings(max_tokens=12))
    assert isinstance(asyncio.run(Runner.run(agent, "Hello")).final_output, str)


def test_a_tool_and_then_an_answer(chat: OpenAIChatCompletionsModel) -> None:
    settings = ModelSettings(max_tokens=60, tool_choice="required", parallel_tool_calls=False)
    agent = Agent("tools", model=chat, tools=[wings], model_settings=settings, tool_use_behavior="stop_on_first_tool")
    result = asyncio.run(Runner.run(agent, "How many wings has an owl?", max_turns=2))
    assert "tool_call_output_item" in [item.type for item in result.new_items]


def test_structured_output(chat: OpenAIChatCompletionsModel) -> None:
    agent = Agent("bird", model=chat, output_type=Bird, model_settings=ModelSettings(max_tokens=100))
    assert isinstance(asyncio.run(Runner.run(agent, "Name a bird.")).final_output, Bird)


def test_streaming(chat: OpenAIChatCompletionsModel) -> None:
    async def stream() -> list[str]:
        agent = Agent("plain", model=chat, model_settings=ModelSettings(max_tokens=12))
        result = Runner.run_streamed(agent, "Hello")
        return [event.type async for event in result.stream_events()]

    assert "raw_response_event" in asyncio.run(stream())
