"""Errors of requests: one exception tree, one JSON body, one conversion from exceptions to responses.

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
from adapters.disk import full_disk_reason, is_disk_full
from adapters.peft_format.fields import AdapterError
from adapters.peft_format.record import DamagedFile
from adapters.storage.database import DatabaseBusy, UnknownCursorError
from adapters.storage.versions import DamagedAdapter, RemoteUnavailable, UnknownAdapter
from server.logs import add_log_fields

ANTHROPIC_PATH = "/v1/messages"  # this path and those below have Anthropic's formats
_TYPE_ERRORS = ("literal_error", "model_type", "dict_type", "list_type", "string_type", "int_type", "float_type")
_NOT_OBJECT = ("model_type", "model_attributes_type", "dict_type")  # their messages speak of pydantic and Python
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
    """An error with an HTTP status. Subclasses fix status, type and default code."""

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
        """`param`: path of the faulty field (`messages.0.role`); `code`: in place of the class's; `headers`: added."""
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.default_code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, dict[str, str | None]]:
        """The JSON body."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class InternalError(LorakeetError):
    """500: a fault of the server. The message reveals nothing internal."""

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

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, tokens: tuple[int, int] | None = None
    ) -> None:
        """`tokens`: the required and the maximum number of tokens, if both are known."""
        super().__init__(message, param=param, code=code)
        self._tokens = tokens

    @property
    def anthropic_message(self) -> str:
        """The message, prefixed by the words that Anthropic's clients recognise as a context overflow."""
        numbers = "" if self._tokens is None else f"{self._tokens[0]} tokens > {self._tokens[1]} maximum. "
        return f"prompt is too long: {numbers}{self.message}"


class InvalidApiKey(InvalidRequest):
    """401: no API key, or an unknown one."""

    status = 401
    default_code = "invalid_api_key"

    def __init__(self, message: str = "Missing or incorrect API key; send `Authorization: Bearer KEY`.") -> None:
        super().__init__(message, headers={"WWW-Authenticate": "Bearer"})


class PermissionDenied(InvalidRequest):
    """403: understood, and not allowed."""

    status = 403
    default_code = "permission_denied"


class NotFound(InvalidRequest):
    """404: there is nothing of this name."""

    status = 404
    default_code = "not_found"


class ModelNotFound(NotFound):
    """404: neither the base nor an adapter has this name (vLLM's message)."""

    default_code = "model_not_found"

    def __init__(self, name: str, *, param: str | None = "model") -> None:
        super().__init__(f"The model `{printable(name)}` does not exist.", param=param)


class Conflict(InvalidRequest):
    """409: the name or the state does not allow it."""

    status = 409
    default_code = "conflict"


class RequestTimeout(InvalidRequest):
    """408: the body did not arrive in time."""

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
    """415: the body's media type is not the route's."""

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
    """503: the object store does not answer; the log has the reason."""

    default_code = "adapter_store_unavailable"

    def __init__(self) -> None:
        super().__init__("The object store (--adapter-store) does not answer.", retry_after=5)


class DatabaseInUse(Unavailable):
    """503: another process has locked the database for longer than --database-seconds."""

    default_code = "database_busy"

    def __init__(self) -> None:
        super().__init__("The server's database is in use by another process; nothing was changed.", retry_after=5)


class AdapterDamaged(LorakeetError):
    """502: files of the adapter are damaged or missing and cannot be mended; nothing was served."""

    status = 502
    default_code = "adapter_damaged"

    def __init__(self, name: str | None = None, digest: str = "") -> None:
        which = "this adapter" if name is None else f"the adapter `{printable(name)}` ({digest})"
        super().__init__(f"The files of {which} are damaged or missing; upload it again.")


class StorageFull(LorakeetError):
    """507: the disk is full; nothing was stored."""

    status = 507
    type = "insufficient_storage"
    default_code = "storage_full"


def unknown_adapter(name: str) -> NotFound:
    """Return the 404 for an unknown name."""
    return NotFound(f"The adapter `{printable(name)}` does not exist.", param="name", code="adapter_not_found")


@contextmanager
def as_not_found(name: str) -> Iterator[None]:
    """Turn UnknownAdapter into NotFound."""
    try:
        yield
    except UnknownAdapter:
        raise unknown_adapter(name) from None


def storage_full(error: Exception) -> StorageFull:
    """Return the client's error for a full disk."""
    return StorageFull(f"{full_disk_reason(error).capitalize()}.")


@contextmanager
def disk_faults() -> Iterator[None]:
    """Turn any exception about a full disk into StorageFull."""
    try:
        yield
    except Exception as error:
        if is_disk_full(error):
            raise storage_full(error) from None
        raise


def as_error(exc: Exception) -> LorakeetError:
    """Convert any exception below a handler to a `LorakeetError`; to `InternalError` if it is unexpected."""
    match exc:
        case LorakeetError():
            return exc
        case RemoteUnavailable():
            return AdapterStoreUnavailable()
        case DamagedAdapter() | DamagedFile():
            return AdapterDamaged()
        case DatabaseBusy():
            return DatabaseInUse()
        case UnknownCursorError():
            return InvalidRequest("`after` is not the id of anything in this list.", param="after")
        case AdapterError():
            return InvalidRequest(str(exc), param=exc.param, code=exc.code)
        case ValidationError():
            return invalid_body(exc)
        case HTTPException():
            return _from_http(exc)
    return storage_full(exc) if is_disk_full(exc) else InternalError()


