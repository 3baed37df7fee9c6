"""OpenAI's client of the first major version: chat, tools, files, a fine-tune, a batch."""

import io
import json
import time
from typing import Any

import openai
import pytest

ASK: Any = [{"role": "user", "content": "How many wings has an owl?"}]
WINGS: Any = {
    "type": "function",
    "function": {
        "name": "wings",
        "parameters": {"type": "object", "properties": {"bird": {"enum": ["owl", "parrot"]}}, "required": ["bird"]},
    },
}


@pytest.fixture(scope="module")
def client(api: str) -> Any:
    return openai.OpenAI(base_url=api, api_key="none", max_retries=0, timeout=120)


def _lines(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_chat_and_stream(client: Any, model: str) -> None:
    asked = {"model": model, "messages": ASK, "max_tokens": 8, "temperature": 0}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_tools(client: Any, model: str) -> None:
    choice = {"type": "function", "function": {"name": "wings"}}
    answer = client.chat.completions.create(model=model, messages=ASK, tools=[WINGS], tool_choice=choice, max_tokens=60)
    message = answer.choices[0].message
    (call,) = message.tool_calls
    assert set(json.loads(call.function.arguments)) == {"bird"}
    result = {"role": "tool", "tool_call_id": call.id, "content": "2"}
    client.chat.completions.create(model=model, messages=[*ASK, message, result], tools=[WINGS], max_tokens=8)


def test_refusals(client: Any, model: str) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="nobody", messages=ASK)
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model=model, messages=[{"role": "user", "content": "word " * 20_000}])
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="functions"):
        client.chat.completions.create(model=model, messages=ASK, functions=[WINGS["function"]])


def test_files_and_a_fine_tune(client: Any, model: str) -> None:
    example = {"messages": [*ASK, {"role": "assistant", "content": "Two."}]}
    file = client.files.create(file=io.BytesIO(_lines(*[example] * 12)), purpose="fine-tune")
    assert client.files.wait_for_processing(file.id).status == "processed"
    assert client.files.content(file.id).read().count(b"\n") == 12
    job = client.fine_tuning.jobs.create(
        model=model, training_file=file.id, suffix="old", hyperparameters={"n_epochs": 1, "batch_size": 4}
    )
    while job.status not in ("succeeded", "failed", "cancelled"):
        time.sleep(0.5)
        job = client.fine_tuning.jobs.retrieve(job.id)
    assert job.status == "succeeded"
    assert [event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=2)]
    assert job.id in [each.id for each in client.fine_tuning.jobs.list(limit=1)]
    assert client.chat.completions.create(model=job.fine_tuned_model, messages=ASK, max_tokens=2).choices
    assert client.models.delete(job.fine_tuned_model).deleted
    assert client.files.delete(file.id).deleted


def test_a_batch(client: Any, model: str) -> None:
    body = {"model": model, "messages": ASK, "max_tokens": 4}
    line = {"custom_id": "0", "method": "POST", "url": "/v1/chat/completions", "body": body}
    file = client.files.create(file=("batch.jsonl", _lines(line)), purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
    while batch.status not in ("completed", "failed"):
        time.sleep(0.2)
        batch = client.batches.retrieve(batch.id)
    assert batch.request_counts.completed == 1
    assert json.loads(client.files.content(batch.output_file_id).text)["custom_id"] == "0"
