"""Refusals of requests: one exception tree, one JSON body, one way from exceptions to responses.

The body is OpenAI's: `{"error": {"message", "type", "param", "code"}}`, or Anthropic's. Messages name the
client's input and never carry a traceback, a path or an address.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match, Route
from starlette.types import ExceptionHandler

from adapters import disk
from adapters.disk import is_full, why_full
from adapters.peft_format.fields import AdapterError
from adapters.peft_format.record import DamagedFile
from adapters.storage.database import DatabaseBusy, UnknownCursorError
from adapters.storage.versions import DamagedAdapter, RemoteUnavailable, UnknownAdapter
from server.logs import note

ANTHROPIC = "/v1/messages"  # paths with Anthropic's errors
_OF_ANOTHER_TYPE = ("literal_error", "model_type", "dict_type", "list_type", "string_type", "int_type", "float_type")
_NO_OBJECT = ("model_type", "model_attributes_type", "dict_type")  # said in pydantic's and Python's terms
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class LorakeetError(Exception):
    """A refusal with an HTTP status. Subclasses fix status, type and default code."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    default_code: ClassVar[str | None] = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """`param`: the culprit, dotted (`messages.0.role`); `code`: replaces the class's own; `headers`: sent along."""
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.default_code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, dict[str, str | None]]:
        """The JSON body."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class InternalError(LorakeetError):
    """A fault of ours. Its message says nothing of the inside."""

    default_code = "internal_error"

    def __init__(self, message: str = "The server failed to answer this request.") -> None:
        super().__init__(message)


class InvalidRequest(LorakeetError):
    """400: the request can never succeed as it is."""

    status = 400
    type = "invalid_request_error"


class ContextLengthExceeded(InvalidRequest):
    """400: prompt and completion do not fit into the model's context."""

    default_code = "context_length_exceeded"


class InvalidApiKey(InvalidRequest):
    """401: no API key, or one that the server does not know."""

    status = 401
    default_code = "invalid_api_key"

    def __init__(self, message: str = "Missing or incorrect API key; send `Authorization: Bearer KEY`.") -> None:
        super().__init__(message, headers={"WWW-Authenticate": "Bearer"})


class PermissionDenied(InvalidRequest):
    """403: understood, and not allowed."""

    status = 403
    default_code = "permission_denied"


class NotFound(InvalidRequest):
    """404: nothing of that name here."""

    status = 404
    default_code = "not_found"


class ModelNotFound(NotFound):
    """404: neither the base nor an adapter has this name (vLLM's message)."""

    default_code = "model_not_found"

    def __init__(self, name: str, *, param: str | None = "model") -> None:
        super().__init__(f"The model `{shown(name)}` does not exist.", param=param)


class Conflict(InvalidRequest):
    """409: the name or the state does not allow it."""

    status = 409
    default_code = "conflict"


class RequestTimeout(InvalidRequest):
    """408: the body stopped coming."""

    status = 408
    default_code = "request_timeout"

    def __init__(self, message: str = "The request's body did not arrive in time.") -> None:
        super().__init__(message, headers={"Connection": "close"})


class PreconditionFailed(InvalidRequest):
    """412: the resource is no longer in the state that the client expected."""

    status = 412
    default_code = "precondition_failed"


class RequestTooLarge(InvalidRequest):
    """413: the body, or a part of it, is larger than a limit that the message names."""

    status = 413
    default_code = "request_too_large"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message, param=param, headers={"Connection": "close"})  # the rest of it is not read


class UnsupportedMediaType(InvalidRequest):
    """415: the body is not of the type that the route reads."""

    status = 415
    default_code = "unsupported_media_type"


class TooManyRequests(LorakeetError):
    """429: the queue is full; worth another try after `retry_after` seconds."""

    status = 429
    type = "rate_limit_error"
    default_code = "rate_limit_exceeded"

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message, headers={"Retry-After": str(retry_after)})


class Unavailable(LorakeetError):
    """503: the engine is starting, restarting or draining; worth another try after `retry_after` seconds."""

    status = 503
    type = "service_unavailable"
    default_code = "service_unavailable"

    def __init__(self, message: str, *, retry_after: int) -> None:
        super().__init__(message, headers={"Retry-After": str(retry_after)})


