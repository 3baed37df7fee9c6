"""`/v1/admin/tenants` and `/v1/admin/keys`: tenants, their limits and their keys.

An admin of the default tenant is the server's operator and sees all tenants; another admin sees its own.
"""

import asyncio
import time
from typing import Annotated, Any

from msgspec.structs import asdict
from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapters.storage.versions import MAX_NAME
from server.errors import Conflict, InvalidRequest, NotFound
from server.http.objects.common import DeletedObject, ListObject
from server.http.objects.server import KeyObject, NewKeyObject, TenantObject
from server.http.operations import Operation
from server.http.paging import WindowQuery, page, window
from server.openai.body import Body, Items
from server.services import Services, caller_of, services_of
from server.tenants.caller import Role, tenant_name, tenant_of
from server.tenants.limits import Limits
from server.tenants.rolls import Key, Tenant

_MAX_DAYS = 36_500
Limit = Annotated[int | None, Field(ge=1, le=2**53)]


class LimitsBody(Body):
    """Limits of one tenant; a missing field means no limit."""

    requests_per_minute: Limit = None
    tokens_per_minute: Limit = None
    running: Limit = None
    device_rows: Limit = None
    stored_bytes: Limit = None
    training_jobs: Limit = None
    training_tokens_per_day: Limit = None
    weight: float = Field(default=1.0, ge=0.01, le=100)

    def limits(self) -> Limits:
        return Limits(**self.model_dump())


class TenantBody(Body):
    """A new tenant."""

    id: str = Field(min_length=1, max_length=64)
    limits: LimitsBody = LimitsBody()


class TenantChange(Body):
    """Limits that replace the tenant's present ones."""

    limits: LimitsBody


class KeyBody(Body):
    """A new key's permissions. Without `expires_in_days` it never expires; `adapters` limits it to these."""

    tenant: str | None = Field(None, min_length=1, max_length=64)
    name: str = Field("", max_length=128)
    roles: Items[Role] = Field(["serve"], min_length=1, max_length=8)
    adapters: Items[Annotated[str, Field(min_length=1, max_length=MAX_NAME)]] | None = Field(None, max_length=1024)
    expires_in_days: float | None = Field(None, gt=0, le=_MAX_DAYS)


class KeysQuery(WindowQuery):
    """`tenant` selects the keys of one tenant."""

    tenant: str | None = None


async def list_tenants(request: Request, query: WindowQuery) -> Response:
    """List the tenants by id, the default one first; all of them unless `limit` and `after` select a page."""
    tenants, own = services_of(request).tenants.tenants, caller_of(request).visible_tenant
    ids = sorted(tenants if own is None else [own])
    part, more = window(query, [tenant_name(id_) for id_ in ids])
    return page([_tenant(tenants[id_]) for id_ in ids[part]], more)


async def create_tenant(request: Request, body: TenantBody) -> Response:
    """Create a tenant, without keys."""
    tenant = await asyncio.to_thread(services_of(request).tenants.create_tenant, body.id, body.limits.limits())
    return JSONResponse(_tenant(tenant), status_code=201)


async def get_tenant(request: Request) -> Response:
    """Get one tenant."""
    return JSONResponse(_tenant(_visible(request, request.path_params["id"])))


async def change_tenant(request: Request, body: TenantChange) -> Response:
    """Change a tenant's limits."""
    tenant = _visible(request, request.path_params["id"])
    changed = await asyncio.to_thread(services_of(request).tenants.set_limits, tenant.id, body.limits.limits())
    return JSONResponse(_tenant(changed))


async def delete_tenant(request: Request) -> Response:
    """Delete a tenant and its keys; it must have no adapters and no files."""
    services, tenant = services_of(request), _visible(request, request.path_params["id"])
    files = services.tuning.files.page
    if services.store.list(tenant.id) or (await asyncio.to_thread(files, tenant.id, limit=1))[0]:
        raise Conflict("The tenant has adapters or files; delete them first.", param="id", code="tenant_not_empty")
    await asyncio.to_thread(services.tenants.delete_tenant, tenant.id)
    return JSONResponse({"id": tenant.id, "object": "tenant", "deleted": True})


