"""A client that checks every response against the OpenAPI document: status, media type and every field of the body."""

import json
from typing import Any

import httpx
import jsonschema_rs
from starlette.applications import Starlette
from starlette.routing import Match

from server.http import openapi
from server.http.operations import Operation
from server.settings import Settings
from server.ui import PATHS as CONSOLE_PATHS


def client_of(app: Starlette, **options: Any) -> httpx.AsyncClient:
    """A client of the whole application, which fails on a response that the document does not describe."""

    async def conforms(response: httpx.Response) -> None:
        await response.aread()
        check_answer(app, response)

    hooks = {"response": [conforms]}
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", event_hooks=hooks, **options)


def check_answer(app: Starlette, response: httpx.Response) -> None:
    """Raises AssertionError."""
    request = response.request
    operation = _operation(app, request.method, request.url.path)
    if operation is None:
        assert response.status_code in (401, 404, 405, 503) or request.url.path in CONSOLE_PATHS, response.text
        return
    if response.status_code == 500:
        assert response.json()["error"]["code"] == "internal_error"
        return
    settings: Settings = app.state.services.settings
    where = f"{operation.method} {operation.path}: {response.status_code} {response.text[:500]}"
    content = _answers(operation, bool(settings.api_key)).get(response.status_code)
    assert content is not None, f"a status that the document does not have: {where}"
    if request.method == "HEAD":
        return
    media_type = response.headers.get("content-type", "").partition(";")[0]
    assert {media_type, "*/*"} & content.keys(), f"a media type that the document does not have: {media_type}, {where}"
    validator = content.get(media_type)
    if validator is None:
        return
    bodies = _events(response.text) if media_type == "text/event-stream" else [response.json()]
    for body in bodies:
        for fault in validator.iter_errors(body):
            raise AssertionError(f"{fault.message} at {fault.instance_path}: {where}")


def _operation(app: Starlette, method: str, path: str) -> Operation | None:
    scope = {"type": "http", "method": method, "path": path, "root_path": ""}
    for route in app.routes:
        if isinstance(route, Operation) and route.matches(scope)[0] is Match.FULL:
            return route
    return None


def _events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    events = [json.loads(line) for line in lines if line != "[DONE]"]
    return [event for event in events if set(event) != {"error"}]


_KNOWN: dict[tuple[str, bool], dict[int, dict[str, Any]]] = {}


def _answers(operation: Operation, keys: bool) -> dict[int, dict[str, Any]]:
    """Status -> media type -> validator of the body, None if the document does not describe it."""
    if (operation.name, keys) not in _KNOWN:
        _KNOWN[operation.name, keys] = _described(operation, keys)
    return _KNOWN[operation.name, keys]


def _described(operation: Operation, keys: bool) -> dict[int, dict[str, Any]]:
    document = openapi.document([operation], Settings(api_key=("key",) if keys else ()), "test")
    components = _closed(document["components"])
    ((methods),) = document["paths"].values()
    (described,) = methods.values()
    return {
        int(status): {name: _validator(name, body, components) for name, body in response["content"].items()}
        for status, response in described["responses"].items()
    }


def _validator(media_type: str, body: dict[str, Any], components: dict[str, Any]) -> Any:
    if "schema" not in body:
        return None
    schema = body["schema"]
    if media_type == "text/event-stream":
        schema = schema["properties"]["data"]["contentSchema"]
    return jsonschema_rs.validator_for({"components": components, **schema})


def _closed(schema: Any) -> Any:
    """The same schema without additional properties, so that undocumented fields are errors."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {key: _closed(value) for key, value in schema.items()}
    return {"additionalProperties": False, **closed} if "properties" in closed else closed
