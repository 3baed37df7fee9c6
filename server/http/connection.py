"""uvicorn's HTTP/1.1 protocol with limits on the size and the duration of a request's head.

HTTP/1.0 clients get bodies without chunks, since they cannot read them. An offer to go on in another protocol, as
Java's client makes of HTTP/2, is declined by answering: the parser would take the request's body for that protocol's.

Refusals made here, before any handler runs, have the API's error shape.
"""

import asyncio
import contextlib
import json
import sys
from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

if TYPE_CHECKING:
    from uvicorn._types import ASGISendEvent

MAX_UNREAD_BYTES = 64 * 1024  # of an unread body: up to this, it is received and dropped, and the connection kept
LINGER_SECONDS = 1.0  # closing with unread input resets the connection, and the response would be lost


class LimitedHttpProtocol(HttpToolsProtocol):
    """One connection. Pass this class, or the result of `with_limits`, to uvicorn as `http=`."""

    max_head_bytes = 64 * 1024  # request line and headers; also trailers and chunk framing without any body byte
    head_seconds = 30.0
    _silent_bytes = 0  # received since the parser last made visible progress
    _head_timer: asyncio.TimerHandle | None = None
    _reason: tuple[HTTPStatus, str] | None = None
    _refused = False
    _received = b""  # data being parsed
    _offered = False  # whether the last request's head offers another protocol

    @classmethod
    def with_limits(cls, *, head_bytes: int, head_seconds: float) -> type["LimitedHttpProtocol"]:
        """Return the protocol class with these limits."""
        return type(cls.__name__, (cls,), {"max_head_bytes": head_bytes, "head_seconds": head_seconds})

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._start_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._refused or self.transport.is_closing():
            return
        self._silent_bytes += len(data)
        self._received = data
        super().data_received(data)
        self._received = b""
        if self._silent_bytes > self.max_head_bytes and not self._refused:
            self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, f"Headers exceed {self.max_head_bytes} bytes.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._offered = False
        self._start_timer()

    def on_headers_complete(self) -> None:
        if self.parser.should_upgrade() and any(name == b"upgrade" for name, _ in self.headers):
            self._offered = True
            return
        self._stop_timer()
        self._silent_bytes = 0
        # A head that arrives in one piece is complete before `data_received` counts its bytes.
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > self.max_head_bytes:
            self._reason = (
                HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
                f"Headers exceed {self.max_head_bytes} bytes.",
            )
            raise ValueError("head too large")  # ends the parse; `send_400_response` responds
        if self._transfer_coding() not in (None, b"chunked"):
            self._reason = (HTTPStatus.BAD_REQUEST, "The only Transfer-Encoding that is read is `chunked`.")
            raise ValueError("unknown transfer coding")
        super().on_headers_complete()
        self.cycle.transport = _Transport(self.transport, self._close_connection)  # type: ignore[assignment]  # has the methods in use
        if self.parser.get_http_version() == "1.0":
            _send_without_chunks(self.cycle)

    def _transfer_coding(self) -> bytes | None:
        given = [value.strip().lower() for name, value in self.headers if name == b"transfer-encoding"]
        return b", ".join(given) if given else None

    def on_body(self, body: bytes) -> None:
        self._silent_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._offered:
            return  # the parser assumes that another protocol follows
        self._silent_bytes = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.response_complete and self.cycle.more_body and not self._refused:
            length = dict(self.headers).get(b"content-length", b"")
            if not (length.isdigit() and int(length[:20]) <= MAX_UNREAD_BYTES):
                self._linger()

    def _close_connection(self) -> None:
        """End the connection after its last response."""
        if self.cycle.more_body:
            self._linger()
        else:
            self.transport.close()

    def _linger(self) -> None:
        """Stop reading, and close after the client has had time to receive the response."""
        self._refused = True
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(LINGER_SECONDS, self.transport.close)

    def _should_upgrade(self) -> bool:
        return False

    def _unsupported_upgrade_warning(self) -> None:
        """Parse a head with an upgrade offer again without the offer; called by uvicorn when the parser stops there."""
        stopped = sys.exception()
        if not self._offered or not isinstance(stopped, httptools.HttpParserUpgrade):
            return
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        head = b"%s %s HTTP/%s\r\n" % (method, self.url, version)
        head += b"".join(b"%s: %s\r\n" % header for header in self.headers if header[0] != b"upgrade")
        self.parser = httptools.HttpRequestParser(self)
        with contextlib.suppress(AttributeError):  # as in uvicorn, for older versions of httptools
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._received = head + b"\r\n" + self._received[stopped.args[0] :]
        super().data_received(self._received)

    def send_400_response(self, msg: str) -> None:
        """Refuse the request; called by uvicorn when the bytes are not HTTP or a callback above raised."""
        status, message = self._reason or (HTTPStatus.BAD_REQUEST, msg)
        self._refuse(status, message)

    def _start_timer(self) -> None:
        self._stop_timer()
        self._head_timer = self.loop.call_later(self.head_seconds, self._head_timed_out)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _head_timed_out(self) -> None:
        if not self.transport.is_closing():
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, f"The request's head took longer than {self.head_seconds:g} s.")

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        self._stop_timer()
        responding = self.cycle is not None and not self.cycle.response_complete  # type: ignore[redundant-expr]
        if responding or self.transport.is_closing():
            self._refused = True
            self.transport.close()
            return
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        body = json.dumps({"error": error}).encode()
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self._linger()


def _send_without_chunks(cycle: RequestResponseCycle) -> None:
    """Respond to an HTTP/1.0 client without chunks: a body of unknown length ends with the connection."""
    send = cycle.send
    ends_with_connection = False

    async def unchunked(message: "ASGISendEvent") -> None:
        nonlocal ends_with_connection
        if message["type"] == "http.response.start":
            ends_with_connection = all(name.lower() != b"content-length" for name, _ in message.get("headers", ()))
            cycle.chunked_encoding = False if ends_with_connection else None
        elif message["type"] == "http.response.body" and ends_with_connection:
            cycle.expected_content_length = len(message.get("body", b""))  # as if each part were the last one
        await send(message)

    cycle.send = unchunked  # type: ignore[method-assign]


class _Transport:
    """A response's transport; closing it is left to the connection."""

    def __init__(self, transport: asyncio.Transport, end: Callable[[], None]) -> None:
        self.write = transport.write
        self.is_closing = transport.is_closing
        self.close = end
