"""`/v1/adapters/{name}/pin`: what answers for a name stays on the device, whoever else wants its rows.

The pin is the name's: it goes over to what the name means next, ends with the name, and survives restarts. The answer
comes when it is decided; `warm` waits until the adapter is there.
"""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapters.peft_format.sizes import device_bytes
from server.errors import Conflict, TooManyRequests, known_adapter
from server.http.objects.adapters import PinObject
from server.http.operations import Operation
from server.services import caller_of, services_of


async def pin(request: Request) -> Response:
    """Keep it. 409 when more would be pinned than `--adapter-pinned-bytes` allows."""
    return await _answer(request, pinned=True)


async def unpin(request: Request) -> Response:
    """Let it go when others need its rows."""
    return await _answer(request, pinned=False)


async def _answer(request: Request, *, pinned: bool) -> Response:
    services, name = services_of(request), request.path_params["name"]
    with known_adapter(name):
        caller = caller_of(request)
        version = await services.registry.own(caller, name)
        if pinned:
            answering = services.store.pointer(caller.tenant, version.name).answering
            caller.allowance.check_rows(services.registry.rows(caller, answering))
        pointer = await services.registry.publisher.pin(caller.tenant, version.name, pinned)
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


routes = [
    Operation("POST", "/v1/adapters/{name:path}/pin", pin, answers=PinObject, refuses=(Conflict, TooManyRequests)),
    Operation("DELETE", "/v1/adapters/{name:path}/pin", unpin, answers=PinObject),
]
