"""Operations: routes that declare their input and output, from which the OpenAPI document is generated.

A handler declares its JSON body and its query in its signature, and gets them read and validated:

    async def create_evaluation(request: Request, body: EvaluationBody) -> Response: ...
    async def list_evaluations(request: Request, query: PageQuery) -> Response: ...

A body with a default is optional; of several (`A | B`) the first with all required fields present is used.
"""

import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

import msgspec
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp

from server.errors import (
    AdapterDamaged,
    Conflict,
    LorakeetError,
    ModelNotFound,
    PermissionDenied,
    StorageFull,
    TooManyRequests,
)
from server.http.body import read_as
from server.http.multipart import Part
from server.http.objects.common import ErrorObject
from server.http.paging import Query, read_query
from server.http.roles import is_change, role_error_message, roles_of
from server.openai.body import Body
from server.settings import Settings

OPEN_ERRORS = (ModelNotFound, Conflict, AdapterDamaged)  # of operations that open an adapter
PUBLISH_ERRORS = (Conflict, TooManyRequests, StorageFull)  # of operations that create one

Form = Callable[[Settings, Path], Mapping[str, Part]]  # the parts of a multipart body; files go to the directory


class Operation(Route):
    """One method of one path.

    Args:
        response_type: the type of the JSON response (for msgspec), or other media types, comma-separated.
        events: the type of a server-sent event, if the response may be a stream.
        statuses: of successful responses.
        errors: errors beyond those of every operation of its kind (`openapi.errors_by_status`).
        headers: request headers and their meaning.
        form: the parts of a multipart body, which the handler reads itself.
        error_type: the type of an error response.
    """

    def __init__(
        self,
        method: str,
        path: str,
        handler: Callable[..., Awaitable[ASGIApp]],
        *,
        response_type: Any,
        events: Any = None,
        statuses: Sequence[int] = (200,),
        errors: Sequence[type[LorakeetError]] = (),
        headers: Mapping[str, str] | None = None,
        form: Form | None = None,
        error_type: Any = ErrorObject,
    ) -> None:
        hints = get_type_hints(handler)
        declared = hints.get("body", NoneType)
        self.handler = handler
        self.bodies: list[type[Body]] = [kind for kind in get_args(declared) or [declared] if kind is not NoneType]
        self.query: type[Query] | None = hints.get("query")
        self.response_type = response_type
        self.events = events
        self.statuses = statuses
        self.errors = errors
        self.headers = headers or {}
        self.form = form
        self.error_type = error_type
        self.method = method
        self.roles = roles_of(method, path)
        self.changes = is_change(method, path)
        self.body_required = (
            bool(self.bodies) and inspect.signature(handler).parameters["body"].default is inspect.Parameter.empty
        )
        super().__init__(path, self._respond, methods=[method], name=handler.__name__)

    async def _respond(self, request: Request) -> ASGIApp:
        if self.roles.isdisjoint(request.scope["caller"].roles):
            raise PermissionDenied(role_error_message(self.roles))
        arguments: dict[str, Any] = {}
        if self.query is not None:
            arguments["query"] = read_query(request, self.query)
        if self.bodies and (self.body_required or self._has_json(request)):
            arguments["body"] = await read_as(request, self._validate)
        answer = await self.handler(request, **arguments)
        if self.changes:
            await self._record(request, answer, arguments.get("body"))
        return answer

    async def _record(self, request: Request, answer: ASGIApp, body: Body | None) -> None:
        """Write a change to the audit log, with its object's name and digest from the response."""
        response_fields: dict[str, Any] = {}
        if isinstance(answer, JSONResponse):
            response_fields = {"digest": answer.headers.get("etag", "").strip('"') or None} | msgspec.json.decode(
                answer.body
            )
        name = (
            next(iter(request.path_params.values()), None) or response_fields.get("id") or response_fields.get("name")
        )
        name = name or getattr(body, "lora_name", None)
        request_id = request.scope.get("state", {}).get("request_id")
        audit = request.app.state.services.audit
        await audit.record(request.scope["caller"], self.name, name, response_fields.get("digest"), request_id)

    def _has_json(self, request: Request) -> bool:
        """Whether an optional body is present."""
        if self.form is not None:
            return "json" in request.headers.get("content-type", "")
        return "transfer-encoding" in request.headers or request.headers.get("content-length", "0") != "0"

    def _validate(self, data: Any) -> Body:
        *others, last = self.bodies
        for kind in others:
            required = [name for name, field in kind.model_fields.items() if field.is_required()]
            if isinstance(data, dict) and all(data.get(name) is not None for name in required):
                return kind.validate_object(data)
        return last.validate_object(data)
