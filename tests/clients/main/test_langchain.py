"""langchain-openai: invoke, stream, `with_structured_output` in all methods, `bind_tools`."""

from typing import Literal

import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, ConfigDict, Field


class Bird(BaseModel):
    """A bird."""

    model_config = ConfigDict(extra="forbid")  # with free extra members a small model may not finish the object

    name: str = Field(max_length=12)
    colour: Literal["red", "green"]


@tool
def wings(bird: Literal["parrot", "owl"]) -> int:
    """How many wings a bird has."""
    return len(bird)


@pytest.fixture(scope="module")
def chat(api: str, model: str) -> ChatOpenAI:
    return ChatOpenAI(
        base_url=api, api_key="none", model=model, max_tokens=100, max_retries=0, timeout=120, use_responses_api=False
    )


def test_invoke_stream_and_batch(chat: ChatOpenAI) -> None:
    short = chat.bind(max_tokens=8)
    assert isinstance(short.invoke("Hello").content, str)
    chunks = list(short.stream("Hello", stream_usage=True))
    assert sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata) > 0
    assert len(short.batch(["one", "two"])) == 2


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
@pytest.mark.parametrize("strict", [None, True])
def test_structured_output(chat: ChatOpenAI, method: str, strict: bool | None) -> None:
    asked = chat.with_structured_output(Bird, method=method, strict=strict)
    assert isinstance(asked.invoke("Name a bird."), Bird)


def test_json_mode(chat: ChatOpenAI) -> None:
    try:
        raw = chat.with_structured_output(method="json_mode", include_raw=True).invoke("Name a bird, in JSON.")
    except openai.LengthFinishReasonError:  # any object is valid, and a small model may not finish it
        return
    assert isinstance(raw["raw"], AIMessage)
    assert raw["parsing_error"] is None


def test_structured_output_streams(chat: ChatOpenAI) -> None:
    *_, last = chat.with_structured_output(Bird).stream("Name a bird.")
    assert isinstance(last, Bird)


@pytest.mark.parametrize("choice", ["any", "wings"])
def test_bound_tools(chat: ChatOpenAI, choice: str) -> None:
    bound = chat.bind_tools([wings], tool_choice=choice, parallel_tool_calls=False, strict=True)
    asked = bound.invoke("How many wings has an owl?")
    [call] = asked.tool_calls
    assert call["name"] == "wings"
    assert call["args"]["bird"] in ("parrot", "owl")
    result = ToolMessage(str(wings.invoke(call["args"])), tool_call_id=call["id"])
    free = chat.bind_tools([wings]).bind(max_tokens=12)
    assert isinstance(free.invoke([HumanMessage("How many wings?"), asked, result]), AIMessage)


def test_bound_tools_stream(chat: ChatOpenAI) -> None:
    total = None
    for chunk in chat.bind_tools([wings], tool_choice="any").stream("How many wings has an owl?"):
        total = chunk if total is None else total + chunk
    assert total.tool_calls[0]["name"] == "wings"


def test_completions(api: str, model: str) -> None:
    assert isinstance(OpenAI(base_url=api, api_key="none", model=model, max_tokens=4).invoke("Once upon"), str)