class EngineUnavailable(Unavailable):
    """503: the engine died, is starting, or is draining."""

    def __init__(self, message: str, retry_after: int = 5) -> None:
        super().__init__(message, retry_after=retry_after)


class Draining(Unavailable):
    """503: the server is shutting down."""

    default_code = "draining"

    def __init__(self) -> None:
        super().__init__("The server is shutting down.", retry_after=5)
        self.headers["Connection"] = "close"


class AdapterStoreUnavailable(Unavailable):
    """503: the object store does not answer; its log line says why."""

    default_code = "adapter_store_unavailable"

    def __init__(self) -> None:
        super().__init__("The object store (--adapter-store) does not answer.", retry_after=5)


class DatabaseHeld(Unavailable):
    """503: another process holds the database, for longer than --database-seconds."""

    default_code = "database_busy"

    def __init__(self) -> None:
        super().__init__("The server's database is in use by another process; nothing was changed.", retry_after=5)


class AdapterDamaged(LorakeetError):
    """502: the adapter has other files than it came with, or none, and no way to mend them; nothing was served."""

    status = 502
    default_code = "adapter_damaged"

    def __init__(self, name: str | None = None, digest: str = "") -> None:
        which = "this adapter" if name is None else f"the adapter `{shown(name)}` ({digest})"
        super().__init__(f"The files of {which} are damaged or missing; upload it again.")


class StorageFull(LorakeetError):
    """507: the disk cannot take it; nothing was kept."""

    status = 507
    type = "insufficient_storage"
    default_code = "storage_full"


def unknown_adapter(name: str) -> NotFound:
    """404 for a name that nobody has."""
    return NotFound(f"The adapter `{shown(name)}` does not exist.", param="name", code="adapter_not_found")


@contextmanager
def known_adapter(name: str) -> Iterator[None]:
    """A name that means nothing, or no longer, becomes NotFound."""
    try:
        yield
    except UnknownAdapter:
        raise unknown_adapter(name) from None


def storage_full(error: Exception) -> StorageFull:
    """What a client is told of a disk that takes nothing more."""
    return StorageFull(f"{why_full(error).capitalize()}.")


@contextmanager
def disk_faults() -> Iterator[None]:
    """A full disk, wherever it was met, becomes StorageFull."""
    try:
        yield
    except Exception as error:
        if is_full(error):
            raise storage_full(error) from None
        raise


def as_error(exc: Exception) -> LorakeetError:
    """The refusal that an exception from anywhere below a handler stands for; `InternalError` for an unexpected one."""
    match exc:
        case LorakeetError():
            return exc
        case RemoteUnavailable():
            return AdapterStoreUnavailable()
        case DamagedAdapter() | DamagedFile():
            return AdapterDamaged()
        case DatabaseBusy():
            return DatabaseHeld()
        case UnknownCursorError():
            return InvalidRequest("`after` is not the id of anything in this list.", param="after")
        case AdapterError():
            return InvalidRequest(str(exc), param=exc.param, code=exc.code)
        case ValidationError():
            return invalid_body(exc)
        case HTTPException():
            return _from_http(exc)
    return storage_full(exc) if is_full(exc) else InternalError()


def error_response(error: LorakeetError, path: str = "") -> Response:
    """The error as an HTTP response, in the shape of that path. Its code goes into the access line."""
    note(code=error.code or error.type)
    anthropic = path == ANTHROPIC or path.startswith(f"{ANTHROPIC}/")
    body = anthropic_body(error) if anthropic else error.body()
    return JSONResponse(body, status_code=error.status, headers=error.headers)


def anthropic_body(error: LorakeetError) -> dict[str, Any]:
    """The JSON body as Anthropic has it, with our `param` and `code` beside its fields."""
    kind = _ANTHROPIC_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": error.body()["error"] | {"type": kind}}


def shown(text: str) -> str:
    """Client text as part of a message: printable and not too long."""
    printable = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[:200])
    return printable if len(text) <= 200 else printable + "..."


async def handle_exception(request: Request, exc: Exception) -> Response:
    """Starlette's handler for every type in `EXCEPTION_HANDLERS`; the outermost middleware answers for the rest."""
    if isinstance(exc, HTTPException) and exc.status_code in (404, 405):
        error: LorakeetError = _unknown_route(request, exc)
    else:
        error = as_error(exc)
    return error_response(error, request.url.path)


