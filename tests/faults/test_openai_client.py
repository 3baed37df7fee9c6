"""The openai client against a real server: its requests are understood, and the responses fit its types."""

import asyncio
import json
from collections.abc import Iterator

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam
from pydantic import BaseModel, Field

from tests.faults.conftest import ADAPTERS, Files
from tests.support.running import BASE, RunningServer, eventually

PROMPT = "The quick brown fox"
TOKENS = 48


@pytest.fixture
def client(server: RunningServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=180)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [BASE, *sorted(ADAPTERS)]
    assert client.models.retrieve("red").object == "model"


def test_completions_and_their_logprobs(client: openai.OpenAI, server: RunningServer) -> None:
    digest = server.get("/v1/adapters/red").json()["digest"]
    answer = client.completions.create(model="red", prompt=PROMPT, max_tokens=4, temperature=0, echo=True, logprobs=2)
    assert answer.system_fingerprint == digest
    choice, usage = answer.choices[0], answer.usage
    assert choice.text.startswith(PROMPT)
    assert choice.logprobs is not None
    assert usage is not None
    values: list[float | None] = list(choice.logprobs.token_logprobs or [])
    assert len(values) == usage.prompt_tokens + usage.completion_tokens
    assert values[0] is None
    assert all(value is not None and value <= 0 for value in values[1:])
    named = client.completions.create(
        model=BASE, prompt=PROMPT, max_tokens=4, temperature=0, extra_body={"adapter_id": f"red@{digest[7:15]}"}
    )
    assert choice.text == PROMPT + named.choices[0].text


def test_a_streamed_chat_says_what_the_whole_one_does(client: openai.OpenAI) -> None:
    def ask(**more: object) -> dict[str, object]:
        return {"model": "green", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 12, "seed": 3} | more

    whole = client.chat.completions.create(**ask(n=2))  # type: ignore[call-overload]
    chunks = list(client.chat.completions.create(**ask(n=2, stream=True, stream_options={"include_usage": True})))  # type: ignore[call-overload]
    for choice in whole.choices:
        deltas = [c.delta.content or "" for chunk in chunks for c in chunk.choices if c.index == choice.index]
        assert "".join(deltas) == choice.message.content
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


class Parrot(BaseModel):
    name: str = Field(max_length=6)
    age: int = Field(ge=0, le=99)


def test_parse_gives_objects_and_a_hostile_schema_harms_nobody(client: openai.OpenAI, server: RunningServer) -> None:
    engine = server.engine_pid
    messages: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]
    answer = client.chat.completions.parse(
        model="red", messages=messages, response_format=Parrot, max_tokens=60, seed=1
    )
    assert isinstance(answer.choices[0].message.parsed, Parrot)
    links = {f"a{i}": {"$ref": f"#/$defs/a{i + 1}"} for i in range(20_000)}  # overflows llguidance's stack
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(
            model=BASE, prompt=PROMPT, extra_body={"guided_json": {"$ref": "#/$defs/a0", "$defs": links}}, stream=True
        )
    assert refused.value.code == "invalid_grammar"
    assert "/$defs" in refused.value.message
    assert server.engine_pid == engine


def test_errors_are_the_clients_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="nobody", prompt=PROMPT)
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=BASE, prompt=[5] * 5000)
    assert long.value.code == "context_length_exceeded"


def steps_of_eight(server: RunningServer) -> float:
    below, up_to = (server.metric("engine_step_adapters_bucket", le=bound) for bound in ("7.0", "8.0"))
    return up_to - below


@pytest.fixture
def eight(server: RunningServer, made: Files) -> Iterator[list[str]]:
    """Names of eight adapters with different outputs."""
    config = json.loads((made.adapters["red"] / "adapter_config.json").read_bytes())
    weights = (made.adapters["red"] / "adapter_model.safetensors").read_bytes()
    names = [f"eight-{i}" for i in range(8)]
    for i, name in enumerate(names):
        files = {"config": json.dumps(config | {"lora_alpha": 4 * (i + 1)}).encode(), "weights": weights}
        uploaded = httpx.post(f"{server.url}/v1/adapters", data={"name": name}, files=files, timeout=180)
        assert uploaded.status_code == 201
    yield names
    for name in names:
        assert server.delete(f"/v1/adapters/{name}").status_code == 200


async def test_eight_streams_of_eight_adapters_share_steps(server: RunningServer, eight: list[str]) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=180) as client:

        async def say(name: str) -> str:
            stream = await client.completions.create(
                model=name,
                prompt=PROMPT,
                max_tokens=TOKENS,
                temperature=0,
                stream=True,
                extra_body={"ignore_eos": True},
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

        alone = [await say(name) for name in eight]
        assert len(set(alone)) == len(eight)
        before = steps_of_eight(server)
        with server.slowed():  # until all eight are in one batch
            together = [asyncio.create_task(say(name)) for name in eight]
            await asyncio.to_thread(
                eventually, lambda: steps_of_eight(server) > before, 180, "a step with all eight adapters"
            )
        assert await asyncio.gather(*together) == alone
