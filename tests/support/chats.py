"""Helpers of the tests of all chat APIs with a scripted application: set its text, read its prompt and its events."""

import json
from typing import Any

import httpx

from tests.support.scripted import EOS, Served, encode


def say(served: Served, text: str) -> None:
    """Make every answer this text."""
    served.engine.reply = lambda request: [*encode(text), EOS]


def sent_prompt(served: Served) -> str:
    """The prompt of the engine's last request, as text."""
    return served.services.text.decode(served.engine.requests[-1].prompt, skip_special_tokens=False)


def named_events(response: httpx.Response) -> list[dict[str, Any]]:
    """Data of server-sent events that are each named by their type."""
    assert response.status_code == 200, response.text
    blocks = [block.split("\n") for block in response.text.strip().split("\n\n")]
    read = [(name.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for name, data in blocks]
    assert all(name == event["type"] for name, event in read)
    return [event for _, event in read]
