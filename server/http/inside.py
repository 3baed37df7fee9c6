"""Requests to our own endpoints without a connection, for batches."""

import asyncio
import logging
from typing import Any

from starlette.applications import Starlette
from starlette.types import Message

from server.batches.runner import Reply
from server.client.engine import EngineDied
from server.errors import InternalError, as_error
from server.http.answer import encode_json
from server.tenants.caller import Caller

log = logging.getLogger(__name__)


async def respond(app: Starlette, caller: Caller, path: str, body: bytes) -> Reply:
    """Return the response to a POST of JSON, errors included. The middleware is skipped, so no key is needed."""
    pieces: list[bytes] = []
    status = 500
    unread = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if unread:
            return unread.pop()
        await asyncio.Event().wait()  # this client never disconnects
        raise AssertionError

    async def send(message: Message) -> None:
        nonlocal status
        status = message.get("status", status)
        pieces.append(message.get("body", b""))

    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    scope: dict[str, Any] = {
        "type": "http",
        "method": "POST",
        "path": path,
        "root_path": "",
        "query_string": b"",
        "headers": headers,
        "app": app,
        "caller": caller,
    }
    try:
        await app.router(scope, receive, send)
    except Exception as fault:
        error = as_error(fault)
        if isinstance(error, InternalError):
            log.exception("a request in a batch failed")
        return Reply(error.status, encode_json(error.body()), died=isinstance(fault, EngineDied))
    return Reply(status, b"".join(pieces))
