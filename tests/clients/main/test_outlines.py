"""outlines, over an OpenAI-compatible server and over vLLM's fields: types, choices, patterns."""

import re
from typing import Any, Literal

import openai
import outlines
import pytest
from pydantic import BaseModel, Field


class Bird(BaseModel):
    name: str = Field(max_length=12)
    colour: Literal["red", "green"]


@pytest.fixture
def client(api: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=api, api_key="none", max_retries=0)


def test_over_openai(client: openai.OpenAI, model: str) -> None:
    chat = outlines.from_openai(client, model)
    assert isinstance(chat("Hello", max_tokens=8), str)
    Bird.model_validate_json(chat("Name a bird.", Bird, max_tokens=80))


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [(Bird, r'\{"name".*'), (Literal["owl", "parrot"], "owl|parrot"), (outlines.regex("[a-c]{3}"), "[a-c]{3}")],
)
def test_over_vllm(client: openai.OpenAI, model: str, kind: Any, pattern: str) -> None:
    answer = outlines.from_vllm(client, model)("Name a bird.", kind, max_tokens=80)
    assert re.match(pattern, re.sub(r"\s", "", answer))
