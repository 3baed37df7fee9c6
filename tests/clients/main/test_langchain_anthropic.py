"""langchain-anthropic: messages, streams, structured output, tools; LangChain's agents on it and on OpenAI's models."""

from typing import Any, Literal

import pytest
from langchain.agents import create_agent
from langchain.agents.structured_output import ToolStrategy
from langchain_anthropic import ChatAnthropic
from langchain_core.exceptions import ContextOverflowError
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.errors import GraphRecursionError
from pydantic import BaseModel


class Bird(BaseModel):
    """A bird."""

    colour: Literal["red", "green"]


@tool
def wings(bird: Literal["owl", "parrot"]) -> int:
    """How many wings a bird has."""
    return len(bird)


@pytest.fixture(scope="module")
def chat(url: str, model: str) -> ChatAnthropic:
    return ChatAnthropic(model=model, base_url=url, api_key="none", max_tokens=60, max_retries=0, timeout=120)


def test_messages_and_streams(chat: ChatAnthropic) -> None:
    short = chat.bind(max_tokens=8)
    assert short.invoke("Hello").content
    total: Any = None
    for chunk in short.stream("Hello"):
        total = chunk if total is None else total + chunk
    assert 0 < total.usage_metadata["output_tokens"] <= 8
    assert chat.get_num_tokens_from_messages([HumanMessage("Hello")], tools=[wings]) > 8


@pytest.mark.parametrize("method", ["function_calling", "json_schema"])
def test_structured_output(chat: ChatAnthropic, method: Any) -> None:
    assert isinstance(chat.with_structured_output(Bird, method=method).invoke("Name a bird."), Bird)


def test_tools(chat: ChatAnthropic) -> None:
    asked = chat.bind_tools([wings], tool_choice="wings", parallel_tool_calls=False).invoke("How many wings?")
    [call] = asked.tool_calls
    result = ToolMessage(str(wings.invoke(call["args"])), tool_call_id=call["id"])
    assert chat.bind_tools([wings]).invoke([HumanMessage("How many wings?"), asked, result]).response_metadata


@pytest.mark.parametrize("kind", ["messages", "chat", "responses"])
def test_agents(chat: ChatAnthropic, api: str, model: str, kind: str) -> None:
    """One that may call a function, and answers by calling another."""
    models: dict[str, BaseChatModel] = {"messages": chat}
    for name, responses in (("chat", False), ("responses", True)):
        models[name] = ChatOpenAI(
            base_url=api, api_key="none", model=model, max_tokens=60, max_retries=0, use_responses_api=responses
        )
    agent = create_agent(models[kind], [wings], response_format=ToolStrategy(Bird))
    try:
        answer = agent.invoke({"messages": [HumanMessage("Name a bird.")]}, {"recursion_limit": 6})
    except GraphRecursionError:  # a small model may well call the function for ever
        return
    assert isinstance(answer.get("structured_response"), Bird | None)


def test_a_prompt_that_is_too_long(chat: ChatAnthropic) -> None:
    with pytest.raises(ContextOverflowError):
        chat.invoke("word " * 20_000)
