"""A model's recommended sampling values apply where a request gives none."""

import dataclasses
import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from server.openai.sampling_defaults import sampling_defaults
from server.settings import SettingError
from tests.support.scripted import BASE, EOS, Served, serving

MAKERS = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.1, "repetition_penalty": 1.05}


def write(directory: Path, **content: Any) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "generation_config.json").write_text(json.dumps(content))
    return directory


def test_sampling_defaults_come_from_the_model_a_directory_or_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write(tmp_path / "model", **MAKERS, do_sample=True, eos_token_id=2, max_length=20)
    other = write(tmp_path / "other", temperature=0)
    assert sampling_defaults("auto", "model", model) == MAKERS
    assert sampling_defaults(str(other), "model", model) == {"temperature": 0.0}
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sampling_defaults("~/other", "model", model) == {"temperature": 0.0}
    assert sampling_defaults("none", "model", model) == {}
    assert sampling_defaults("auto", "model", tmp_path) == {}


def test_the_built_in_model_brings_its_makers_values(tmp_path: Path) -> None:
    assert sampling_defaults("auto", "smollm2-135m-instruct", tmp_path) == {"temperature": 0.2, "top_p": 0.9}
    assert sampling_defaults("none", "smollm2-135m-instruct", tmp_path) == {}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 2.5),
        ("temperature", "1"),
        ("top_p", -0.1),
        ("top_k", -2),
        ("repetition_penalty", 0),
        ("min_p", True),
    ],
)
def test_values_that_no_request_may_have_are_left_out_with_a_warning(
    tmp_path: Path, name: str, value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = write(tmp_path / "model", **{"temperature": 0.5, name: value})
    with caplog.at_level(logging.WARNING):
        found = sampling_defaults("auto", "model", model)
    assert name not in found
    assert name in caplog.text


@pytest.mark.parametrize("content", [None, b"{", b"[1]"])
def test_a_directory_without_a_usable_file_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "generation_config.json").write_bytes(content)
    with pytest.raises(SettingError, match="--generation-config"):
        sampling_defaults(str(tmp_path), "model", tmp_path / "model")


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path) as served:
        yield served


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_a_request_has_them_where_it_gives_none(served: Served, path: str) -> None:
    served.app.state.services = dataclasses.replace(served.services, sampling_defaults=MAKERS)
    asked = {"prompt": "Hi"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "Hi"}]}
    body = {"model": BASE, "max_tokens": 5} | asked
    for given in ({}, {"temperature": 1.0, "top_k": 0}, {"temperature": None}):
        assert (await served.client.post(path, json=body | given)).status_code == 200
    own, told, null = (request.sampling for request in served.engine.requests)
    assert {name: getattr(own, name) for name in MAKERS} == MAKERS
    assert (told.temperature, told.top_k, told.top_p) == (1.0, 0, 0.95)
    assert null.temperature == 0.6


async def test_an_answer_ends_at_every_stop_token_unless_they_are_ignored(served: Served) -> None:
    served.services.text.stop_tokens = {0: ("config.json",), EOS: ("tokenizer",), 10**6: ("config.json",)}
    body = {"model": BASE, "prompt": "Hi", "max_tokens": 5, "stop_token_ids": [7]}
    for more in ({}, {"ignore_eos": True}):
        assert (await served.client.post("/v1/completions", json=body | more)).status_code == 200
    ended, ignored = (request.sampling for request in served.engine.requests)
    assert ended.stop_token_ids == [7, 0, EOS]
    assert ignored.stop_token_ids == [7]
    listed = (await served.client.get("/ready")).json()["stop_tokens"]
    assert [line["id"] for line in listed] == [0, EOS, 10**6]
