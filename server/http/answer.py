"""Responses as JSON, server-sent events or a file; generation stops when the client disconnects.

Pure ASGI.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect
from starlette.responses import FileResponse
from starlette.types import Receive, Scope, Send

from adapters.strict_json import encode_line
from server.errors import InternalError, LorakeetError, as_error

log = logging.getLogger(__name__)

_EVENT_STREAM = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",  # tells proxies not to buffer
}

PING = b": ping\n\n"

T = TypeVar("T")

encode_json = msgspec.json.Encoder().encode


class CancellableResponse:
    """An ASGI response that runs `work(send)` until it is done or the client disconnects.

    On a disconnect the work is cancelled, which closes its iterators. The request's body must have been read.
    """

    def __init__(self, work: Callable[[Send], Awaitable[None]]) -> None:
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await until_disconnect(receive, self._work(send))


async def until_disconnect(receive: Receive, work: Awaitable[T]) -> T:
    """Return the result of `work`. When the client disconnects, cancel it and raise ClientDisconnect.

    Args:
        receive: of a request, its body already read.
    """
    working = asyncio.ensure_future(work)
    disconnected = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({working, disconnected}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        disconnected.cancel()
        await asyncio.gather(working, disconnected, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def send_json(send: Send, content: Any, headers: Mapping[str, str]) -> None:
    """Send a complete JSON response."""
    body = encode_json(content)
    length = {"content-type": "application/json", "content-length": str(len(body))}
    await _start(send, length | dict(headers))
    await _send_body(send, body, more_body=False)


async def send_events(
    send: Send,
    events: AsyncIterator[Any],
    headers: Mapping[str, str],
    error_event: Callable[[LorakeetError], Any] | None = None,
    *,
    ping_seconds: float,
) -> None:
    """Send server-sent events, one per item, and `[DONE]`; while idle, a comment every `ping_seconds` unless that is 0.

    With `error_event`, which creates the event of an error, each event is named by its type, and there is no `[DONE]`.
    The head is sent with the first event or comment: an earlier error is an ordinary error response. A later one ends
    the stream with an error event and without `[DONE]`.
    """
    named = error_event is not None
    stream = _EventStream(send, headers)
    pings = asyncio.create_task(stream.ping(ping_seconds)) if ping_seconds else None
    try:
        async for event in events:
            await stream.write(_encode_event(event, named=named))
    except Exception as exc:
        if not stream.started:
            raise
        error = as_error(exc)
        if isinstance(error, InternalError):
            log.exception("a stream failed")
        event = error.body() if error_event is None else error_event(error)
        await stream.write(_encode_event(event, named=named))
    else:
        await stream.write(b"" if named else b"data: [DONE]\n\n")
    finally:
        if pings is not None:
            pings.cancel()
            await asyncio.gather(pings, return_exceptions=True)
    await _send_body(send, b"", more_body=False)


class _EventStream:
    """An event-stream response; the head is sent with the first bytes."""

    def __init__(self, send: Send, headers: Mapping[str, str]) -> None:
        self._send = send
        self._headers = _EVENT_STREAM | dict(headers)
        self._writing = asyncio.Lock()
        self._clock = asyncio.get_running_loop().time
        self._last = self._clock()
        self.started = False

    async def write(self, text: bytes) -> None:
        """Write complete events, or only the head."""
        self._last = self._clock()
        async with self._writing:
            if not self.started:
                self.started = True
                await _start(self._send, self._headers)
            if text:
                await _send_body(self._send, text)

    async def ping(self, seconds: float) -> None:
        """Write a comment, ignored by clients, after each idle period, since proxies close idle connections."""
        while True:
            remaining = self._last + seconds - self._clock()
            if remaining <= 0:
                await self.write(PING)
            else:
                await asyncio.sleep(remaining)


def _encode_event(event: Any, *, named: bool) -> bytes:
    data = b"data: " + encode_line(event) + b"\n\n"
    if not named:
        return data
    kind = event["type"] if isinstance(event, dict) else type(event).__struct_config__.tag
    return f"event: {kind}\n".encode() + data


async def _start(send: Send, headers: Mapping[str, str]) -> None:
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": 200, "headers": raw})


async def _send_body(send: Send, body: bytes, *, more_body: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more_body})


class WholeFile(FileResponse):
    """A file response that ignores Range: starlette's error for an invalid Range has a shape of its own."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.headers["Accept-Ranges"] = "none"
        headers = [(name, value) for name, value in scope["headers"] if name != b"range"]
        await super().__call__({**scope, "headers": headers}, receive, send)