def error_response(error: LorakeetError, path: str = "") -> Response:
    """Return the error as an HTTP response, in the path's format, and note its code for the access line."""
    add_log_fields(code=error.code or error.type)
    anthropic = path == ANTHROPIC_PATH or path.startswith(f"{ANTHROPIC_PATH}/")
    body = anthropic_body(error) if anthropic else error.body()
    return JSONResponse(body, status_code=error.status, headers=error.headers)


def anthropic_body(error: LorakeetError) -> dict[str, Any]:
    """Return Anthropic's JSON body, with our `param` and `code` added."""
    kind = _ANTHROPIC_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    message = error.anthropic_message if isinstance(error, ContextLengthExceeded) else error.message
    return {"type": "error", "error": error.body()["error"] | {"type": kind, "message": message}}


def printable(text: str) -> str:
    """Return client text for use in a message: printable, and shortened to 200 characters."""
    cleaned = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[:200])
    return cleaned if len(text) <= 200 else f"{cleaned}..."


async def handle_exception(request: Request, exc: Exception) -> Response:
    """Starlette's handler for every type in `EXCEPTION_HANDLERS`; the outermost middleware handles the rest."""
    if isinstance(exc, HTTPException) and exc.status_code in (404, 405):
        error: LorakeetError = _unknown_route(request, exc)
    else:
        error = as_error(exc)
    return error_response(error, request.url.path)


_STORAGE_ERRORS = (RemoteUnavailable, DamagedAdapter, DamagedFile, DatabaseBusy, UnknownCursorError, disk.StorageFull)
_HANDLED = (LorakeetError, *_STORAGE_ERRORS, AdapterError, ValidationError, HTTPException)
EXCEPTION_HANDLERS: dict[Any, ExceptionHandler] = dict.fromkeys(_HANDLED, handle_exception)


def _with_status(status: int, error: LorakeetError) -> LorakeetError:
    """Return the error with another status, for statuses without a class."""
    error.status = status  # type: ignore[misc]  # an instance may differ from its class
    return error


def _unknown_route(request: Request, exc: HTTPException) -> LorakeetError:
    asked = f"{request.method} {printable(request.url.path)}"
    if exc.status_code == 404:
        similar = _similar_path(request)
        hint = f" Did you mean {printable(similar)}?" if similar else ""
        return NotFound(f"Unknown request URL: {asked}.{hint}", code="unknown_url")
    headers = {"Allow": ", ".join(sorted(_methods(request)))}
    return _with_status(405, InvalidRequest(f"Not allowed: {asked}.", code="method_not_allowed", headers=headers))


def _similar_path(request: Request) -> str | None:
    """Return an existing path that differs from the requested one in slashes or `/v1` only."""
    path = re.sub("/{2,}", "/", request.url.path).rstrip("/")
    bare = re.sub("^(/v1)+(?=/|$)", "", path)
    for candidate in (f"/v1{bare}", bare):
        scope = {**request.scope, "path": candidate}
        if any(route.matches(scope)[0] is Match.FULL for route in request.app.routes):
            return candidate
    return None


def _methods(request: Request) -> set[str]:
    """Return all methods of a path. Each has a route of its own, and the exception carries those of one route only."""
    matched: Route = request.scope["route"]
    routes = [route for route in request.app.routes if isinstance(route, Route) and route.path == matched.path]
    return {method for route in routes for method in route.methods or ()}


def _from_http(exc: HTTPException) -> LorakeetError:
    error_class = InvalidRequest if exc.status_code < 500 else LorakeetError
    return _with_status(exc.status_code, error_class(exc.detail, headers=exc.headers))


def invalid_body(exc: ValidationError, data: Any = None) -> InvalidRequest:
    """Return the error for a body's first fault, with its field. Never includes the value: it may be a whole prompt.

    Args:
        data: the validated body; without it, names of types may appear in the field's path.
    """
    faults = exc.errors(include_url=False, include_context=False, include_input=False)
    fault, path, alternatives = faults[0], _path(faults[0], data), faults[:1]
    if data is not None:  # a union's field has faults for each branch: report the branch that it nearly matches
        branches = [(each, place) for each in faults if (place := _path(each, data))[: len(path)] == path]
        fault, path = max(branches, key=lambda found: (found[0]["type"] not in _TYPE_ERRORS, len(found[1])))
        if fault["type"] in _TYPE_ERRORS:  # it nearly matches none: report all types
            alternatives = [each for each, place in branches if place == path and each["type"] in _TYPE_ERRORS]
    param = ".".join(path)[:200] or None
    if fault["type"] == "extra_forbidden":
        message = f"Unsupported parameter: `{printable(param or '')}`."
        return InvalidRequest(message, param=param, code="unsupported_parameter")
    texts = dict.fromkeys(map(_text, alternatives if fault in alternatives else [fault]))
    message = " or ".join([text if not i else text.removeprefix("Input should be ") for i, text in enumerate(texts)])
    return InvalidRequest(f"`{param}`: {message}" if param else message, param=param)


def _text(fault: ErrorDetails) -> str:
    return "Input should be an object" if fault["type"] in _NOT_OBJECT else fault["msg"].removeprefix("Value error, ")


def _path(fault: ErrorDetails, data: Any) -> list[str]:
    """Return the path to a fault's field, without pydantic's names for branches of unions."""
    path: list[str] = []
    part: Any = data
    last = len(fault["loc"]) - 1
    for i, place in enumerate(fault["loc"]):
        name = str(place) if isinstance(part, dict) else place  # pydantic may give a dict's key as a number
        if name in part if isinstance(part, dict) else isinstance(part, list) and isinstance(name, int):
            part = part[name]
        elif data is not None and not (fault["type"] == "missing" and i == last):
            continue
        path.append(str(name))
    return path
