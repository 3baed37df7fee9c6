"""Middleware around every request: request id, access log, draining, slow bodies, API keys, CORS. Pure ASGI.

Paths are either open (`OPEN_PATHS`) or guarded.
"""

import asyncio
import logging
import re
import time
import traceback
import uuid
from collections.abc import Container
from pathlib import Path

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.admission import Drain
from server.errors import (
    ANTHROPIC_PATH,
    Draining,
    InternalError,
    InvalidApiKey,
    LorakeetError,
    RequestTimeout,
    UnsupportedMediaType,
    as_error,
    error_response,
)
from server.logs import FIELDS, collect_log_fields
from server.settings import Settings
from server.tenants.caller import Caller
from server.tenants.keys import Tenants
from server.tenants.limits import RATE_HEADERS, Allowance
from server.ui import PATHS

METRICS = "/metrics"
OPEN_PATHS = frozenset({"/health", "/ready", "/version", METRICS})  # served while draining; most need no key
POLLED_PATHS = frozenset(
    {"/health", "/ready", "/metrics", "/v1/server/history"}
)  # requested every few seconds, so logged at debug level
BODY_GRACE_SECONDS = 10.0  # that a body may lag behind the minimum rate

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_CLIENT_CLOSED_REQUEST = 499  # nginx's code; logged, never sent

access_log = logging.getLogger("server.access")
log = logging.getLogger(__name__)


class RequestGate:
    """Middleware that gives a request an id, counts and logs it, refuses it while draining, and handles exceptions."""

    def __init__(self, app: ASGIApp, drain: Drain, body_idle_seconds: float, min_body_rate: int) -> None:
        self._app = app
        self._drain = drain
        self._body_idle_seconds = body_idle_seconds
        self._min_body_rate = min_body_rate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        exchange = _Exchange(scope, receive, send, self._body_idle_seconds, self._min_body_rate)
        guarded = scope["path"] not in OPEN_PATHS
        if guarded:
            self._drain.enter()
        try:
            if guarded and self._drain.draining:
                raise Draining()
            await self._app(scope, exchange.receive, exchange.send)
        except ClientDisconnect:
            exchange.status = exchange.status or _CLIENT_CLOSED_REQUEST
        except Exception as exc:
            error = as_error(exc)
            if isinstance(error, InternalError):
                exchange.log_failure(exc)
            await exchange.fail(error)
        finally:
            if guarded:
                self._drain.leave()
            exchange.log()


class _Exchange:
    """One request and its response as they pass the gate."""

    def __init__(
        self, scope: Scope, receive: Receive, send: Send, body_idle_seconds: float, min_body_rate: int
    ) -> None:
        self._body_idle_seconds = body_idle_seconds
        self._min_body_rate = min_body_rate
        self._waited = 0.0  # seconds waited for the body
        self._received = 0  # bytes of the body
        self._scope = scope
        self._receive = receive
        self._send = send
        self._body_complete = False
        self._started = time.perf_counter()
        self.status: int | None = None
        headers = dict(scope["headers"])
        self._coding = headers.get(b"content-encoding", b"").strip().lower()
        given = headers.get(b"x-request-id", b"")
        self.request_id = given.decode() if _REQUEST_ID.fullmatch(given) else f"req-{uuid.uuid4().hex}"
        scope.setdefault("state", {})["request_id"] = self.request_id
        self._log_fields = collect_log_fields()

    async def receive(self) -> Message:
        if self._body_complete:  # the next message is the disconnect, without a time limit
            return await self._receive()
        if self._coding not in (b"", b"identity"):
            raise UnsupportedMediaType(
                "The body has a Content-Encoding, which is not read: send it as it is, uncompressed.",
                param="Content-Encoding",
                headers={"Accept-Encoding": "identity"},
            )
        timeout = self._body_idle_seconds
        if self._min_body_rate:
            deadline = BODY_GRACE_SECONDS + self._received / self._min_body_rate
            timeout = min(timeout, deadline - self._waited)
        since = time.monotonic()
        try:
            async with asyncio.timeout(timeout):
                message = await self._receive()
        except TimeoutError:
            raise RequestTimeout() from None
        self._waited += time.monotonic() - since
        self._received += len(message.get("body", b""))
        self._body_complete = not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            given = MutableHeaders(scope=message)
            given["X-Request-Id"] = self.request_id
            if self._scope["path"].startswith(ANTHROPIC_PATH):
                given["Request-Id"] = self.request_id  # the name that Anthropic's clients read
        await self._send(message)

    async def fail(self, error: LorakeetError) -> None:
        if self.status is None:
            await error_response(error, self._scope["path"])(self._scope, self._receive, self.send)

    def log_failure(self, exc: Exception) -> None:
        """Log the place of an exception. Its text may quote a prompt, so it is logged at debug level only."""
        frame = traceback.extract_tb(exc.__traceback__)[-1]
        place = f"{Path(frame.filename).name}:{frame.lineno}"
        log.error(
            "unexpected %s at %s; the client got a 500",
            type(exc).__name__,
            place,
            extra={FIELDS: {"request_id": self.request_id}},
        )
        log.debug("the exception in full", exc_info=exc)

    def log(self) -> None:
        path = self._scope.get("raw_path", self._scope["path"].encode())[:256].decode("ascii", "backslashreplace")
        method = self._scope["method"]
        seconds = time.perf_counter() - self._started
        status = self.status or _CLIENT_CLOSED_REQUEST
        access_log.log(
            logging.DEBUG if self._scope["path"] in POLLED_PATHS else logging.INFO,
            "%s %s %d %.3f s%s",
            method,
            path,
            status,
            seconds,
            "".join(f" {name}={value}" for name, value in self._log_fields.items()),
            extra={
                FIELDS: {
                    "request_id": self.request_id,
                    "method": method,
                    "path": path,
                    "status": status,
                    "seconds": round(seconds, 6),
                    "client": (self._scope.get("client") or [None])[0],
                    **self._log_fields,
                }
            },
        )


