"""`/v1/adapters`: upload, mix, list, inspect, download and delete adapters."""

from functools import partial
from pathlib import Path
from typing import Literal

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from adapters.peft_format.config import MAX_CONFIG_BYTES
from adapters.peft_format.directory import CONFIG_NAME, WEIGHTS_NAME, check_not_swapped
from adapters.peft_format.text import MAX_TEMPLATE_BYTES, MAX_TOKENIZER_BYTES, TEMPLATE_NAME, TOKENIZER_NAME
from adapters.storage.receipt import details_of
from adapters.storage.versions import AmbiguousDigest, Version, split_reference
from server.errors import Conflict, InvalidRequest, as_not_found, disk_faults
from server.http.answer import WholeFile, until_disconnect
from server.http.fetching import FetchBody, fetch
from server.http.mixing import MixBody, mix
from server.http.multipart import Part, read_parts
from server.http.objects.adapters import AdapterObject, AdapterReceipt, DeletedAdapter, ListedAdapter
from server.http.objects.common import ListObject
from server.http.operations import OPEN_ERRORS, PUBLISH_ERRORS, Operation
from server.http.paging import WindowQuery, window
from server.http.quotas import check_storage_quota
from server.http.receipts import list_entry, merge_report, readers, receipt, sort_key
from server.openai.target import text_of
from server.services import Services, caller_of, check_bound, services_of
from server.settings import Settings

_MAX_NAME_BYTES = 1024  # far above the limit of names, so that the error of a long name says so
_MAX_BOOLEAN_BYTES = 64


async def upload_adapter(request: Request, body: FetchBody | MixBody | None = None) -> Response:
    """Upload, fetch or mix an adapter. 201 when the name changed, 200 when it already had this content."""
    services = services_of(request)
    _ = services.engine_info  # nothing can be checked without a base, so refuse before receiving
    await check_storage_quota(request)
    async with services.uploads.slot():
        if isinstance(body, FetchBody):
            fetched = fetch(request, body.name, body.source, param="source", promote=body.promote)
            version, changed = await until_disconnect(request.receive, fetched)
        elif body is not None:
            version, changed = await until_disconnect(request.receive, mix(services, caller_of(request), body))
        else:
            publisher = services.registry.publisher
            async with publisher.staging_directory() as staging:
                with disk_faults():
                    name, promote = await _receive(request, services, staging)
                check_bound(caller_of(request), name)
                await check_storage_quota(request, staging)
                publishing = publisher.publish(caller_of(request).tenant, name, staging, promote=promote)
                version, changed = await until_disconnect(request.receive, publishing)
    content = receipt(services.store, version, version.tenant)
    return JSONResponse(content, status_code=201 if changed else 200, headers=_digest_header(version))


class AdaptersQuery(WindowQuery):
    """`search` is part of a name, in any case, or of a digest; equals in `sort` are ordered by name."""

    search: str = ""
    sort: Literal["name", "created_at", "rank", "bytes", "tier", "requests", "tokens", "last_used"] = "name"
    order: Literal["asc", "desc"] = "asc"


async def list_adapters(request: Request, query: AdaptersQuery) -> Response:
    """List the adapters' receipts by name; all of them unless `limit` and `after` select a page."""
    services, tenant = services_of(request), caller_of(request).tenant
    search = query.search.lower()
    versions = [
        version
        for version in services.registry.list(caller_of(request))
        if search in version.name_for(tenant).lower() or search in version.digest
    ]
    if query.sort != "name":
        versions.sort(key=partial(sort_key, services, tenant, query.sort), reverse=query.order == "desc")
    elif query.order == "desc":
        versions.reverse()
    part, more = window(query, [version.name_for(tenant) for version in versions])
    data = [list_entry(services, version, tenant) for version in versions[part]]
    return JSONResponse({"object": "list", "data": data, "has_more": more, "total": len(versions)})


async def get_adapter(request: Request) -> Response:
    """Get one adapter: its receipt, details from its files, and the versions of its name."""
    services, version, tenant = services_of(request), await _find(request), caller_of(request).tenant
    with as_not_found(version.name):  # it may be deleted concurrently
        pointer = services.store.pointer(version.tenant, version.name)
        async with services.registry.hold(version):
            base = services.engine.info
            read = partial(details_of, version.path, base.linears if base else None)
            details = await services.registry.read(version, read)
            text = await text_of(services, version)
    merged = services.engine.merges.get(version.digest)
    more = {
        "versions": [other.digest for other in pointer.versions],
        "split": dict(pointer.split) or None,
        "shared_with": readers(pointer) if version.tenant == tenant else [],
        "merged": None if merged is None else merge_report(merged),
        **text.details(),
    }
    headers = {**_digest_header(version), "ETag": f'"{pointer.etag}"'}
    return JSONResponse(list_entry(services, version, tenant) | details | more, headers=headers)


