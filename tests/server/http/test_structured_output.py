"""Structured output through both endpoints, also with the openai client: a real engine in a whole application."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from enum import StrEnum
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from pydantic import BaseModel, Field

from server.engine.engine import Engine
from server.messages.protocol import Generate, Grammar, Output
from tests.support.completions import complete, events, joined
from tests.support.offline import load_engine
from tests.support.scripted import BASE, ScriptedEngine, Served, serving

HELLO: list[Any] = [{"role": "user", "content": "Hi"}]


class Taste(StrEnum):
    SEEDS = "seeds"
    FRUIT = "fruit"


class Parrot(BaseModel):
    name: str = Field(max_length=8)
    age: int = Field(ge=0, le=99)
    taste: Taste
    mate: "Parrot | None"


class FollowingEngine(ScriptedEngine):
    """A real engine, stepped by each waiting request."""

    engine: Engine
    arrived: dict[str, list[Output]]

    async def generate(self, request: Generate) -> AsyncGenerator[Output, None]:
        self.requests.append(request)
        self.engine.add(request)
        self.arrived[request.id] = []
        while True:
            await asyncio.sleep(0)
            for output in self.engine.step()[0]:
                self.arrived[output.id].append(output)
            arrived, self.arrived[request.id] = self.arrived[request.id], []
            for output in arrived:
                yield output
                if output.finish_reason is not None or output.error is not None:
                    return


@pytest.fixture(scope="module")
def engine(model_dir: Path, cache_dir: Path) -> Engine:
    return load_engine(model_dir, cache_dir, max_model_len=256)


@pytest.fixture
async def served(tmp_path: Path, engine: Engine) -> AsyncIterator[Served]:
    kind = type("Following", (FollowingEngine,), {"engine": engine, "arrived": {}})
    async with serving(tmp_path, engine=kind) as served:
        yield served


@pytest.fixture
def client(served: Served) -> openai.AsyncOpenAI:
    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(served.app))
    return openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", max_retries=0, http_client=http)


async def test_openais_parse_gives_objects(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.parse(
        model=BASE,
        messages=HELLO,
        response_format=Parrot,
        n=3,
        seed=1,
        temperature=1.5,
        max_tokens=200,
    )
    parsed = [choice.message.parsed for choice in answer.choices if choice.finish_reason == "stop"]
    assert parsed
    assert all(isinstance(parrot, Parrot) for parrot in parsed)
    assert len({parrot.model_dump_json() for parrot in parsed if parrot}) == len(parsed)


async def test_a_stream_says_the_same_as_the_whole_answer(served: Served, client: openai.AsyncOpenAI) -> None:
    asked: dict[str, Any] = {"model": BASE, "messages": HELLO, "seed": 4, "temperature": 1.5, "max_tokens": 200}
    whole = await client.chat.completions.parse(**asked, response_format=Parrot)
    async with client.chat.completions.stream(**asked, response_format=Parrot) as stream:
        async for _ in stream:
            pass
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == whole.choices[0].message.content
    assert final.choices[0].message.parsed == whole.choices[0].message.parsed


@pytest.mark.parametrize(
    ("body", "allowed"),
    [
        ({"structured_outputs": {"choice": ["yes", "no"]}}, {"yes", "no"}),
        ({"guided_regex": "[ab]c"}, {"ac", "bc"}),
        ({"structured_outputs": {"json": {"enum": ["x", 5]}}}, {'"x"', "5"}),
        ({"structured_outputs": {"grammar": 'start: "x" | "y"'}}, {"x", "y"}),
    ],
)
async def test_completions_follow_too(body: dict[str, Any], allowed: set[str], served: Served) -> None:
    response = await complete(served, n=2, **body)
    assert {choice["text"] for choice in response.json()["choices"]} <= allowed
    assert {choice["finish_reason"] for choice in response.json()["choices"]} == {"stop"}
    assert joined(events(await complete(served, stream=True, **body))) in allowed


async def test_any_json_object_and_a_stop_string(served: Served) -> None:
    response = await complete(served, response_format={"type": "json_object"}, stop=[","], seed=2)
    choice = response.json()["choices"][0]
    assert choice["text"].startswith("{")
    assert "," not in choice["text"]


async def test_max_tokens_in_the_middle_is_no_fault(served: Served) -> None:
    schema = Parrot.model_json_schema()
    response = await complete(served, guided_json=schema, max_tokens=4, logprobs=1)
    choice = response.json()["choices"][0]
    assert (response.status_code, choice["finish_reason"]) == (200, "length")
    assert '{"name":"'.startswith(choice["text"])
    assert len(choice["logprobs"]["tokens"]) == 4


@pytest.mark.parametrize("stream", [False, True])
async def test_what_cannot_be_followed_is_refused_before_a_stream_begins(stream: bool, served: Served) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    format_ = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = {"model": BASE, "messages": HELLO, "response_format": format_, "stream": stream}
    response = await served.client.post("/v1/chat/completions", json=body)
    error = response.json()["error"]
    assert response.status_code == 400
    assert (error["type"], error["code"]) == ("invalid_request_error", "invalid_grammar")
    assert "/properties/a/uniqueItems" in error["message"]
    assert error["param"] == "response_format.json_schema.schema.properties.a.uniqueItems"
    assert served.engine.requests == []


@pytest.mark.parametrize("stream", [False, True])
async def test_a_grammar_that_only_the_engine_can_refuse_is_a_400(stream: bool, served: Served) -> None:
    response = await complete(served, guided_grammar="start: <|no_such_token|>", stream=stream)
    assert response.status_code == 400
    assert response.json()["error"]["code"] == "invalid_grammar"
    assert "no_such_token" in response.json()["error"]["message"]


async def test_the_engine_is_told_what_was_checked(served: Served) -> None:
    await complete(served, guided_choice=["a"])
    grammar = served.engine.requests[-1].sampling.grammar
    assert grammar is not None
    assert grammar.size > 0
    assert (grammar.kind, json.loads(grammar.text)) == (Grammar("choice", "").kind, ["a"])


def nested(levels: int) -> dict[str, Any]:
    """The schema of an object of lists of objects of lists ..., to this many levels."""
    schema: dict[str, Any] = {"type": "string", "maxLength": 3}
    for _ in range(levels):
        items = {"type": "array", "items": schema, "maxItems": 1}
        schema = {"type": "object", "properties": {"a": items}, "required": ["a"], "additionalProperties": False}
    return schema


@pytest.mark.parametrize(("levels", "depth"), [(10, 64), (19, 64), (22, 64), (37, 120), (40, 120)])
async def test_schemas_nested_deep(tmp_path: Path, levels: int, depth: int) -> None:
    """OpenAI promises ten levels of objects; a list in one counts as a further level."""
    schema = nested(levels)
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    message = {"model": BASE, "messages": HELLO, "max_tokens": 5}
    answer = {"model": BASE, "input": "Hi", "text": {"format": {"type": "json_schema", "name": "x", "schema": schema}}}
    bodies = [
        ("/v1/chat/completions", message | {"response_format": form}),
        ("/v1/chat/completions", message | {"tools": [tool], "tool_choice": "required"}),
        ("/v1/responses", answer | {"max_output_tokens": 5}),
    ]
    async with serving(tmp_path, context=20_000, max_body_depth=depth) as served:
        for path, body in bodies:
            response = await served.client.post(path, json=body)
            if 3 * levels < depth - 6:
                assert response.status_code == 200, response.text
            else:
                assert (response.status_code, f"{depth} levels" in response.text) == (400, True), response.text