class Authentication:
    """Middleware that puts the caller into the scope. Once keys exist, only open paths need no valid key."""

    def __init__(self, app: ASGIApp, tenants: Tenants, open_paths: Container[str]) -> None:
        self._app = app
        self._tenants = tenants
        self._open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            caller: Caller | None = self._tenants.default_caller
            if self._needs_key(scope["path"]):
                caller = self._caller(Headers(scope=scope))
            if caller is None:
                await error_response(InvalidApiKey(), scope["path"])(scope, receive, send)
                return
            scope["caller"] = caller
            if caller.allowance.limited:
                send = _with_headers(send, caller.allowance)
        await self._app(scope, receive, send)

    def _needs_key(self, path: str) -> bool:
        if not self._tenants.requires_key:
            return False
        # The metrics name all tenants' adapters.
        return path not in self._open_paths or (path == METRICS and self._tenants.is_multi_tenant)

    def _caller(self, headers: Headers) -> Caller | None:
        given = headers.getlist("authorization") or [f"Bearer {key}" for key in headers.getlist("x-api-key")]
        if len(given) != 1:
            return None
        scheme, _, key = given[0].partition(" ")
        return self._tenants.find(key.strip().encode("latin-1")) if scheme.lower() == "bearer" else None


def _with_headers(send: Send, allowance: Allowance) -> Send:
    """Return a `send` that adds the headers of the remaining limits to the response."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            MutableHeaders(scope=message).update(allowance.headers())
        await send(message)

    return sending


def open_paths(settings: Settings) -> frozenset[str]:
    """Return the paths that need no key."""
    paths = OPEN_PATHS - {"/metrics", "/ready"} if settings.guard_metrics else OPEN_PATHS
    return paths | PATHS if settings.ui else paths


def middleware(drain: Drain, settings: Settings, tenants: Tenants) -> list[Middleware]:
    """Return the middleware, outermost first."""
    stack = []
    if settings.allowed_origins:
        stack.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(settings.allowed_origins),
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["*"],
                expose_headers=["ETag", "X-Request-Id", "X-Adapter-Digest", "Retry-After", *RATE_HEADERS],
            )
        )
    stack.append(
        Middleware(
            RequestGate,
            drain=drain,
            body_idle_seconds=settings.body_idle_seconds,
            min_body_rate=settings.min_body_rate,
        )
    )
    stack.append(Middleware(Authentication, tenants=tenants, open_paths=open_paths(settings)))
    return stack