async def delete_adapter(request: Request) -> Response:
    """Delete an adapter's name; running requests finish with their version."""
    name = request.path_params["name"]
    with as_not_found(name):
        version = await services_of(request).registry.delete(caller_of(request), name)
    return JSONResponse({"object": "adapter", "name": version.name, "digest": version.digest, "deleted": True})


async def get_config(request: Request) -> Response:
    """Download the adapter_config.json as uploaded."""
    return _StoredFile(services_of(request), await _find(request), CONFIG_NAME, "application/json")


async def get_weights(request: Request) -> Response:
    """Download the adapter_model.safetensors as uploaded."""
    return _StoredFile(services_of(request), await _find(request), WEIGHTS_NAME, "application/octet-stream")


async def _receive(request: Request, services: Services, staging: Path) -> tuple[str, bool]:
    """Write the files to `staging`; return the form's `name` and `promote`."""
    parts = _parts(services.settings, staging)
    values = await read_parts(request, parts, services.uploads.threads)
    promote = values.get("promote", b"true")
    if promote not in (b"true", b"false"):
        raise InvalidRequest("`promote` is `true` or `false`.", param="promote")
    try:
        return values["name"].decode(), promote == b"true"
    except UnicodeDecodeError:
        raise InvalidRequest("The name is not UTF-8.", param="name") from None


def _parts(settings: Settings, directory: Path) -> dict[str, Part]:
    return {
        "name": Part(_MAX_NAME_BYTES),
        "promote": Part(_MAX_BOOLEAN_BYTES, required=False),
        "config": Part(MAX_CONFIG_BYTES, directory / CONFIG_NAME, on_beginning=check_not_swapped),
        "weights": Part(settings.max_upload_bytes, directory / WEIGHTS_NAME),
        "tokenizer": Part(MAX_TOKENIZER_BYTES, directory / TOKENIZER_NAME, required=False),
        "chat_template": Part(MAX_TEMPLATE_BYTES, directory / TEMPLATE_NAME, required=False),
    }


async def _find(request: Request) -> Version:
    """Find the version in the path, `name` or `name@digest-prefix`."""
    reference = request.path_params["name"]
    name, prefix = split_reference(reference)
    try:
        with as_not_found(reference):
            return await services_of(request).registry.find(caller_of(request), name, prefix)
    except AmbiguousDigest:
        raise Conflict(f"Several versions of `{name}` start with {prefix}.", param="name") from None


def _digest_header(version: Version) -> dict[str, str]:
    return {"X-Adapter-Digest": version.digest}


class _StoredFile(Response):
    """A file of a version, leased until it has been sent, even if the name changes meanwhile."""

    def __init__(self, services: Services, version: Version, filename: str, media_type: str) -> None:
        self._services = services
        self._version = version
        headers = {**_digest_header(version), "ETag": f'"{version.digest}"'}
        self._file = WholeFile(version.path / filename, media_type=media_type, filename=filename, headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with as_not_found(self._version.name):  # it may be deleted concurrently
            async with self._services.registry.hold(self._version, verify=True):
                await self._file(scope, receive, send)


# A fine-tune's name contains its base's, which may contain slashes.
routes = [
    Operation(
        "POST",
        "/v1/adapters",
        upload_adapter,
        form=_parts,
        response_type=AdapterReceipt,
        statuses=(200, 201),
        errors=(*OPEN_ERRORS, *PUBLISH_ERRORS),
    ),
    Operation("GET", "/v1/adapters", list_adapters, response_type=ListObject[ListedAdapter]),
    Operation(
        "GET", "/v1/adapters/{name:path}/config", get_config, response_type="application/json", errors=OPEN_ERRORS
    ),
    Operation(
        "GET",
        "/v1/adapters/{name:path}/weights",
        get_weights,
        response_type="application/octet-stream",
        errors=OPEN_ERRORS,
    ),
    Operation("GET", "/v1/adapters/{name:path}", get_adapter, response_type=AdapterObject, errors=OPEN_ERRORS),
    Operation("DELETE", "/v1/adapters/{name:path}", delete_adapter, response_type=DeletedAdapter),
]
