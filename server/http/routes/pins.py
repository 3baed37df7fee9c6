"""`/v1/adapters/{name}/pin`: keep the versions that a name serves on the device, even when others need rows.

A pin belongs to the name: it passes to the name's next versions, ends with the name, and survives restarts. The
response does not wait for loading; `warm` does.
"""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapters.peft_format.sizes import device_bytes
from server.errors import Conflict, TooManyRequests, as_not_found
from server.http.objects.adapters import PinObject
from server.http.operations import Operation
from server.services import caller_of, services_of


async def pin(request: Request) -> Response:
    """Pin an adapter to the device. 409 when more would be pinned than `--adapter-pinned-bytes` allows."""
    return await _set_pinned(request, pinned=True)


async def unpin(request: Request) -> Response:
    """Unpin an adapter: it may be evicted again when others need its rows."""
    return await _set_pinned(request, pinned=False)


async def _set_pinned(request: Request, *, pinned: bool) -> Response:
    services, name = services_of(request), request.path_params["name"]
    with as_not_found(name):
        caller = caller_of(request)
        version = await services.registry.find_owned(caller, name)
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
            "bytes_on_device": sum(device_bytes(version.receipt["rows"], linears) for version in pointer.answering),
        },
        headers={"ETag": f'"{pointer.etag}"'},
    )


routes = [
    Operation("POST", "/v1/adapters/{name:path}/pin", pin, response_type=PinObject, errors=(Conflict, TooManyRequests)),
    Operation("DELETE", "/v1/adapters/{name:path}/pin", unpin, response_type=PinObject),
]
