"""openai-agents with its default model, over Responses: text, a tool, structured output, streaming.

It treats a response that `max_tokens` cut short as a failure, so the prompts ask for short ones.
"""

import asyncio
from typing import Any, Literal

import agents
import openai
import pytest
from pydantic import BaseModel, Field

agents.set_tracing_disabled(True)
SHORT = agents.ModelSettings(max_tokens=400, temperature=0)


class Bird(BaseModel):
    name: str = Field(max_length=12)
    colour: Literal["red", "green"]


def wings(bird: Literal["parrot", "owl"]) -> int:
    """How many wings a bird has."""
    return 2


@pytest.fixture
def responses(api: str, model: str) -> Any:
    return agents.OpenAIResponsesModel(model, openai.AsyncOpenAI(base_url=api, api_key="none", max_retries=0))


def test_text(responses: Any) -> None:
    agent = agents.Agent("plain", model=responses, model_settings=SHORT)
    assert isinstance(asyncio.run(agents.Runner.run(agent, "Hello")).final_output, str)


def test_a_tool(responses: Any) -> None:
    settings = agents.ModelSettings(max_tokens=200, tool_choice="required", parallel_tool_calls=False)
    agent = agents.Agent(
        "tools",
        model=responses,
        tools=[agents.function_tool(wings)],
        model_settings=settings,
        tool_use_behavior="stop_on_first_tool",
    )
    result = asyncio.run(agents.Runner.run(agent, "How many wings has an owl?", max_turns=8))
    assert "tool_call_output_item" in [item.type for item in result.new_items]


def test_structured_output(responses: Any) -> None:
    agent = agents.Agent("bird", model=responses, output_type=Bird, model_settings=SHORT)
    assert isinstance(asyncio.run(agents.Runner.run(agent, "Name a bird.")).final_output, Bird)


def test_streaming(responses: Any) -> None:
    async def stream() -> list[str]:
        agent = agents.Agent("plain", model=responses, model_settings=SHORT)
        result = agents.Runner.run_streamed(agent, "Hello")
        return [event.type async for event in result.stream_events()]

    assert "raw_response_event" in asyncio.run(stream())
