"""Adapters that a request lets this server fetch from the Hugging Face Hub."""

from starlette.requests import Request

from adapters.storage.versions import Version
from server.http.quotas import check_room
from server.openai.body import Body
from server.services import caller_of, check_bound, services_of


class FetchBody(Body):
    """The body of `POST /v1/adapters` in JSON that names where the adapter lies: `hf://OWNER/NAME[@REVISION][/FOLDER]`."""

    name: str
    source: str
    promote: bool = True


async def fetch(request: Request, name: str, source: str, *, param: str, promote: bool = True) -> tuple[Version, bool]:
    """Fetch the adapter and publish it. The version, and whether the name changed.

    Raises what admitting an upload and `Hub` do, of `param`.
    """
    services, caller = services_of(request), caller_of(request)
    publisher, hub = services.registry.publisher, services.registry.hub
    reference = hub.allowed(source, param=param)
    publisher.check_name(name)
    check_bound(caller, name)
    async with hub.staged(reference, param=param) as staging:
        await check_room(request, staging)
        return await publisher.admit(caller.tenant, name, staging, promote=promote, strict_text=False)
