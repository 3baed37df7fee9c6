"""litellm: chat, streaming, tools, structured output, text completion, as the providers OpenAI and hosted vLLM."""

from typing import Any, Literal

import litellm
import pytest
from pydantic import BaseModel, Field

ASK = [{"role": "user", "content": "Name a bird."}]
TOOL = {
    "type": "function",
    "function": {
        "name": "wings",
        "parameters": {
            "type": "object",
            "properties": {"bird": {"enum": ["owl", "parrot"]}},
            "required": ["bird"],
            "additionalProperties": False,
        },
    },
}


class Bird(BaseModel):
    name: str = Field(max_length=12)
    colour: Literal["red", "green"]


@pytest.fixture(params=["openai", "hosted_vllm"])
def common(request: pytest.FixtureRequest, api: str, model: str) -> dict[str, Any]:
    return {"model": f"{request.param}/{model}", "api_base": api, "api_key": "none", "num_retries": 0, "timeout": 120}


def test_chat_and_stream(common: dict[str, Any]) -> None:
    whole = litellm.completion(messages=ASK, max_tokens=8, temperature=0, **common)
    chunks = list(litellm.completion(messages=ASK, max_tokens=8, temperature=0, stream=True, **common))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content


def test_structured_output(common: dict[str, Any]) -> None:
    answer = litellm.completion(messages=ASK, response_format=Bird, max_tokens=80, **common)
    Bird.model_validate_json(answer.choices[0].message.content)


def test_tools(common: dict[str, Any]) -> None:
    answer = litellm.completion(
        messages=ASK, tools=[TOOL], tool_choice="required", parallel_tool_calls=False, max_tokens=80, **common
    )
    message = answer.choices[0].message
    assert message.tool_calls[0].function.name == "wings"
    replies = [{"role": "tool", "tool_call_id": call.id, "content": "2"} for call in message.tool_calls]
    litellm.completion(messages=[*ASK, message.model_dump(), *replies], tools=[TOOL], max_tokens=8, **common)


def test_text_completion(api: str, model: str) -> None:
    answer = litellm.text_completion(
        model=f"text-completion-openai/{model}", prompt="Once upon", max_tokens=4, api_base=api, api_key="none"
    )
    assert answer.choices[0].finish_reason in ("length", "stop")
