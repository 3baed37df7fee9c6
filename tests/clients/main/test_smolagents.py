"""smolagents: its model over OpenAI's client, whole, streaming, of a schema; an agent that calls functions."""

from typing import Any

import pytest
from smolagents import ActionStep, OpenAIModel, ToolCallingAgent, tool

HELLO: Any = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
SCHEMA = {
    "type": "object",
    "properties": {"wings": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["wings"],
    "additionalProperties": False,
}


@tool
def wings(bird: str) -> int:
    """How many wings a bird has.

    Args:
        bird: Its name.
    """
    return len(bird)


@pytest.fixture(scope="module")
def chat(api: str, model: str) -> OpenAIModel:
    return OpenAIModel(model_id=model, api_base=api, api_key="none", max_tokens=40)


def test_whole_and_streaming(chat: OpenAIModel) -> None:
    assert 0 < chat.generate(HELLO).token_usage.output_tokens <= 40
    *_, last = chat.generate_stream(HELLO)
    assert 0 < last.token_usage.output_tokens <= 40


def test_a_schema(chat: OpenAIModel) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "bird", "schema": SCHEMA, "strict": True}}
    assert chat.generate(HELLO, response_format=form).content.startswith('{"wings":')


def test_calls(chat: OpenAIModel) -> None:
    """It asks for a call with `tool_choice: required`; their number is the model's."""
    calls = chat.generate(HELLO, tools_to_call_from=[wings]).tool_calls
    assert {call.function.name for call in calls} == {"wings"}


def test_an_agent(chat: OpenAIModel) -> None:
    agent = ToolCallingAgent(tools=[wings], model=chat, max_steps=1, verbosity_level=0)
    agent.run("How many wings has an owl?")
    step, *_ = [step for step in agent.memory.steps if isinstance(step, ActionStep)]
    assert step.model_output_message is not None
