"""Junk in every numeric field and on every route of a real server: always a 4xx in one format, never a dead engine."""

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.http.middleware import OPEN_PATHS
from tests.support.harness import Site, paths
from tests.support.running import BASE, RunningServer

# field -> (least, greatest); None: no bound of its own on that side
NUMBERS: dict[str, tuple[float | None, float | None]] = {
    "n": (1, 128),
    "min_tokens": (0, None),
    "max_tokens": (0, None),
    "temperature": (0, 2),
    "top_p": (0, 1),
    "top_k": (-1, None),
    "min_p": (0, 1),
    "seed": (-(2**63), 2**63 - 1),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "repetition_penalty": (0, 2),
    "logprobs": (0, 20),
}
CHAT_ONLY = {"max_completion_tokens": (1, None), "top_logprobs": (0, 20)}
_VALUES: tuple[Any, ...] = ("1", True, [], {}, [1], "NaN")
WRONG = [json.dumps(value) for value in _VALUES] + ["NaN", "Infinity", "-Infinity", "1e999"]


def junk(low: float | None, high: float | None) -> Iterator[str]:
    """JSON texts that are no valid number between `low` and `high`."""
    yield from WRONG
    yield "9" * 5000
    yield str(2**64)
    if low is not None:
        yield json.dumps(low - 1)
    if high is not None:
        yield json.dumps(high + 1)


def post(client: httpx.Client, path: str, field: str, value: str) -> httpx.Response:
    prompt = '"messages": [{"role": "user", "content": "hi"}]' if "chat" in path else '"prompt": "hi"'
    text = f'{{"model": "{BASE}", {prompt}, "{field}": {value}}}'
    return client.post(path, content=text, headers={"Content-Type": "application/json"})


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_junk_in_numeric_fields(server: RunningServer, path: str) -> None:
    fields = NUMBERS | CHAT_ONLY if "chat" in path else NUMBERS
    pid = server.engine_pid
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for field, (low, high) in fields.items():
            for value in junk(low, high):
                if "chat" in path and field == "logprobs" and value == "true":
                    continue  # it is a switch there
                response = post(client, path, field, value)
                error = check_error(response, f"{field}={value[:20]}")
                assert response.status_code == 400, (field, value[:20], error)
                if value not in ("NaN", "Infinity", "-Infinity", "1e999") and len(value) < 100:
                    assert error["param"] == field, (field, value, error)
    assert server.engine_pid == pid


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE"])
def test_one_error_shape_everywhere(server: RunningServer, method: str, tmp_path: Path) -> None:
    with contextlib.closing(Site(tmp_path, lora_dir=tmp_path)) as site:
        known = [path for path in paths(site.app()) if path not in OPEN_PATHS]
    strange = ["/nowhere", "/v1/adapters/%00", "/v1/adapters/%2e%2e%2f%2e%2e%2fetc", "/v1/models/%F0%9F%A6%9C"]
    bodies = [b"", b"{", b"[]", b"null", b'{"model": 1}', b'{"model": "nobody", "prompt": "x"}', b"\xff", b"[" * 10_000]
    pid = server.engine_pid
    with httpx.Client(base_url=server.url, timeout=60) as client:
        for path in known + strange:
            for content in bodies if method == "POST" else (b"", b"{"):
                response = client.request(method, path, content=content, headers={"Content-Type": "application/json"})
                if response.status_code >= 400:
                    check_error(response, f"{method} {path} {content[:20]!r}")
                else:
                    assert method == "GET", "only lists may answer without parameters"
    assert server.engine_pid == pid


def check_error(response: httpx.Response, what: str) -> dict[str, Any]:
    assert 400 <= response.status_code < 500, (what, response.status_code, response.text)
    body = response.json()
    error: dict[str, Any] = body["error"]
    if response.request.url.path.startswith("/v1/messages"):  # Anthropic's format
        assert set(body) == {"type", "error"}, what
    else:
        assert set(body) == {"error"}, what
    assert set(error) == {"message", "type", "param", "code"}, what
    assert error["message"]
    assert "Traceback" not in response.text
    assert "site-packages" not in response.text
    assert not any(isinstance(value, float) and math.isnan(value) for value in error.values())
    return error
