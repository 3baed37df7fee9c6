"""Every route with every method: closed without a key, except for the public ones."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.http.middleware import OPEN_PATHS
from server.text.processor import TextProcessor
from server.ui import PATHS as CONSOLE_PATHS
from tests.support.harness import Site, paths
from tests.support.tiny import _tokenizer

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "BREW")
KEY = "sk-secret"


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    text = TextProcessor(_tokenizer().backend_tokenizer, None)
    with contextlib.closing(Site(tmp_path, text, api_key=(KEY,), lora_dir=tmp_path)) as site:
        yield site


def test_the_enumeration_sees_the_api(site: Site) -> None:
    found = paths(site.app())
    assert set(found) >= OPEN_PATHS
    assert {"/v1/completions", "/v1/chat/completions", "/tokenize", "/v1/adapters/nobody/weights"} <= set(found)


async def test_without_a_key_only_the_open_paths_answer(site: Site) -> None:
    async with site.client() as client:
        for path in [*paths(site.app()), "/nowhere"]:
            for method in METHODS:
                response = await client.request(method, path)
                if path in OPEN_PATHS:
                    assert response.status_code in (200, 405), (method, path)
                elif path in CONSOLE_PATHS:  # static files without data of the server
                    assert response.status_code in (200, 307, 404, 405), (method, path)
                else:
                    assert response.status_code == 401, (method, path)


async def test_with_a_key_every_refusal_has_the_shape_of_its_api(site: Site) -> None:
    async with site.client(headers={"Authorization": f"Bearer {KEY}"}) as client:
        for path in [*paths(site.app()), "/nowhere"]:
            for method in METHODS:
                response = await client.request(method, path)
                assert response.status_code < 500, (method, path)
                assert response.status_code != 401, (method, path)
                if response.status_code >= 400 and method != "HEAD":
                    answer = response.json()
                    if path.startswith("/v1/messages"):
                        assert answer.pop("type") == "error"
                    assert set(answer["error"]) == {"message", "type", "param", "code"}
                    assert set(answer) == {"error"}, (method, path)


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/v1/adapters", "GET, HEAD, POST"),
        ("/v1/adapters/one", "DELETE, GET, HEAD"),
        ("/v1/adapters/one/pin", "DELETE, POST"),
        ("/v1/adapters/one/merge", "DELETE, GET, HEAD, POST"),
        ("/health", "GET, HEAD"),
    ],
)
async def test_a_method_that_a_path_does_not_have_is_told_those_that_it_has(
    site: Site, path: str, allowed: str
) -> None:
    async with site.client(headers={"Authorization": f"Bearer {KEY}"}) as client:
        response = await client.put(path)
    assert (response.status_code, response.headers["Allow"]) == (405, allowed)


async def test_paths_are_exact(site: Site) -> None:
    async with site.client() as client:
        for path in ("/metrics/", "/Metrics", "http://test//metrics", "/v1/../metrics/x", "/health%2f", "/metrics%00"):
            assert (await client.get(path)).status_code == 401, path


@pytest.mark.parametrize(
    ("method", "asked", "meant"),
    [
        ("POST", "/chat/completions", "/v1/chat/completions"),
        ("POST", "/v1/v1/chat/completions", "/v1/chat/completions"),
        ("POST", "/v1/chat/completions/", "/v1/chat/completions"),
        ("POST", "//v1//completions", "/v1/completions"),
        ("POST", "/v1/tokenize", "/tokenize"),
        ("GET", "/v1/metrics", "/metrics"),
        ("GET", "/models/some/name", "/v1/models/some/name"),
        ("GET", "/chat/completions", None),
        ("POST", "/v1/audio/speech", None),
        ("GET", "/v1", None),
    ],
)
async def test_a_path_that_is_nearly_there_is_named(site: Site, method: str, asked: str, meant: str | None) -> None:
    async with site.client(headers={"Authorization": f"Bearer {KEY}"}) as client:
        response = await client.request(method, f"http://test{asked}")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "unknown_url")
    hint = f" Did you mean {meant}?" if meant else ""
    assert response.json()["error"]["message"] == f"Unknown request URL: {method} {asked}.{hint}"
