"""agno's agents over chat, Responses and Messages: whole, streaming, structured, with a function."""

from typing import Any, Literal

import pytest
from agno.agent import Agent
from agno.models.anthropic import Claude
from agno.models.openai import OpenAIResponses
from agno.models.openai.like import OpenAILike
from agno.run.base import RunStatus
from pydantic import BaseModel


class Bird(BaseModel):
    colour: Literal["red", "green"]


def wings(bird: str) -> str:
    """How many wings a bird has."""
    return str(len(bird))


@pytest.fixture(params=["chat", "responses", "messages"])
def chat(request: pytest.FixtureRequest, url: str, api: str, model: str) -> Any:
    if request.param == "chat":
        return OpenAILike(id=model, base_url=api, api_key="none", max_tokens=24)
    if request.param == "responses":
        return OpenAIResponses(id=model, base_url=api, api_key="none", max_output_tokens=24)
    return Claude(id=model, api_key="none", max_tokens=24, client_params={"base_url": url})


def test_an_answer(chat: Any) -> None:
    answer = Agent(model=chat).run("Hello")
    assert answer.status == RunStatus.completed
    assert 0 < answer.metrics.output_tokens <= 24
    assert "".join(event.content or "" for event in Agent(model=chat).run("Hello", stream=True))


def test_structured_output(chat: Any) -> None:
    assert isinstance(Agent(model=chat, output_schema=Bird).run("Name a bird.").content, Bird)


def test_a_function(chat: Any) -> None:
    answer = Agent(model=chat, tools=[wings], tool_call_limit=1).run("How many wings has an owl?")
    assert answer.status == RunStatus.completed