async def list_keys(request: Request, query: KeysQuery) -> Response:
    """List the keys by age, without secrets; all of them unless `limit` and `after` select a page."""
    tenants, own = services_of(request).tenants, caller_of(request).visible_tenant
    tenant = own if query.tenant is None else _visible(request, query.tenant).id
    keys = [key for key in list(tenants.keys.values()) if tenant in (None, key.tenant)]
    keys.sort(key=lambda key: (key.created_at, key.id))
    part, more = window(query, [key.id for key in keys])
    return page([_key(services_of(request), key) for key in keys[part]], more)


async def create_key(request: Request, body: KeyBody) -> Response:
    """Create a key. Its `secret` is in this response only and cannot be retrieved later."""
    services = services_of(request)
    tenant = caller_of(request).tenant if body.tenant is None else _visible(request, body.tenant).id
    if body.adapters is not None and "admin" in body.roles:
        raise InvalidRequest("`adapters`: an admin's key cannot be bound to adapters.", param="adapters")
    key, secret = await asyncio.to_thread(
        services.tenants.create_key,
        tenant,
        body.roles,
        name=body.name,
        adapters=body.adapters,
        expires_at=None if body.expires_in_days is None else int(time.time() + body.expires_in_days * 86400),
    )
    headers = {"Cache-Control": "no-store"}
    return JSONResponse(_key(services, key) | {"secret": secret}, status_code=201, headers=headers)


async def get_key(request: Request) -> Response:
    """Get one key, without its secret."""
    services = services_of(request)
    return JSONResponse(
        _key(services, services.tenants.key(caller_of(request).visible_tenant, request.path_params["id"]))
    )


async def revoke_key(request: Request) -> Response:
    """Revoke a key; it stays in the list."""
    services = services_of(request)
    key = services.tenants.key(caller_of(request).visible_tenant, request.path_params["id"])
    return JSONResponse(_key(services, await asyncio.to_thread(services.tenants.revoke, key)))


def _visible(request: Request, name: str) -> Tenant:
    """Return the tenant of this name. Raises NotFound, also for tenants that the caller may not see."""
    return services_of(request).tenants.tenant(tenant_of(name), caller_of(request).visible_tenant)


def _tenant(tenant: Tenant) -> dict[str, Any]:
    return {
        "object": "tenant",
        "id": tenant_name(tenant.id),
        "created_at": tenant.created_at or None,
        "limits": asdict(tenant.limits),
    }


def _key(services: Services, key: Key) -> dict[str, Any]:
    return {
        "object": "key",
        "id": key.id,
        "tenant": tenant_name(key.tenant),
        "name": key.name,
        "roles": key.roles,
        "adapters": key.adapters,
        "created_at": key.created_at,
        "expires_at": key.expires_at,
        "revoked_at": key.revoked_at,
        "last_used_at": services.tenants.last_used(key),
    }


routes = [
    Operation("GET", "/v1/admin/tenants", list_tenants, response_type=ListObject[TenantObject]),
    Operation(
        "POST", "/v1/admin/tenants", create_tenant, response_type=TenantObject, statuses=(201,), errors=(Conflict,)
    ),
    Operation("GET", "/v1/admin/tenants/{id}", get_tenant, response_type=TenantObject),
    Operation("POST", "/v1/admin/tenants/{id}", change_tenant, response_type=TenantObject),
    Operation("DELETE", "/v1/admin/tenants/{id}", delete_tenant, response_type=DeletedObject, errors=(Conflict,)),
    Operation("GET", "/v1/admin/keys", list_keys, response_type=ListObject[KeyObject], errors=(NotFound,)),
    Operation("POST", "/v1/admin/keys", create_key, response_type=NewKeyObject, statuses=(201,), errors=(NotFound,)),
    Operation("GET", "/v1/admin/keys/{id}", get_key, response_type=KeyObject),
    Operation("DELETE", "/v1/admin/keys/{id}", revoke_key, response_type=KeyObject, errors=(Conflict,)),
]
