"""`/v1/adapters/{name}/pin`: what answers for a name stays on the device, whoever else wants its rows.

The pin is the name's: it goes over to what the name means next, ends with the name, and survives restarts. The answer
comes when it is decided; `warm` waits until the adapter is there.
"""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from adapters.peft_format.sizes import device_bytes
from adapters.storage.versions import UnknownAdapter
from server.http.routes.adapters import unknown_adapter
from server.services import TENANT, services_of


async def pin(request: Request) -> Response:
    """Keep it. 409 when more would be pinned than `--adapter-pinned-bytes` allows."""
    return await _answer(request, pinned=True)


async def unpin(request: Request) -> Response:
    """Let it go when others need its rows."""
    return await _answer(request, pinned=False)


async def _answer(request: Request, *, pinned: bool) -> Response:
    services, name = services_of(request), request.path_params["name"]
    try:
        version = await services.intake.find(TENANT, name)
        pointer = await services.intake.pin(TENANT, version.name, pinned)
    except UnknownAdapter:
        raise unknown_adapter(name) from None
    linears = services.engine_info.linears
    return JSONResponse(
        {
            "object": "adapter.pin",
            "name": version.name,
            "pinned": pointer.pinned,
            "digests": list(pointer.shares),
            "bytes_on_device": sum(device_bytes(one.receipt["rows"], linears) for one in pointer.answering),
        },
        headers={"ETag": f'"{pointer.etag}"'},
    )


routes: list[BaseRoute] = [
    Route("/v1/adapters/{name:path}/pin", pin, methods=["POST"]),
    Route("/v1/adapters/{name:path}/pin", unpin, methods=["DELETE"]),
]
