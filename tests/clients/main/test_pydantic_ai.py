"""pydantic-ai: text, all three kinds of structured output, tools, streaming."""

import asyncio
from typing import Literal

import pytest
from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput, PromptedOutput, ToolOutput
from pydantic_ai.exceptions import UnexpectedModelBehavior
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider


class Bird(BaseModel):
    name: str = Field(max_length=12)
    colour: Literal["red", "green"]


@pytest.fixture(scope="module")
def chat(api: str, model: str) -> OpenAIChatModel:
    return OpenAIChatModel(model, provider=OpenAIProvider(base_url=api, api_key="none"))


def test_text_and_stream(chat: OpenAIChatModel) -> None:
    agent = Agent(chat, instructions="Be brief.", model_settings={"max_tokens": 12})
    assert isinstance(agent.run_sync("Hello").output, str)

    async def stream() -> str:
        async with agent.run_stream("Hello") as result:
            return "".join([text async for text in result.stream_text(delta=True)])

    assert isinstance(asyncio.run(stream()), str)


@pytest.mark.parametrize("kind", [ToolOutput, NativeOutput])
def test_structured_output(chat: OpenAIChatModel, kind: type) -> None:
    agent = Agent(chat, output_type=kind(Bird), model_settings={"max_tokens": 100}, retries=2)
    assert isinstance(agent.run_sync("Name a bird.").output, Bird)


def test_prompted_output(chat: OpenAIChatModel) -> None:
    """Only the prompt asks for JSON of this shape, so the answer may differ; the requests must be accepted."""
    agent = Agent(chat, output_type=PromptedOutput(Bird), model_settings={"max_tokens": 60}, retries=1)
    try:
        assert isinstance(agent.run_sync("Name a bird.").output, Bird)
    except UnexpectedModelBehavior as fault:
        assert "retries" in str(fault).lower() or "token limit" in str(fault).lower()


def test_tools_beside_a_structured_answer(chat: OpenAIChatModel) -> None:
    agent = Agent(chat, output_type=ToolOutput(Bird), model_settings={"max_tokens": 100}, retries=3)
    called = []

    @agent.tool_plain
    def wings(bird: Literal["parrot", "owl"]) -> int:
        """How many wings a bird has."""
        called.append(bird)
        return 2

    try:
        assert isinstance(agent.run_sync("Name a bird.").output, Bird)
    except UnexpectedModelBehavior:  # it may call wings until the limit of retries
        assert called
