"""Query parameters of lists, and OpenAI's list object."""

from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.errors import InvalidRequest

MOST = 100_000


def limit_of(request: Request, *, default: int, most: int) -> int:
    """The query's `limit`. Raises InvalidRequest."""
    text = request.query_params.get("limit")
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 9 and 1 <= int(text) <= most):
        raise InvalidRequest(f"`limit` must be a whole number from 1 to {most}.", param="limit")
    return int(text)


def window(request: Request, ids: Sequence[str]) -> tuple[slice, bool]:
    """Which part of a list the query's `limit` and `after` ask for, everything by default, and whether more follows.

    Raises InvalidRequest.
    """
    after = request.query_params.get("after")
    try:
        start = 0 if after is None else ids.index(after) + 1
    except ValueError:
        raise unknown_cursor() from None
    end = start + limit_of(request, default=len(ids) or 1, most=MOST)
    return slice(start, end), end < len(ids)


def unknown_cursor() -> InvalidRequest:
    """The query's `after` is the id of nothing in the list."""
    return InvalidRequest("`after` is not the id of anything in this list.", param="after")


def page(objects: Sequence[dict[str, Any]], more: bool) -> Response:
    """One page."""
    ids = {"first_id": objects[0]["id"], "last_id": objects[-1]["id"]} if objects else {}
    return JSONResponse({"object": "list", "data": list(objects), "has_more": more, **ids})
