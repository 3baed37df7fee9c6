"""The application's OpenAPI 3.1 document, generated from its operations: signatures, docstrings and errors."""

import inspect
import re
import sys
from collections.abc import Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Any

import msgspec
from pydantic.json_schema import JsonSchemaMode, models_json_schema

from server.errors import (
    InvalidApiKey,
    InvalidRequest,
    LorakeetError,
    NotFound,
    PermissionDenied,
    RequestTimeout,
    RequestTooLarge,
    StorageFull,
    Unavailable,
    UnsupportedMediaType,
)
from server.http.middleware import METRICS, OPEN_PATHS, open_paths
from server.http.operations import Operation
from server.openai.body import Body
from server.settings import Settings

_COMPONENTS = "#/components/schemas/"
_DESCRIPTION = """One quantised base model, many LoRA adapters, fine-tuning beside them.

`null` means not given. A field that is not listed is refused, unless it is `null`. Every response has an `X-Request-Id`
and a generated one the adapter's digest in `X-Adapter-Digest`. With 429 and 503, `Retry-After` is the time to wait."""


def document(
    operations: Sequence[Operation], settings: Settings, version: str, *, requires_key: bool = False
) -> dict[str, Any]:
    """Return the document of all operations as plain data. `requires_key`: requests need a key."""
    types = [
        kind
        for o in operations
        for kind in (o.response_type, o.events, o.error_type)
        if not (kind is None or isinstance(kind, str))
    ]
    kinds = list({repr(kind): kind for kind in types}.values())
    refs, schemas = msgspec.json.schema_components(kinds, ref_template=f"{_COMPONENTS}{{name}}")
    bodies = dict.fromkeys(kind for o in operations for kind in o.bodies)
    inputs: list[tuple[type[Body], JsonSchemaMode]] = [(kind, "validation") for kind in bodies]
    named, definitions = models_json_schema(inputs, ref_template=f"{_COMPONENTS}{{model}}")
    schemas |= definitions.get("$defs", {})
    refs_by_type = dict(zip(map(repr, kinds), refs, strict=True)) | {
        repr(kind): ref for (kind, _), ref in named.items()
    }
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        path = re.sub(r"{(\w+):path}", r"{\1}", operation.path)
        paths.setdefault(path, {})[operation.method.lower()] = _operation(operation, settings, refs_by_type)
    described: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "Lorakeet", "version": version, "description": _DESCRIPTION},
        "tags": [{"name": tag, "description": text} for tag, text in dict(map(_tag, operations)).items()],
        "paths": paths,
        "components": {"schemas": _untitled(dict(sorted(schemas.items())))},
    }
    if requires_key:
        described["security"] = [{"key": []}]
        described["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return described


def errors_by_status(operation: Operation, settings: Settings) -> dict[int, list[type[LorakeetError]]]:
    """Return an operation's errors by status."""
    found: list[type[LorakeetError]] = []
    if operation.path not in open_paths(settings) or operation.path == METRICS:  # if there are keys
        found += [InvalidApiKey, PermissionDenied]
    if operation.path not in OPEN_PATHS:
        found.append(Unavailable)
    if operation.bodies or operation.form:
        found += [InvalidRequest, RequestTimeout, RequestTooLarge]
    if operation.bodies:
        found.append(UnsupportedMediaType)
    if operation.param_convertors:
        found += [InvalidRequest, NotFound]
    if operation.query:
        found.append(InvalidRequest)
    if (operation.methods or set()) - {"GET", "HEAD"}:
        found.append(StorageFull)
    by_status: dict[int, list[type[LorakeetError]]] = {}
    for error in dict.fromkeys([*found, *operation.errors]):
        by_status.setdefault(error.status, []).append(error)
    return dict(sorted(by_status.items()))


def _operation(operation: Operation, settings: Settings, refs_by_type: dict[str, Any]) -> dict[str, Any]:
    summary, _, more = inspect.cleandoc(operation.handler.__doc__ or "").partition("\n\n")
    described: dict[str, Any] = {
        "operationId": operation.name,
        "summary": " ".join(summary.split()),
        "tags": [_tag(operation)[0]],
        "parameters": _parameters(operation),
        "responses": _responses(operation, settings, refs_by_type),
    }
    if more:
        described["description"] = more
    if content := _request_content(operation, settings, refs_by_type):
        required = operation.body_required or operation.form is not None
        described["requestBody"] = {"required": required, "content": content}
    if operation.path in open_paths(settings):
        described["security"] = []
    return described


def _tag(operation: Operation) -> tuple[str, str]:
    """Return the name of the resource's module and the first line of its docstring."""
    module = sys.modules[operation.handler.__module__]
    return module.__name__.rpartition(".")[2], inspect.cleandoc(module.__doc__ or "").partition("\n")[0]


def _parameters(operation: Operation) -> list[dict[str, Any]]:
    parameters: list[dict[str, Any]] = []
    for name in operation.param_convertors:
        parameter: dict[str, Any] = {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        if f"{{{name}:path}}" in operation.path:
            parameter["description"] = "May have slashes."
        parameters.append(parameter)
    if operation.query is not None:
        schema = _untitled(operation.query.model_json_schema())
        for name, property_ in schema["properties"].items():
            described = _not_null(property_)
            style = {"style": "deepObject", "explode": True} if described.get("type") == "object" else {}
            parameters.append({"name": name, "in": "query", "schema": described} | style)
    for name, text in operation.headers.items():
        parameters.append({"name": name, "in": "header", "schema": {"type": "string"}, "description": text})
    return parameters


def _request_content(operation: Operation, settings: Settings, refs_by_type: dict[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if operation.form is not None:
        parts = operation.form(settings, Path())
        properties = {
            name: {
                "type": "string",
                "maxLength": part.max_bytes,
                **({} if part.path is None else {"contentMediaType": "application/octet-stream"}),
            }
            for name, part in parts.items()
        }
        content["multipart/form-data"] = {
            "schema": {
                "type": "object",
                "properties": properties,
                "required": [name for name, part in parts.items() if part.required],
                "additionalProperties": False,
            }
        }
    if operation.bodies:
        refs = [refs_by_type[repr(kind)] for kind in operation.bodies]
        content["application/json"] = {"schema": refs[0] if len(refs) == 1 else {"anyOf": refs}}
    return content


def _responses(operation: Operation, settings: Settings, refs_by_type: dict[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if isinstance(operation.response_type, str):
        content = {media_type: {} for media_type in operation.response_type.split(", ")}
    elif operation.response_type is not None:
        content["application/json"] = {"schema": refs_by_type[repr(operation.response_type)]}
    if operation.events is not None:
        event = refs_by_type[repr(operation.events)]
        text = "JSON of this schema. A generation ends with `[DONE]`, which is not JSON."
        data = {"type": "string", "description": text, "contentSchema": event}
        schema = {"type": "object", "properties": {"data": data}, "required": ["data"]}  # schema of one event
        content["text/event-stream"] = {"schema": schema}
    responses: dict[str, Any] = {
        str(status): {"description": HTTPStatus(status).phrase, "content": content} for status in operation.statuses
    }
    error = {"application/json": {"schema": refs_by_type[repr(operation.error_type)]}}
    for status, errors in errors_by_status(operation, settings).items():
        texts = [(kind.__doc__ or "").partition(": ")[2].partition("\n")[0] for kind in errors]
        described = {"description": " ".join(text[:1].upper() + text[1:] for text in texts), "content": error}
        responses.setdefault(str(status), described)
    return responses


def _not_null(schema: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of a query parameter without null, which a query cannot express."""
    kinds = [kind for kind in schema.get("anyOf", ()) if kind != {"type": "null"}]
    rest = {key: value for key, value in schema.items() if key != "anyOf" and (key, value) != ("default", None)}
    return rest | kinds[0] if kinds else rest


def _untitled(schema: Any) -> Any:
    """Return the schema without titles, which only repeat names in capitals."""
    if isinstance(schema, list):
        return [_untitled(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    return {key: _untitled(value) for key, value in schema.items() if key != "title" or not isinstance(value, str)}