_FROM_BELOW = (RemoteUnavailable, DamagedAdapter, DamagedFile, DatabaseBusy, UnknownCursorError, disk.StorageFull)
_HANDLED = (LorakeetError, *_FROM_BELOW, AdapterError, ValidationError, HTTPException)
EXCEPTION_HANDLERS: dict[Any, ExceptionHandler] = dict.fromkeys(_HANDLED, handle_exception)


def _with_status(status: int, error: LorakeetError) -> LorakeetError:
    """The same error under a status that has no class of its own."""
    error.status = status  # type: ignore[misc]  # an instance may differ from its class
    return error


def _unknown_route(request: Request, exc: HTTPException) -> LorakeetError:
    asked = f"{request.method} {shown(request.url.path)}"
    if exc.status_code == 404:
        meant = _meant(request)
        hint = f" Did you mean {shown(meant)}?" if meant else ""
        return NotFound(f"Unknown request URL: {asked}.{hint}", code="unknown_url")
    headers = {"Allow": ", ".join(sorted(_methods(request)))}
    return _with_status(405, InvalidRequest(f"Not allowed: {asked}.", code="method_not_allowed", headers=headers))


def _meant(request: Request) -> str | None:
    """A path that there is, where the one that was asked for has too many slashes or `/v1`, or too few."""
    path = re.sub("/{2,}", "/", request.url.path).rstrip("/")
    bare = re.sub("^(/v1)+(?=/|$)", "", path)
    for candidate in (f"/v1{bare}", bare):
        scope = {**request.scope, "path": candidate}
        if any(route.matches(scope)[0] is Match.FULL for route in request.app.routes):
            return candidate
    return None


def _methods(request: Request) -> set[str]:
    """The methods of a path: each has a route of its own, and the exception carries those of one route only."""
    matched: Route = request.scope["route"]
    routes = [route for route in request.app.routes if isinstance(route, Route) and route.path == matched.path]
    return {method for route in routes for method in route.methods or ()}


def _from_http(exc: HTTPException) -> LorakeetError:
    error_class = InvalidRequest if exc.status_code < 500 else LorakeetError
    return _with_status(exc.status_code, error_class(exc.detail, headers=exc.headers))


def invalid_body(exc: ValidationError, data: Any = None) -> InvalidRequest:
    """The first fault of a body, named by its field. The value itself is not repeated: it may be a whole prompt.

    Args:
        data: what was validated; without it a field may have names of types in its path.
    """
    faults = exc.errors(include_url=False, include_context=False, include_input=False)
    fault, path, alternatives = faults[0], _path(faults[0], data), faults[:1]
    if data is not None:  # a field that may be this or that has a fault as each of them: what it nearly is tells most
        branches = [(each, place) for each in faults if (place := _path(each, data))[: len(path)] == path]
        fault, path = max(branches, key=lambda found: (found[0]["type"] not in _OF_ANOTHER_TYPE, len(found[1])))
        if fault["type"] in _OF_ANOTHER_TYPE:  # it is nearly none: all that it may be
            alternatives = [each for each, place in branches if place == path and each["type"] in _OF_ANOTHER_TYPE]
    param = ".".join(path)[:200] or None
    if fault["type"] == "extra_forbidden":
        message = f"Unsupported parameter: `{shown(param or '')}`."
        return InvalidRequest(message, param=param, code="unsupported_parameter")
    texts = dict.fromkeys(map(_text, alternatives if fault in alternatives else [fault]))
    message = " or ".join([text if not i else text.removeprefix("Input should be ") for i, text in enumerate(texts)])
    return InvalidRequest(f"`{param}`: {message}" if param else message, param=param)


def _text(fault: ErrorDetails) -> str:
    return "Input should be an object" if fault["type"] in _NO_OBJECT else fault["msg"].removeprefix("Value error, ")


def _path(fault: ErrorDetails, data: Any) -> list[str]:
    """The way to a fault's place, without pydantic's names for the branches of unions."""
    path: list[str] = []
    part: Any = data
    last = len(fault["loc"]) - 1
    for i, place in enumerate(fault["loc"]):
        name = str(place) if isinstance(part, dict) else place  # a key that was read as a number
        if name in part if isinstance(part, dict) else isinstance(part, list) and isinstance(name, int):
            part = part[name]
        elif data is not None and not (fault["type"] == "missing" and i == last):
            continue
        path.append(str(name))
    return path
