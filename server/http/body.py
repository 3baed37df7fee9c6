"""Reading a JSON body strictly: bounded, one meaning only, no value that other JSON readers would refuse.

What it lets through is plain data for a pydantic model; which fields there are is not its matter.
"""

import asyncio
import json
import re
from collections.abc import Callable
from typing import Any, TypeVar

from starlette.requests import Request

from server.errors import InvalidRequest, RequestTooLarge, UnsupportedMediaType, shown
from server.services import services_of

T = TypeVar("T")

_MAX_DEPTH = 32
_LARGE = 256 * 1024  # bytes
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # only an escape can bring half a surrogate pair into valid UTF-8


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
        return validate(parse_json(raw))
    return await asyncio.to_thread(lambda: validate(parse_json(raw)))


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


def parse_json(raw: bytes) -> Any:
    """One JSON value. Raises `InvalidRequest`."""
    try:
        text = raw.decode()
        data = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
        depth = _depth(data)
    except RecursionError:
        depth = _MAX_DEPTH + 1
    except UnicodeDecodeError:
        raise InvalidRequest("The body is not valid UTF-8.") from None
    except json.JSONDecodeError as exc:
        message = f"The body is not valid JSON: {exc.msg} (line {exc.lineno}, column {exc.colno})."
        raise InvalidRequest(message) from None
    except ValueError as exc:  # ours, and Python's on integers of thousands of digits
        reason = "a number has too many digits" if "digits" in str(exc) else str(exc)
        raise InvalidRequest(f"The body is not valid JSON: {reason}.") from None
    if depth > _MAX_DEPTH:
        raise InvalidRequest(f"The body is nested more than {_MAX_DEPTH} levels deep.")
    if _SURROGATE.search(raw):
        try:
            json.dumps(data, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise InvalidRequest("The body has half a surrogate pair in a string; send whole characters.") from None
    return data


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"an object has the key {shown(twice)!r} twice")
    return data


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


def _depth(data: Any) -> int:
    """How many containers lie in one another; iterative, and only into containers."""
    depth, level = 0, [data]
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        if depth > _MAX_DEPTH:
            break
        level = [child for item in level for child in (item.values() if isinstance(item, dict) else item)]
    return depth
