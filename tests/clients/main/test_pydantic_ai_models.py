"""pydantic-ai's models of Responses and of Anthropic's Messages."""

import asyncio
from typing import Any, Literal

import pytest
from pydantic import BaseModel
from pydantic_ai import Agent, ToolOutput
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider


class Bird(BaseModel):
    colour: Literal["red", "green"]


@pytest.fixture(params=["responses", "messages"])
def chat(request: pytest.FixtureRequest, url: str, api: str, model: str) -> Any:
    if request.param == "responses":
        return OpenAIResponsesModel(model, provider=OpenAIProvider(base_url=api, api_key="none"))
    return AnthropicModel(model, provider=AnthropicProvider(base_url=url, api_key="none"))


def test_text_and_stream(chat: Any) -> None:
    agent = Agent(chat, instructions="Be brief.", model_settings={"max_tokens": 12})
    answer = agent.run_sync("Hello")
    assert 0 < answer.usage.output_tokens <= 12

    async def stream() -> str:
        async with agent.run_stream("Hello") as result:
            return "".join([text async for text in result.stream_text(delta=True)])

    assert asyncio.run(stream())


def test_structured_output_and_going_on(chat: Any) -> None:
    agent = Agent(chat, output_type=ToolOutput(Bird), model_settings={"max_tokens": 60}, retries=2)
    answer = agent.run_sync("Name a bird.")
    assert isinstance(answer.output, Bird)
    assert isinstance(agent.run_sync("Another.", message_history=answer.all_messages()).output, Bird)


def test_a_prompt_that_is_too_long(chat: Any) -> None:
    with pytest.raises(ModelHTTPError):
        Agent(chat, model_settings={"max_tokens": 12}).run_sync("word " * 20_000)
