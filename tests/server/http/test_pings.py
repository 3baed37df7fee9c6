"""Comments in the pauses of streams, so that proxies do not close them as idle."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from server.errors import EngineUnavailable
from server.http.answer import PING
from server.messages.protocol import Generate
from tests.support.scripted import BASE, TEXT, serving

MESSAGES = [{"role": "user", "content": "Hi"}]
DOORS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "Hi", "max_tokens": 50},
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 50},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 50},
    "/v1/responses": {"input": "Hi", "max_output_tokens": 50},
}


async def silent(request: Generate, step: int) -> None:
    await asyncio.sleep(0.3 if step in (0, 4) else 0)


def blocks(text: str) -> list[str]:
    return [block for block in text.split("\n\n") if block]


@pytest.mark.parametrize("path", DOORS)
async def test_pings_fill_silences_and_leave_events_unchanged(tmp_path: Path, path: str) -> None:
    kinds = {}
    for seconds in (0.05, 0.0):
        async with serving(tmp_path / str(seconds), stream_ping_seconds=seconds) as served:
            served.engine.gate = silent
            response = await served.client.post(path, json=DOORS[path] | {"model": BASE, "stream": True})
        assert response.headers["content-type"].startswith("text/event-stream")
        found = blocks(response.text)
        events = [block for block in found if block != PING.decode().strip()]
        data = [json.loads(block.split("data: ")[1]) for block in events if "[DONE]" not in block]
        kinds[seconds] = [(sorted(each), each.get("type")) for each in data]
        assert "fox" in response.text
        pings = [i for i, block in enumerate(found) if block == PING.decode().strip()]
        if seconds:
            assert len(pings) >= 4
            assert any(0 < i < len(found) - 1 for i in pings)
        else:
            assert not pings
    assert kinds[0.05] == kinds[0.0]


@pytest.mark.parametrize("path", DOORS)
async def test_a_failure_after_a_ping_is_an_error_event(tmp_path: Path, path: str) -> None:
    for wait, status in ((0.3, 200), (0.0, 503)):

        async def late(request: Generate, step: int, wait: float = wait) -> None:
            await asyncio.sleep(wait)
            raise EngineUnavailable("gone")

        async with serving(tmp_path / str(wait), stream_ping_seconds=0.1) as served:
            served.engine.gate = late
            response = await served.client.post(path, json=DOORS[path] | {"model": BASE, "stream": True})
        if path != "/v1/responses":  # its first event precedes the model's output
            assert response.status_code == status, response.text
        assert "gone" in blocks(response.text)[-1]
        assert TEXT not in response.text
