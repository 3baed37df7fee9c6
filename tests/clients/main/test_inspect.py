"""Inspect over chat, Responses, Messages and its provider of vLLM: plain, with a tool, of a schema, too long."""

from pathlib import Path
from typing import Any

import pytest
from inspect_ai import Task
from inspect_ai import eval as evaluate
from inspect_ai.dataset import Sample
from inspect_ai.model import GenerateConfig, ResponseSchema, get_model
from inspect_ai.scorer import includes
from inspect_ai.solver import Solver, generate, use_tools
from inspect_ai.tool import Tool, tool
from inspect_ai.util import json_schema
from pydantic import BaseModel

ASK = "How many wings has an owl?"


class Bird(BaseModel):
    red: bool  # Inspect asks for no bounds of numbers


@tool
def wings() -> Tool:
    async def execute(bird: str) -> int:
        """How many wings a bird has.

        Args:
            bird: Its name.
        """
        return len(bird)

    return execute


@pytest.fixture(params=["chat", "responses", "messages", "vllm"])
def chat(request: pytest.FixtureRequest, url: str, api: str, model: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("VLLM_API_KEY", "none")
    config = GenerateConfig(max_tokens=32, max_retries=0)
    given: dict[str, Any] = {"api_key": "none", "base_url": api, "config": config, "memoize": False}
    match request.param:
        case "messages":
            return get_model(f"anthropic/{model}", **given | {"base_url": url})
        case "vllm":
            return get_model(f"vllm/{model}", **given)
        case kind:
            return get_model(f"openai/{model}", responses_api=kind == "responses", **given)


def run(chat: Any, logs: Path, solver: list[Solver], text: str = ASK, **config: Any) -> Any:
    task = Task(dataset=[Sample(input=text, target="2")], solver=solver, scorer=includes())
    [log] = evaluate(task, model=chat, display="none", log_dir=str(logs), message_limit=6, **config)
    assert log.status == "success", log.error
    [sample] = log.samples or []
    assert sample.error is None
    return sample


def test_plain(chat: Any, tmp_path: Path) -> None:
    sample = run(chat, tmp_path, [generate()])
    assert sample.output.completion
    assert sample.output.usage.output_tokens <= 32


def test_a_tool(chat: Any, tmp_path: Path) -> None:
    sample = run(chat, tmp_path, [use_tools(wings(), tool_choice="any"), generate(tool_calls="single")])
    calls = [call for message in sample.messages for call in getattr(message, "tool_calls", None) or []]
    assert {call.function for call in calls} == {"wings"}


def test_a_schema(chat: Any, tmp_path: Path) -> None:
    schema = ResponseSchema(name="bird", json_schema=json_schema(Bird))
    Bird.model_validate_json(run(chat, tmp_path, [generate()], response_schema=schema).output.completion)


def test_a_prompt_that_is_too_long(chat: Any, tmp_path: Path) -> None:
    assert run(chat, tmp_path, [generate()], "word " * 20_000).output.stop_reason == "model_length"
