"""Reading a JSON body strictly: bounded, one meaning only, no value that other JSON readers would refuse.

What it lets through is plain data for a pydantic model; which fields there are is not its matter.
"""

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from starlette.requests import Request

from adapters.strict_json import JsonFault, check_characters, parse_json
from server.errors import InvalidRequest, RequestTooLarge, UnsupportedMediaType, shown
from server.services import services_of

T = TypeVar("T")

_MAX_DEPTH = 32
_LARGE = 256 * 1024  # bytes


async def read_as(request: Request, validate: Callable[[Any], T]) -> T:
    """The body as `validate` makes it of plain data. Large ones are parsed where they do not hold up others.

    Raises `RequestTooLarge` beyond `max_body_bytes`, `UnsupportedMediaType` for another content type, `InvalidRequest`
    for anything that is not one well-formed value (duplicate keys, NaN, half surrogates, too deep), and what
    `validate` raises.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise UnsupportedMediaType("The body must be JSON: send `Content-Type: application/json`.")
    raw = await _read_bytes(request, services_of(request).settings.max_body_bytes)
    if len(raw) < _LARGE:
        return validate(parse_body(raw))
    return await asyncio.to_thread(lambda: validate(parse_body(raw)))


async def _read_bytes(request: Request, limit: int) -> bytes:
    too_large = RequestTooLarge(f"The body is larger than {limit} bytes (--max-body-bytes).")
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced[:20]) > limit:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise too_large
    return bytes(body)


def parse_body(raw: bytes) -> Any:
    """One JSON value. Raises `InvalidRequest`."""
    try:
        data = parse_json(raw, max_depth=_MAX_DEPTH)
        check_characters(raw, data)
    except JsonFault as fault:
        raise InvalidRequest(shown(f"The body {fault}.")) from None
    return data
