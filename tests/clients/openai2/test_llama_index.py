"""llama-index with its OpenAI-like model: chat, completion, streaming, tools, structured output."""

from typing import Literal

import pytest
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, Field


class Bird(BaseModel):
    """A bird."""

    name: str = Field(max_length=12)
    colour: Literal["red", "green"]


def wings(bird: Literal["owl", "parrot"]) -> int:
    """How many wings a bird has."""
    return 2


@pytest.fixture(scope="module")
def chat(api: str, model: str) -> OpenAILike:
    return OpenAILike(
        model=model,
        api_base=api,
        api_key="none",
        is_chat_model=True,
        is_function_calling_model=True,
        should_use_structured_outputs=True,
        max_tokens=100,
        max_retries=0,
    )


def test_chat_and_stream(chat: OpenAILike) -> None:
    ask = [ChatMessage(role="user", content="Hello")]
    assert chat.chat(ask, max_tokens=8).message.role == "assistant"
    assert list(chat.stream_chat(ask, max_tokens=8))


def test_completion(chat: OpenAILike, api: str, model: str) -> None:
    legacy = OpenAILike(model=model, api_base=api, api_key="none", is_chat_model=False, max_tokens=4)
    assert isinstance(legacy.complete("Once upon").text, str)
    assert list(legacy.stream_complete("Once upon"))


def test_tools(chat: OpenAILike) -> None:
    tool = FunctionTool.from_defaults(wings)
    answer = chat.chat_with_tools([tool], user_msg="How many wings has an owl?", tool_required=True)
    assert chat.get_tool_calls_from_response(answer)[0].tool_name == "wings"
    result = chat.predict_and_call([tool], user_msg="How many wings has an owl?", tool_required=True)
    assert str(result) == "2"


def test_structured_output(chat: OpenAILike) -> None:
    answer = chat.as_structured_llm(Bird).chat([ChatMessage(role="user", content="Name a bird.")])
    assert isinstance(answer.raw, Bird)
