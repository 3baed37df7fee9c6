"""openai's Responses: create, stream, parse, tools, stored responses, background mode."""

import json
import time
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel, Field

WINGS = {
    "type": "function",
    "name": "wings",
    "description": "How many wings a bird has.",
    "parameters": {
        "type": "object",
        "properties": {"bird": {"type": "string", "enum": ["owl", "parrot"]}},
        "required": ["bird"],
        "additionalProperties": False,
    },
    "strict": True,
}


class Bird(BaseModel):
    name: str = Field(max_length=12)
    colour: Literal["red", "green"]


@pytest.fixture(scope="module")
def client(api: str) -> Any:
    return openai.OpenAI(base_url=api, api_key="none", max_retries=0, timeout=120)


def test_create_and_go_on(client: Any, model: str) -> None:
    first = client.responses.create(model=model, instructions="Be brief.", input="Hello", max_output_tokens=16)
    assert first.output_text
    assert first.usage is not None
    assert first.usage.output_tokens <= 16
    second = client.responses.create(
        model=model, input="Hello again", previous_response_id=first.id, max_output_tokens=8, temperature=0
    )
    assert second.previous_response_id == first.id
    whole = [{"role": "user", "content": "Hello"}, *first.output, {"role": "user", "content": "Hello again"}]
    same = client.responses.create(model=model, input=whole, max_output_tokens=8, temperature=0)
    assert same.output_text == second.output_text


def test_stream(client: Any, model: str) -> None:
    asked = {"model": model, "input": "Hello", "max_output_tokens": 12, "temperature": 0}
    whole = client.responses.create(**asked)
    events = list(client.responses.create(**asked, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text
    with client.responses.stream(**asked) as stream:
        for _ in stream:
            pass
        assert stream.get_final_response().output_text == text


def test_parse(client: Any, model: str) -> None:
    answer = client.responses.parse(model=model, input="Name a bird.", text_format=Bird, max_output_tokens=100)
    assert isinstance(answer.output_parsed, Bird)
    with client.responses.stream(model=model, input="Name a bird.", text_format=Bird, max_output_tokens=100) as stream:
        for _ in stream:
            pass
        assert isinstance(stream.get_final_response().output_parsed, Bird)


def test_tools(client: Any, model: str) -> None:
    history = [{"role": "user", "content": "How many wings has an owl?"}]
    answer = client.responses.create(
        model=model,
        input=history,
        tools=[WINGS],
        tool_choice="required",
        max_output_tokens=100,
    )
    calls = [item for item in answer.output if item.type == "function_call"]
    assert {call.name for call in calls} == {"wings"}
    assert json.loads(calls[0].arguments)["bird"] in ("owl", "parrot")
    outputs = [{"type": "function_call_output", "call_id": call.call_id, "output": "2"} for call in calls]
    again = client.responses.create(
        model=model,
        input=[*history, *answer.output, *outputs],
        tools=[WINGS],
        max_output_tokens=12,
    )
    assert again.status in ("completed", "incomplete")
    asked = {
        "model": model,
        "input": history,
        "tools": [WINGS],
        "tool_choice": "required",
        "parallel_tool_calls": False,
    }
    with client.responses.stream(**asked) as stream:
        deltas = [event.delta for event in stream if event.type == "response.function_call_arguments.delta"]
        calls = [item for item in stream.get_final_response().output if item.type == "function_call"]
    assert "".join(deltas) == "".join(call.arguments for call in calls)


def test_logprobs(client: Any, model: str) -> None:
    answer = client.responses.create(
        model=model,
        input="Hello",
        max_output_tokens=4,
        top_logprobs=2,
        include=["message.output_text.logprobs"],
    )
    (content,) = answer.output[0].content
    assert len(content.logprobs) >= 3
    assert len(content.logprobs[0].top_logprobs) == 2


def test_kept_ones(client: Any, model: str) -> None:
    made = client.responses.create(model=model, input="Hello", max_output_tokens=4, metadata={"a": "b"})
    assert client.responses.retrieve(made.id) == made
    (item,) = client.responses.input_items.list(made.id)
    assert item.content[0].text == "Hello"
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)


def test_the_background(client: Any, model: str) -> None:
    made = client.responses.create(model=model, input="Count to ten.", max_output_tokens=12, background=True)
    assert made.status == "in_progress"
    while (found := client.responses.retrieve(made.id)).status == "in_progress":
        time.sleep(0.1)
    assert found.status in ("completed", "incomplete")
    long = client.responses.create(model=model, input="Tell a very long story.", background=True)
    assert client.responses.cancel(long.id).status in ("cancelled", "completed")
    stream = client.responses.create(model=model, input="Hello", max_output_tokens=8, background=True, stream=True)
    events = list(stream)
    id_ = events[0].response.id
    again = list(client.responses.retrieve(id_, stream=True, starting_after=3))
    assert again == events[4:]


def test_refusals(client: Any, model: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(model=model, input="x", tools=[{"type": "web_search"}])
    assert refused.value.param == "tools.0.type"
