"""Strict reading of JSON bodies: bounded, unambiguous, no value that other JSON readers would refuse.

The result is plain data for a pydantic model, which validates the fields.
"""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from starlette.requests import Request

from adapters.background import thread_pool
from adapters.strict_json import BYTE_ORDER_MARK, JsonFault, check_characters, count_items, parse_json
from server.errors import InvalidRequest, RequestTooLarge, UnsupportedMediaType, printable
from server.http.answer import until_disconnect
from server.services import services_of
from server.settings import Settings

T = TypeVar("T")

_LARGE = 32 * 1024  # bytes; smaller bodies are parsed on the event loop
_parser_thread = thread_pool(1, "body", "normal")  # parses large bodies, one at a time


async def read_as(request: Request, validate: Callable[[Any], T]) -> T:
    """Return `validate` of the body's plain data. Large bodies are parsed in a thread, so that they block no one.

    Raises `RequestTooLarge` beyond `max_body_bytes`, `UnsupportedMediaType` for another content type, `InvalidRequest`
    for anything but one well-formed value (no duplicate keys, NaN, half surrogates, excessive depth) of at most
    `max_body_items`, `ClientDisconnect`, and the errors of `validate`.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise UnsupportedMediaType("The body must be JSON: send `Content-Type: application/json`.")
    settings = services_of(request).settings
    raw = await _read_bytes(request, settings.max_body_bytes)
    read = partial(_read, raw, settings, validate)
    if len(raw) < _LARGE:
        return read()
    return await until_disconnect(request.receive, asyncio.get_running_loop().run_in_executor(_parser_thread, read))


def _read(raw: bytes, settings: Settings, validate: Callable[[Any], T]) -> T:
    return validate(parse_body(raw, settings.max_body_items, settings.max_body_depth))


async def _read_bytes(request: Request, limit: int) -> bytes:
    def too_large() -> RequestTooLarge:
        return RequestTooLarge(f"The body is larger than {limit} bytes (--max-body-bytes).")

    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced[:20]) > limit:
        raise too_large()
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise too_large()
    return bytes(body)


def parse_body(raw: bytes, max_items: int = 2**18, max_depth: int = 64) -> Any:
    """Parse one JSON value; a byte order mark before it, as written by .NET and PowerShell, is skipped.

    Raises `InvalidRequest`.
    """
    raw = raw.removeprefix(BYTE_ORDER_MARK)
    if count_items(raw, max_items) > max_items:
        raise InvalidRequest(
            f"The body has more than {max_items} elements of lists, keys and values (--max-body-items).",
            code="too_many_items",
        )
    try:
        data = parse_json(raw, max_depth=max_depth)
        check_characters(raw, data)
    except JsonFault as fault:
        raise InvalidRequest(printable(f"The body {fault}.")) from None
    return data
