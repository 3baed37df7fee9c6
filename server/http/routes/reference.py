"""`/openapi.json` and `/docs`: the reference of this API, for programs and for people.

On a server with keys they need one: only its users learn its features.
"""

from importlib.metadata import version
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response

from server.http import openapi, reference
from server.http.operations import Operation
from server.services import services_of


async def get_openapi(request: Request) -> Response:
    """Get the OpenAPI 3.1 document."""
    return JSONResponse(_document(request))


async def get_docs(request: Request) -> Response:
    """Get the reference as a page without scripts."""
    headers = {"Content-Security-Policy": reference.CONTENT_SECURITY_POLICY, "X-Content-Type-Options": "nosniff"}
    return HTMLResponse(reference.html(_document(request)), headers=headers)


def _document(request: Request) -> dict[str, Any]:
    """Return the document, built on first use and when keys appear or disappear, as it takes a tenth of a second."""
    state, requires_key = request.app.state, services_of(request).tenants.requires_key
    if getattr(state, "openapi_requires_key", None) != requires_key:
        operations = [route for route in request.app.routes if isinstance(route, Operation)]
        state.openapi = openapi.document(
            operations, services_of(request).settings, version("lorakeet"), requires_key=requires_key
        )
        state.openapi_requires_key = requires_key
    document: dict[str, Any] = state.openapi
    return document


routes = [
    Operation("GET", "/openapi.json", get_openapi, response_type=dict[str, Any]),
    Operation("GET", "/docs", get_docs, response_type="text/html"),
]
