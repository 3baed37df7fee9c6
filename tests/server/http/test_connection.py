"""On a real socket: request heads that are too large or too slow, and data that is not HTTP."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator

import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from server.http import connection
from server.http.connection import LimitedHttpProtocol


async def echo(request: Request) -> Response:
    try:
        return PlainTextResponse(str(len(await request.body())))
    except ClientDisconnect:
        return Response()


async def refuse(request: Request) -> Response:
    return PlainTextResponse("too large", 413, headers={"Connection": "close"})


async def stream(request: Request) -> Response:
    async def parts() -> AsyncIterator[bytes]:
        for part in (b"one", b"", b"two"):
            yield part

    return StreamingResponse(parts())


@pytest.fixture
async def port() -> AsyncIterator[int]:
    routes = [
        Route("/", echo, methods=["GET", "POST"]),
        Route("/refuse", refuse, methods=["POST"]),
        Route("/stream", stream),
    ]
    app = Starlette(routes=routes)
    config = uvicorn.Config(app, port=0, http=LimitedHttpProtocol, ws="none", log_level="error", lifespan="off")
    server = uvicorn.Server(config)
    task = asyncio.create_task(server._serve())
    while not server.started:  # noqa: ASYNC110 - uvicorn offers no event
        await asyncio.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    await task


async def answer(port: int, *pieces: bytes) -> tuple[int, bytes]:
    """Status and body of the first response; the connection is read to its end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for piece in pieces:
        writer.write(piece)
        await writer.drain()
    raw = await asyncio.wait_for(reader.read(), 60)
    writer.close()
    head, _, body = raw.partition(b"\r\n\r\n")
    return int(head.split(b" ", 2)[1]), body


def is_error(body: bytes) -> bool:
    return set(json.loads(body)["error"]) == {"message", "type", "param", "code"}


async def test_ordinary_requests_pass(port: int) -> None:
    status, body = await answer(
        port, b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 200000\r\n\r\n", b"x" * 200_000
    )
    assert (status, body) == (200, b"200000")


async def test_chunked_bodies_are_not_mistaken_for_heads(port: int) -> None:
    chunks = [b"400\r\n" + b"x" * 1024 + b"\r\n"] * 200
    head = b"POST / HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert await answer(port, head, *chunks, b"0\r\n\r\n") == (200, b"204800")


OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n"


@pytest.mark.parametrize("cut", [1, 30, 10_000], ids="in pieces of {}".format)
@pytest.mark.parametrize("framing", ["length", "chunks"])
async def test_an_offer_of_another_protocol_is_passed_over(port: int, framing: str, cut: int) -> None:
    """Java's client makes one with every first request; its body comes at once."""
    if framing == "length":
        request = b"POST / HTTP/1.1\r\nHost: x\r\n" + OFFER + b"Content-Length: 300\r\n\r\n" + b"x" * 300
    else:
        request = b"POST / HTTP/1.1\r\nHost: x\r\n" + OFFER + b"Transfer-Encoding: chunked\r\n\r\n"
        request += b"12c\r\n" + b"x" * 300 + b"\r\n0\r\n\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for _ in range(2):  # the connection goes on
        for start in range(0, len(request), cut):
            writer.write(request[start : start + cut])
            await writer.drain()
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 60)
        assert head.startswith(b"HTTP/1.1 200 ")
        assert await reader.readexactly(3) == b"300"
    websocket = (
        b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: eA==\r\n\r\n"
    )
    writer.write(
        b"GET / HTTP/1.1\r\nHost: x\r\n" + websocket + b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    )
    answers = await asyncio.wait_for(reader.read(), 60)
    assert answers.count(b"HTTP/1.1 200 ") == 2
    writer.close()


