"""Adapters in a bucket: the server's machine is lost, and another with an empty disk takes over."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.faults.conftest import ADAPTERS, Files
from tests.support.buckets import BUCKET, S3Server
from tests.support.running import BASE, RunningServer, eventually


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    server = S3Server()
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    server.start()
    yield server
    server.stop()


def answer(server: RunningServer, model: str) -> httpx.Response:
    body = {"model": model, "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0, "logprobs": 1}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=180)


def said(server: RunningServer, model: str) -> tuple[str, list[float]]:
    response = answer(server, model)
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    return choice["text"], choice["logprobs"]["token_logprobs"]


def listing(server: RunningServer) -> list[dict[str, Any]]:
    """All adapters, without their use and tier, which are local to a server."""
    own = ("tier", "requests", "tokens", "last_used")
    items = server.get("/v1/adapters").json()["data"]
    return [{key: value for key, value in item.items() if key not in own} for item in items]


def test_a_new_machine_serves_what_the_lost_one_was_given(made: Files, bucket: S3Server, tmp_path: Path) -> None:
    def server(name: str) -> RunningServer:
        (tmp_path / name).mkdir()
        flags = ("--adapter-store", f"s3://{BUCKET}/site", "--adapter-store-seconds", "20")
        return RunningServer(made.model, tmp_path / name, tmp_path / name / "data", *flags)

    lost, other = server("lost"), server("other")
    try:
        lost.ensure()
        for name in ADAPTERS:
            assert made.upload(lost, name, name).status_code == 201
        assert httpx.post(f"{lost.url}/v1/adapters/{ADAPTERS[0]}/pin", timeout=180).status_code == 200
        expected = {name: said(lost, name) for name in (*ADAPTERS, BASE)}
        assert len(set(map(str, expected.values()))) == len(expected)
        listed = listing(lost)
        lost.kill()

        other.ensure()
        assert listing(other) == listed
        eventually(lambda: other.metric("num_pinned_lora_adapters") == 1, 180, "the pin")
        assert {name: said(other, name) for name in (*ADAPTERS[:2], BASE)} == {
            name: expected[name] for name in (*ADAPTERS[:2], BASE)
        }
        bucket.stop()
        assert said(other, ADAPTERS[1]) == expected[ADAPTERS[1]]
        cold = answer(other, ADAPTERS[2])
        assert (cold.status_code, cold.json()["error"]["code"]) == (503, "adapter_store_unavailable")
        assert said(other, BASE) == expected[BASE]
    finally:
        lost.stop()
        other.stop()
