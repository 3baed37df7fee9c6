"""Haystack: its generators over chat and Responses, whole, streaming, structured, with functions."""

import json
from typing import Annotated, Any

import pytest
from haystack.components.agents import Agent
from haystack.components.generators.chat import OpenAIChatGenerator, OpenAIResponsesChatGenerator
from haystack.dataclasses import ChatMessage
from haystack.tools import tool
from haystack.utils import Secret
from pydantic import BaseModel, Field

HELLO = [ChatMessage.from_user("How many wings has an owl?")]


class Bird(BaseModel):
    wings: int = Field(ge=0, le=9)


@tool
def wings(bird: Annotated[str, "the bird's name"]) -> str:
    """How many wings a bird has."""
    return str(len(bird))


@pytest.fixture(params=[OpenAIChatGenerator, OpenAIResponsesChatGenerator])
def make(request: pytest.FixtureRequest, api: str, model: str) -> Any:
    most = "max_tokens" if request.param is OpenAIChatGenerator else "max_output_tokens"

    def of(**more: Any) -> Any:
        given = {most: 40} | more
        return request.param(
            model=model, api_base_url=api, api_key=Secret.from_token("none"), generation_kwargs=given, max_retries=0
        )

    return of


def test_an_answer(make: Any) -> None:
    assert make().run(HELLO)["replies"][0].text
    pieces: list[str] = []
    whole = make().run(HELLO, streaming_callback=lambda chunk: pieces.append(chunk.content))["replies"][0].text
    assert "".join(pieces) == whole


def test_structured_output(make: Any) -> None:
    field = "response_format" if isinstance(make(), OpenAIChatGenerator) else "text_format"
    Bird.model_validate(json.loads(make(**{field: Bird}).run(HELLO)["replies"][0].text))


def test_functions(make: Any) -> None:
    asked = make(tool_choice="required", parallel_tool_calls=False).run(HELLO, tools=[wings])["replies"][0]
    (call,) = asked.tool_calls
    assert set(call.arguments) == {"bird"}
    result = ChatMessage.from_tool("2", origin=call)
    assert make().run([*HELLO, asked, result], tools=[wings])["replies"]


def test_an_agent(make: Any) -> None:
    messages = Agent(chat_generator=make(), tools=[wings], max_agent_steps=2).run(HELLO)["messages"]
    assert messages[-1].role in ("assistant", "tool")
