"""Fetching adapters from the Hugging Face Hub on request."""

from starlette.requests import Request

from adapters.storage.versions import Version
from server.http.quotas import check_storage_quota
from server.openai.body import Body
from server.services import caller_of, check_bound, services_of


class FetchBody(Body):
    """The JSON body of `POST /v1/adapters` with a `source` on the hub: `hf://OWNER/NAME[@REVISION][/FOLDER]`."""

    name: str
    source: str
    promote: bool = True


async def fetch(request: Request, name: str, source: str, *, param: str, promote: bool = True) -> tuple[Version, bool]:
    """Fetch the adapter and publish it; return the version and whether the name changed.

    Raises the errors of publishing an upload and of `Hub`, with `param`.
    """
    services, caller = services_of(request), caller_of(request)
    publisher, hub = services.registry.publisher, services.registry.hub
    reference = hub.parse_reference(source, param=param)
    publisher.check_name(name)
    check_bound(caller, name)
    async with hub.fetched(reference, param=param) as staging:
        await check_storage_quota(request, staging)
        return await publisher.publish(caller.tenant, name, staging, promote=promote, strict_text=False)
