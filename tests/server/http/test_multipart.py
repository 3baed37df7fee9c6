"""Multipart bodies: parts that are stored, and refusals naming the part."""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from server.errors import EXCEPTION_HANDLERS
from server.http.multipart import Part, read_parts

BOUNDARY = b"frontier"
THREAD = ThreadPoolExecutor(1)
TYPE = {"Content-Type": "multipart/form-data; boundary=frontier"}


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "weights"


def clear(path: Path) -> None:
    path.unlink(missing_ok=True)


def content_of(path: Path) -> bytes:
    return path.read_bytes()


def client(target: Path) -> httpx.AsyncClient:
    async def receive(request: Request) -> Response:
        clear(target)
        parts = {"name": Part(16), "note": Part(16, required=False), "weights": Part(1_000_000, target)}
        values = await read_parts(request, parts, THREAD)
        return JSONResponse({name: value.decode() for name, value in values.items()})

    app = Starlette(routes=[Route("/", receive, methods=["POST"])], exception_handlers=EXCEPTION_HANDLERS)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


def part(name: str, content: bytes, filename: str | None = None) -> bytes:
    disposition = f'form-data; name="{name}"' + (f'; filename="{filename}"' if filename else "")
    return b"--%s\r\nContent-Disposition: %s\r\n\r\n%s\r\n" % (BOUNDARY, disposition.encode(), content)


def body(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--%s--\r\n" % BOUNDARY


async def pieces(content: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(content), size):
        yield content[start : start + size]


async def refused(target: Path, content: bytes, status: int, param: str | None, headers: Any = TYPE) -> None:
    response = await client(target).post("/", content=content, headers=headers)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param), response.text


@given(weights=st.binary(max_size=2000) | st.just(b"\r\n--frontie" * 40), size=st.integers(1, 700), flip=st.booleans())
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
def test_any_content_in_any_pieces_in_any_order(target: Path, weights: bytes, size: int, flip: bool) -> None:
    parts = [part("name", b"legal"), part("weights", weights, "../../etc/passwd")]
    content = body(*reversed(parts)) if flip else body(*parts)
    response = asyncio.run(client(target).post("/", content=pieces(content, size), headers=TYPE))
    assert response.json() == {"name": "legal"}
    assert content_of(target) == weights
    assert [path.name for path in target.parent.iterdir()] == ["weights"]


async def test_large_parts_are_written_while_they_arrive(target: Path) -> None:
    weights = bytes(range(256)) * 3900
    response = await client(target).post(
        "/", content=pieces(body(part("name", b"a"), part("weights", weights)), 65536), headers=TYPE
    )
    assert response.status_code == 200
    assert content_of(target) == weights


async def test_clients_such_as_httpx_are_understood(target: Path) -> None:
    response = await client(target).post("/", data={"name": "legal"}, files={"weights": b"abc"})
    assert response.json() == {"name": "legal"}
    assert content_of(target) == b"abc"


async def test_missing_repeated_and_unknown_parts_are_named(target: Path) -> None:
    name, weights = part("name", b"a"), part("weights", b"b")
    await refused(target, body(name), 400, "weights")
    await refused(target, body(weights), 400, "name")
    await refused(target, body(name, name, weights), 400, "name")
    await refused(target, body(name, weights, weights), 400, "weights")
    await refused(target, body(name, weights, part("extra", b"c")), 400, "extra")
    await refused(target, body(part("n" * 200, b"")), 400, "n" * 64)


async def test_limits_are_kept_per_part_and_in_total(target: Path) -> None:
    await refused(target, body(part("name", b"a" * 17), part("weights", b"b")), 413, "name")
    await refused(target, body(part("name", b"a"), part("weights", b"b" * 1_000_001)), 413, "weights")
    await refused(target, body(part("name", b"a"), part("weights", b"b" * 1_200_000)), 413, None)
    endless = pieces(b"x" * 1_200_000, 65536)  # a preamble, sent without Content-Length
    assert (await client(target).post("/", content=endless, headers=TYPE)).status_code in (400, 413)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Content-Type": "application/json"},
        {"Content-Type": "multipart/form-data"},
        {"Content-Type": "multipart/form-data; boundary="},
        {"Content-Type": f"multipart/form-data; boundary={'x' * 300}"},
    ],
)
async def test_other_content_types(target: Path, headers: dict[str, str]) -> None:
    await refused(target, body(part("name", b"a"), part("weights", b"b")), 400, "Content-Type", headers)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"garbage",
        body(),
        body(part("name", b"a"), part("weights", b"b"))[:-6],
        b"--frontier\r\nContent-Disposition: form-data\r\n\r\nx\r\n--frontier--",
        b"--frontier\r\nContent-Disposition: attachment; name=name\r\n\r\nx\r\n--frontier--",
        b"--frontier\r\nContent-Type: text/plain\r\n\r\nx\r\n--frontier--",
        b"--frontier\r\n" + b"X-A: b\r\n" * 1000 + b"\r\nx\r\n--frontier--",
        b"--frontier\r\nX-A: " + b"b" * 10_000 + b"\r\n\r\nx\r\n--frontier--",
        b"--frontier\r\n" * 1000,
    ],
)
async def test_malformed_bodies(target: Path, content: bytes) -> None:
    response = await client(target).post("/", content=content, headers=TYPE)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"
