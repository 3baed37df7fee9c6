"""Query parameters, and OpenAI's list object."""

from collections.abc import Sequence
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.errors import InvalidRequest

MAX_PAGE_SIZE = 100_000

Q = TypeVar("Q", bound="Query")


def _whole_number(text: Any) -> Any:
    if isinstance(text, str) and not (text.isascii() and text.isdigit() and len(text) <= 9):
        raise ValueError("must be a whole number")
    return text


WholeNumber = Annotated[int, BeforeValidator(_whole_number)]


class Query(BaseModel):
    """Known query parameters. Others are ignored; the last of a repeated parameter counts."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class ListQuery(Query):
    """A page of a list: `limit` objects after the one with the id `after`."""

    after: str | None = None


class PageQuery(ListQuery):
    limit: WholeNumber = Field(20, ge=1, le=100)


class WindowQuery(ListQuery):
    limit: WholeNumber | None = Field(None, ge=1, le=MAX_PAGE_SIZE)  # None: everything


def read_query(request: Request, kind: type[Q]) -> Q:
    """Validate a request's query. `name[key]=value` is an entry of an object. Raises pydantic's ValidationError."""
    plain: dict[str, Any] = {}
    objects: dict[str, dict[str, str]] = {}
    for name, value in request.query_params.multi_items():
        outer, bracket, key = name.partition("[")
        if bracket and key.endswith("]"):
            objects.setdefault(outer, {})[key[:-1]] = value
        else:
            plain[name] = value
    return kind.model_validate(plain | objects)


def window(query: WindowQuery, ids: Sequence[str]) -> tuple[slice, bool]:
    """Return the requested slice of a list and whether more follows. Raises InvalidRequest."""
    start = 0 if query.after is None else place(query.after, ids, "after") + 1
    end = start + (query.limit or len(ids) or 1)
    return slice(start, end), end < len(ids)


def place(id_: str, ids: Sequence[str], param: str) -> int:
    """Return the index of an id in a list. Raises InvalidRequest with the parameter's name."""
    try:
        return ids.index(id_)
    except ValueError:
        raise InvalidRequest(f"`{param}` is not the id of anything in this list.", param=param) from None


def window_before(id_: str, limit: int | None, ids: Sequence[str]) -> tuple[slice, bool]:
    """Return the part of a list that ends before an id, and whether more precedes it. Raises InvalidRequest."""
    end = place(id_, ids, "before_id")
    start = max(0, end - (limit or end))
    return slice(start, end), start > 0


def page(objects: Sequence[dict[str, Any]], has_more: bool) -> Response:
    """Return one page as a response."""
    ids = {"first_id": objects[0]["id"], "last_id": objects[-1]["id"]} if objects else {}
    return JSONResponse({"object": "list", "data": list(objects), "has_more": has_more, **ids})
