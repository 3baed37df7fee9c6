"""Requests to `/v1/completions` of a scripted application, and its streams."""

import json
from typing import Any

import httpx

from tests.support.scripted import BASE, Served


async def complete(served: Served, **body: Any) -> httpx.Response:
    return await served.client.post("/v1/completions", json={"model": BASE, "prompt": "Hi", "max_tokens": 100} | body)


def events(response: httpx.Response) -> list[Any]:
    """Data of server-sent events; `[DONE]` stays text."""
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.text.endswith("\n\n")
    lines = response.text.removesuffix("\n\n").split("\n\n")
    assert all(line.startswith("data: ") for line in lines)
    data = [line.removeprefix("data: ") for line in lines]
    return [item if item == "[DONE]" else json.loads(item) for item in data]


def joined(chunks: list[Any], index: int = 0) -> str:
    choices = [choice for chunk in chunks[:-1] for choice in chunk["choices"]]
    return "".join(choice["text"] for choice in choices if choice["index"] == index)
