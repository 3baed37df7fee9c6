"""`/ui`: the console's files. They contain no data of the server and need no key; the page reads the API.

Each file has its own route, so that no path leads to other files. Links are relative, so that the page works under any
prefix of a proxy.
"""

import hashlib
from collections.abc import Awaitable, Callable

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from server.errors import NotFound
from server.ui import FILES, MEDIA_TYPES

_INDEX = "index.html"
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # revalidated by ETag each time, as a new server version has new files
}


async def root(request: Request) -> Response:
    """Redirect browsers to the console; respond 404 to other clients."""
    if "text/html" in request.headers.get("accept", ""):
        return RedirectResponse("ui/")
    raise NotFound("There is nothing at `/`. The API is under `/v1`.")


async def without_slash(request: Request) -> Response:
    """Redirect to `/ui/`, to which the page's links are relative."""
    return RedirectResponse("ui/")


def _file(name: str) -> Callable[[Request], Awaitable[Response]]:
    path = FILES[name]
    content = path.read_bytes()
    headers = {**_HEADERS, "ETag": f'"{hashlib.sha256(content).hexdigest()[:16]}"'}

    async def answer(request: Request) -> Response:
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=MEDIA_TYPES[path.suffix])

    return answer


routes = [
    Route("/", root),
    Route("/ui", without_slash),
    Route("/ui/", _file(_INDEX)),
    *(Route(f"/ui/{name}", _file(name)) for name in FILES if name != _INDEX),
]
