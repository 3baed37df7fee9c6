"""A reverse proxy that serves another server under a prefix, like nginx with `location /prefix/`."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Mount
from starlette.types import Receive, Scope, Send

_HOP_BY_HOP = {b"host", b"connection", b"keep-alive", b"transfer-encoding"}


@contextmanager
def proxied(url: str, prefix: str) -> Iterator[str]:
    """The proxy's address, without the prefix."""

    async def forward(scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        target = scope["raw_path"].decode().removeprefix(prefix) + f"?{scope['query_string'].decode()}"
        headers = [(name, value) for name, value in request.headers.raw if name not in _HOP_BY_HOP]
        async with (
            httpx.AsyncClient(base_url=url, timeout=60) as client,
            client.stream(request.method, target, headers=headers, content=await request.body()) as answer,
        ):
            response = StreamingResponse(answer.aiter_raw(), answer.status_code)
            response.raw_headers = [
                (name.lower(), value) for name, value in answer.headers.raw if name.lower() not in _HOP_BY_HOP
            ]
            await response(scope, receive, send)

    app = Starlette(routes=[Mount(prefix, app=forward)])
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
