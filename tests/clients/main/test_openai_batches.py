"""OpenAI's own client: a batch from its file to its results, a batch with a faulty line, and a cancelled batch."""

import json
import time
from typing import Any

import openai
import pytest
from openai import OpenAI


@pytest.fixture(scope="module")
def client(api: str) -> OpenAI:
    return OpenAI(base_url=api, api_key="none", max_retries=0, timeout=120)


def _begin(client: OpenAI, endpoint: str, bodies: list[dict[str, Any]]) -> Any:
    """Create a batch of these requests."""
    lines = [
        json.dumps({"custom_id": str(number), "method": "POST", "url": endpoint, "body": body})
        for number, body in enumerate(bodies)
    ]
    file = client.files.create(file=("requests.jsonl", "\n".join(lines).encode()), purpose="batch")
    assert file.purpose == "batch"
    made = client.batches.create(
        input_file_id=file.id, endpoint=endpoint, completion_window="24h", metadata={"of": "this test"}
    )
    assert (made.object, made.input_file_id, made.metadata) == ("batch", file.id, {"of": "this test"})
    return made


def _ended(client: OpenAI, id_: str) -> Any:
    """The batch once it has ended."""
    while (batch := client.batches.retrieve(id_)).status not in ("completed", "failed", "expired", "cancelled"):
        time.sleep(0.2)
    return batch


def _lines(client: OpenAI, file_id: str) -> dict[str, Any]:
    """The lines of a result file by `custom_id`."""
    return {line["custom_id"]: line for line in map(json.loads, client.files.content(file_id).content.splitlines())}


def _asked(endpoint: str, model: str) -> dict[str, Any]:
    """A request body for the endpoint."""
    short: dict[str, Any] = {"model": model, "temperature": 0}
    if endpoint == "/v1/responses":
        return short | {"input": "Name a bird.", "max_output_tokens": 6}
    if endpoint == "/v1/completions":
        return short | {"prompt": "Once upon", "max_tokens": 6}
    return short | {"messages": [{"role": "user", "content": "Name a bird."}], "max_tokens": 6}


@pytest.mark.parametrize("endpoint", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
def test_answers_and_refusals(client: OpenAI, model: str, endpoint: str) -> None:
    asked = _asked(endpoint, model)
    made = _begin(client, endpoint, [asked, asked, asked | {"model": "nobody"}])
    batch = _ended(client, made.id)
    assert (batch.status, batch.errors) == ("completed", None)
    assert (batch.request_counts.total, batch.request_counts.completed, batch.request_counts.failed) == (3, 2, 1)
    answers = _lines(client, batch.output_file_id)
    assert sorted(answers) == ["0", "1"]
    assert {line["response"]["status_code"] for line in answers.values()} == {200}
    told = [line["response"]["body"] for line in answers.values()]
    now = {
        "/v1/chat/completions": client.chat.completions,
        "/v1/completions": client.completions,
        "/v1/responses": client.responses,
    }[endpoint].create(**asked)
    if endpoint == "/v1/responses":
        assert [body["output"][0]["content"][0]["text"] for body in told] == [now.output_text] * 2
    elif endpoint == "/v1/completions":
        assert [body["choices"][0]["text"] for body in told] == [now.choices[0].text] * 2
    else:
        assert [body["choices"][0]["message"]["content"] for body in told] == [now.choices[0].message.content] * 2
    refused = _lines(client, batch.error_file_id)
    assert refused["2"]["response"]["status_code"] == 404
    assert batch.id in [one.id for one in client.batches.list()]


def test_a_file_with_a_fault(client: OpenAI, model: str) -> None:
    asked = _asked("/v1/chat/completions", model)
    batch = _ended(client, _begin(client, "/v1/chat/completions", [asked, asked | {"stream": True}]).id)
    assert batch.status == "failed"
    assert [fault.line for fault in batch.errors.data] == [2]
    with pytest.raises(openai.BadRequestError) as refused:
        client.batches.create(input_file_id="file-none", endpoint="/v1/completions", completion_window="24h")
    assert refused.value.param == "input_file_id"


def test_cancelling(client: OpenAI, model: str) -> None:
    long = {"model": model, "prompt": "Once upon", "max_tokens": 2000, "ignore_eos": True}
    made = _begin(client, "/v1/completions", [long] * 20)
    assert client.batches.cancel(made.id).status in ("cancelling", "cancelled")
    batch = _ended(client, made.id)
    assert batch.status == "cancelled"
    assert batch.cancelled_at
