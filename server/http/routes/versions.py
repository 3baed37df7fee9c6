"""`/v1/adapters/{name}/versions`, `promote`, `rollback`: the versions of a name, and changing its pointer under load.

A change takes effect for later requests; running ones keep their version. `If-Match` makes it a compare-and-swap on
the ETag of every response here.
"""

from collections.abc import Awaitable
from typing import Any

from pydantic import Field, model_validator
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapters.storage.store import EtagMismatch
from adapters.storage.versions import AmbiguousDigest, Pointer, UnknownAdapter
from server.errors import Conflict, InvalidRequest, NotFound, PreconditionFailed, as_not_found
from server.http.objects.adapters import Versions
from server.http.operations import Operation
from server.http.receipts import receipt
from server.openai.body import Body, Entries
from server.services import caller_of, services_of


class PromoteBody(Body):
    """Either one version or shares of several."""

    digest: str | None = Field(None, min_length=1)
    split: Entries[str, float] | None = None

    @model_validator(mode="after")
    def _check_choice(self) -> "PromoteBody":
        if (self.digest is None) == (self.split is None):
            raise InvalidRequest("Give either `digest` or `split`.", param="digest")
        return self


async def list_versions(request: Request) -> Response:
    """List the retained versions of a name, the current one first, with their shares of the requests."""
    services, name = services_of(request), request.path_params["name"]
    with as_not_found(name):
        version = await services.registry.find(caller_of(request), name)
        return _versions_response(request, services.store.pointer(version.tenant, version.name))


async def promote(request: Request, body: PromoteBody) -> Response:
    """Promote one version of a name, or split its requests among several."""
    name = await _owned_name(request)
    publisher, expected = services_of(request).registry.publisher, _expected_etags(request)
    tenant = caller_of(request).tenant
    if body.split is None:
        assert body.digest is not None
        return _versions_response(
            request, await _change_pointer(publisher.promote(tenant, name, body.digest, expected), "digest")
        )
    return _versions_response(
        request, await _change_pointer(publisher.split(tenant, name, body.split, expected), "split")
    )


async def roll_back(request: Request) -> Response:
    """Roll back: end a split, or else return to the previous version."""
    name = await _owned_name(request)
    publisher = services_of(request).registry.publisher
    try:
        pointer = await _change_pointer(
            publisher.roll_back(caller_of(request).tenant, name, _expected_etags(request)), "name"
        )
    except NotFound as error:
        raise Conflict(error.message, param="name", code="no_previous_version") from None
    return _versions_response(request, pointer)


async def _owned_name(request: Request) -> str:
    """Return the name in the path, which the caller must own; `name@digest` is not accepted."""
    name: str = request.path_params["name"]
    with as_not_found(name):
        return (await services_of(request).registry.find_owned(caller_of(request), name)).name


async def _change_pointer(change: Awaitable[Pointer], param: str) -> Pointer:
    try:
        return await change
    except UnknownAdapter as fault:
        raise NotFound(f"{fault}.", param=param, code="version_not_found") from None
    except AmbiguousDigest as fault:
        raise Conflict(f"{fault}.", param=param) from None
    except EtagMismatch as fault:
        raise PreconditionFailed(
            f"The name changed meanwhile: its ETag is {fault.etag}.",
            param="If-Match",
            headers={"ETag": f'"{fault.etag}"'},
        ) from None


def _expected_etags(request: Request) -> frozenset[str] | None:
    """Return the ETags that `If-Match` allows; None: any."""
    given = request.headers.get("if-match")
    if given is None or given.strip() == "*":
        return None
    return frozenset(tag.strip().strip('"') for tag in given.split(","))


def _versions_response(request: Request, pointer: Pointer) -> Response:
    store, shares, tenant = services_of(request).store, pointer.shares, caller_of(request).tenant
    data = [
        receipt(store, version, tenant)
        | {
            "current": version is pointer.current,
            "staged": version.staged,
            "share": shares.get(version.digest, 0.0),
        }
        for version in pointer.versions
    ]
    body = {
        "object": "list",
        "name": pointer.current.name_for(tenant),
        "split": dict(pointer.split) or None,
        "data": data,
    }
    return JSONResponse(body, headers={"ETag": f'"{pointer.etag}"'})


_CHANGE_OPTIONS: dict[str, Any] = {
    "response_type": Versions,
    "errors": (Conflict, PreconditionFailed),
    "headers": {"If-Match": "The expected ETag of the versions."},
}
routes = [
    Operation("GET", "/v1/adapters/{name:path}/versions", list_versions, response_type=Versions),
    Operation("POST", "/v1/adapters/{name:path}/promote", promote, **_CHANGE_OPTIONS),
    Operation("POST", "/v1/adapters/{name:path}/rollback", roll_back, **_CHANGE_OPTIONS),
]