async def test_an_offer_does_not_hide_a_huge_head(port: int) -> None:
    head = b"POST / HTTP/1.1\r\nHost: x\r\n" + OFFER + b"X: " + b"y" * 70_000 + b"\r\n\r\n"
    status, body = await answer(port, head)
    assert status == 431
    assert is_error(body)
    status, body = await answer(port, b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n" + OFFER + b"Connection: close\r\n\r\n")
    assert 400 <= status < 500


@pytest.mark.parametrize("keep", [b"", b"Connection: keep-alive\r\n"])
async def test_a_client_of_http_1_0_gets_no_chunks(port: int, keep: bytes) -> None:
    assert await answer(port, b"GET /stream HTTP/1.0\r\n" + keep + b"\r\n") == (200, b"onetwo")
    assert await answer(port, b"HEAD /stream HTTP/1.0\r\n" + keep + b"\r\n") == (200, b"")
    assert await answer(port, b"GET / HTTP/1.0\r\n" + keep + b"\r\n") == (200, b"0")
    newer = b"GET /stream HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    assert await answer(port, newer) == (200, b"3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n")


@pytest.mark.parametrize("pieces", [1, 50])
async def test_a_huge_header_is_refused(port: int, pieces: int) -> None:
    value = [b"a" * (200_000 // pieces)] * pieces
    status, body = await answer(port, b"GET / HTTP/1.1\r\nHost: x\r\nX-Big: ", *value, b"\r\n\r\n")
    assert status == 431
    assert is_error(body)


async def test_a_header_without_end_is_refused_early(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nX-Big: " + b"a" * 100_000)
    assert (await asyncio.wait_for(reader.readline(), 60)).startswith(b"HTTP/1.1 431")
    writer.close()


async def test_a_huge_trailer_closes_the_connection(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    writer.write(head + b"1\r\nx\r\n0\r\nX-Big: " + b"a" * 300_000)
    with contextlib.suppress(ConnectionError):
        assert await asyncio.wait_for(reader.read(), 60) == b""
    writer.close()


async def test_what_is_not_http_gets_the_error_shape(port: int) -> None:
    status, body = await answer(port, b"\x16\x03\x01hello\r\n\r\n")
    assert status == 400
    assert is_error(body)


@pytest.mark.parametrize(
    "coding", [b"xchunked", b"gzip", b"chunked, identity", b"identity\r\nTransfer-Encoding: chunked"]
)
async def test_an_unknown_transfer_coding_is_refused(port: int, coding: bytes) -> None:
    status, body = await answer(
        port, b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: " + coding + b"\r\n\r\n1\r\nx\r\n0\r\n\r\n"
    )
    assert status == 400
    assert is_error(body)


@pytest.mark.parametrize("path", [b"/refuse", b"/nowhere"])
async def test_a_body_that_was_refused_is_not_read_on(port: int, path: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "LINGER_SECONDS", 0.3)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = b"POST " + path + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000\r\n\r\n"
    writer.write(head + b"x" * 100_000)
    answered = await asyncio.wait_for(reader.read(), 60)  # to its end: the server sends nothing more
    assert answered.startswith((b"HTTP/1.1 413", b"HTTP/1.1 404"))
    assert answered.partition(b"\r\n\r\n")[2]
    sent = 0
    with contextlib.suppress(ConnectionError):  # and soon after reads nothing more
        async with asyncio.timeout(60):
            while sent < 500_000_000:
                writer.write(b"x" * 1_000_000)
                sent += 1_000_000
                await writer.drain()
                await asyncio.sleep(0.01)
    assert sent < 100_000_000
    writer.close()


async def test_small_bodies_that_nobody_reads_leave_the_connection_open(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for _ in range(2):
        writer.write(b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
        assert (await asyncio.wait_for(reader.readuntil(b"Not Found"), 60)).startswith(b"HTTP/1.1 404")
        assert b"Not Found" in await asyncio.wait_for(reader.readuntil(b"\r\n\r\nNot Found"), 60)
        writer.write(b"x" * 1000)
    writer.close()


async def test_a_slow_head_is_refused(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LimitedHttpProtocol, "head_seconds", 0.2)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET / HTTP/1.1\r\nHost:")
    assert (await asyncio.wait_for(reader.readline(), 60)).startswith(b"HTTP/1.1 408")
    writer.close()


def test_limits_are_those_of_the_protocol_that_is_made() -> None:
    made = LimitedHttpProtocol.with_limits(head_bytes=7, head_seconds=0.5)
    assert (made.max_head_bytes, made.head_seconds) == (7, 0.5)
    assert LimitedHttpProtocol.max_head_bytes == 64 * 1024


async def test_two_requests_on_one_connection(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LimitedHttpProtocol, "head_seconds", 0.2)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for _ in range(2):
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        response = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n0"), 60)
        assert response.startswith(b"HTTP/1.1 200")
        await asyncio.sleep(0.3)  # the head's timer must not run between requests
    writer.close()
