"""`/v1/adapters/{name}/share`: read-only use of an adapter by other tenants, as OWNER/NAME."""

from typing import Annotated, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapters.storage.versions import EVERYBODY
from server.errors import as_not_found
from server.http.objects.adapters import ShareObject
from server.http.operations import Operation
from server.http.receipts import readers
from server.openai.body import Body, Items
from server.services import caller_of, services_of
from server.tenants.caller import tenant_of


class ShareBody(Body):
    """The tenants, or all, which replace the earlier ones. Whether such tenants exist is not revealed."""

    tenants: Items[Annotated[str, Field(pattern="^[a-z0-9-]{1,64}$")]] | Literal["all"]


async def share(request: Request, body: ShareBody) -> Response:
    """Share an adapter with exactly these tenants."""
    return await _set_tenants(
        request, [EVERYBODY] if body.tenants == "all" else [tenant_of(name) for name in body.tenants]
    )


async def unshare(request: Request) -> Response:
    """Stop sharing an adapter; running requests continue."""
    return await _set_tenants(request, [])


async def _set_tenants(request: Request, tenants: list[str]) -> Response:
    registry, caller, name = services_of(request).registry, caller_of(request), request.path_params["name"]
    with as_not_found(name):
        version = await registry.find_owned(caller, name)
        pointer = await registry.publisher.share(caller.tenant, version.name, set(tenants) - {caller.tenant})
    return JSONResponse({"object": "adapter.share", "name": version.name, "tenants": readers(pointer)})


routes = [
    Operation("POST", "/v1/adapters/{name:path}/share", share, response_type=ShareObject),
    Operation("DELETE", "/v1/adapters/{name:path}/share", unshare, response_type=ShareObject),
]
