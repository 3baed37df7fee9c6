"""`/v1/models`: the base and every adapter as OpenAI's model objects, with vLLM's additions.

Clients of Anthropic's API use the same path with other paging parameters; the objects have their fields, too.
"""

import time
from contextlib import nullcontext
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapters.storage.versions import UnknownAdapter, Version
from server.errors import ModelNotFound, NotFound, PermissionDenied
from server.http.objects.common import DeletedObject, ListObject
from server.http.objects.models import ModelCard, ModelDetails
from server.http.operations import OPEN_ERRORS, Operation
from server.http.paging import WindowQuery, page, place, window, window_before
from server.openai.target import has_own_text, text_of
from server.services import Services, caller_of, services_of
from server.tenants.caller import tenant_name

_STARTED = int(time.time())  # the base has no creation time


class ModelsQuery(WindowQuery):
    """Paging: `after_id` is Anthropic's name of `after`; `before_id` requests the page before that model."""

    after_id: str | None = None
    before_id: str | None = None


async def list_models(request: Request, query: ModelsQuery) -> Response:
    """List the base, then the adapters by name; all of them unless `limit` and `after` select a page."""
    services, tenant = services_of(request), caller_of(request).tenant
    versions = services.registry.list(caller_of(request))
    names = [services.settings.base_name, *(version.name_for(tenant) for version in versions)]
    if query.before_id is not None:
        part, more = window_before(query.before_id, query.limit, names)
    else:
        if query.after_id is not None:
            place(query.after_id, names, "after_id")
        part, more = window(query.model_copy(update={"after": query.after_id or query.after}), names)
    cards = [
        _base_card(services) if version is None else _adapter_card(services, version, tenant)
        for version in [None, *versions][part]
    ]
    return page(cards, more)


async def get_model(request: Request) -> Response:
    """Get one model by id: the base, an adapter, or a version of it as `name@digest prefix`."""
    services, model_id = services_of(request), request.path_params["id"]
    if not model_id:
        raise NotFound("No model is named behind `/v1/models/`; the list of all is at `/v1/models`.", param="id")
    if model_id in services.settings.base_aliases:
        return JSONResponse(_base_card(services) | services.text.details())
    if "@" in model_id:
        async with services.registry.open(caller_of(request), model_id, param="model") as version:
            return JSONResponse(await _adapter_details(services, version, caller_of(request).tenant) | {"id": model_id})
    try:
        version = await services.registry.find(caller_of(request), model_id)
        return JSONResponse(await _adapter_details(services, version, caller_of(request).tenant))
    except UnknownAdapter:
        raise ModelNotFound(model_id) from None


async def delete_model(request: Request) -> Response:
    """Delete an adapter's name."""
    services, name = services_of(request), request.path_params["id"]
    if name in services.settings.base_aliases:
        raise PermissionDenied(f"`{name}` is the base model, which cannot be deleted.", param="model")
    try:
        await services.registry.delete(caller_of(request), name)
    except UnknownAdapter:
        raise ModelNotFound(name) from None
    return JSONResponse({"id": name, "object": "model", "deleted": True})


async def _adapter_details(services: Services, version: Version, tenant: str) -> dict[str, Any]:
    """Return the card with stop tokens and formats. Raises UnknownAdapter when the version was removed meanwhile."""
    async with services.registry.hold(version) if has_own_text(services, version) else nullcontext():
        text = await text_of(services, version)
    return _adapter_card(services, version, tenant) | text.details()


def _base_card(services: Services) -> dict[str, Any]:
    name = services.settings.base_name
    return _card(services, name, _STARTED, root=name, parent=None)


def _adapter_card(services: Services, version: Version, tenant: str) -> dict[str, Any]:
    # vLLM's root is the adapter's path; the digest identifies it as well, without revealing paths.
    name, base = version.name_for(tenant), services.settings.base_name
    card = _card(services, name, int(version.created), root=version.digest, parent=base)
    return card if version.tenant == tenant else card | {"owned_by": tenant_name(version.tenant)}


def _card(services: Services, name: str, created: int, *, root: str, parent: str | None) -> dict[str, Any]:
    info = services.engine.info
    longest = info.max_model_len if info else None
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "lorakeet",
        "root": root,
        "parent": parent,
        "max_model_len": longest,
        "permission": [],
        "type": "model",
        "display_name": name,
        "created_at": datetime.fromtimestamp(created, UTC).isoformat().replace("+00:00", "Z"),
        "max_input_tokens": longest,
        "max_tokens": longest,
    }


routes = [
    Operation("GET", "/v1/models", list_models, response_type=ListObject[ModelCard]),
    Operation("GET", "/v1/models/{id:path}", get_model, response_type=ModelDetails, errors=OPEN_ERRORS),
    Operation("DELETE", "/v1/models/{id:path}", delete_model, response_type=DeletedObject, errors=(PermissionDenied,)),
]
