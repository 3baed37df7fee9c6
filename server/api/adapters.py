"""`/v1/adapters`: upload, list, look at, download and delete adapters."""

import asyncio
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from adapters.config import MAX_CONFIG_BYTES
from adapters.format import CONFIG_NAME, WEIGHTS_NAME
from adapters.store import AdapterStore, AmbiguousDigest, Staging, UnknownAdapter, Version
from server.errors import Conflict, InvalidRequest, NotFound, TooManyRequests, shown
from server.intake import disk_faults
from server.multipart import Part, read_parts
from server.services import TENANT, Services, services_of

_MAX_NAME_BYTES = 1024  # far more than a name may have, so that an over-long one is answered as such
_SLOT_SECONDS = 30.0


async def upload(request: Request) -> Response:
    """Receive an adapter. 201 when the name's content changed, 200 when it was current already."""
    services = services_of(request)
    _ = services.intake.base  # without a base nothing can be checked, so do not receive it either
    await _take_slot(services)
    try:
        async with services.intake.stage() as staging:
            with disk_faults():
                name = await _receive(request, services, staging)
            version, changed = await services.intake.admit(TENANT, name, staging)
    finally:
        services.intake.upload_slots.release()
    return JSONResponse(receipt(version), status_code=201 if changed else 200, headers=_digest_header(version))


async def list_adapters(request: Request) -> Response:
    """Every adapter's receipt, by name."""
    data = [receipt(version) for version in services_of(request).store.list(TENANT)]
    return JSONResponse({"object": "list", "data": data})


async def get_adapter(request: Request) -> Response:
    """One adapter's receipt, with the digests that its name has had."""
    version = await _find(request)
    versions = [other.digest for other in services_of(request).store.versions(TENANT, version.name)]
    return JSONResponse(receipt(version) | {"versions": versions}, headers=_digest_header(version))


async def delete_adapter(request: Request) -> Response:
    """Take the name away; requests that run finish with the version they began with."""
    name = request.path_params["name"]
    try:
        version = await services_of(request).intake.delete(TENANT, name)
    except UnknownAdapter:
        raise _unknown(name) from None
    return JSONResponse({"object": "adapter", "name": version.name, "digest": version.digest, "deleted": True})


async def get_config(request: Request) -> Response:
    """The adapter_config.json as it was uploaded."""
    return _StoredFile(services_of(request).store, await _find(request), CONFIG_NAME, "application/json")


async def get_weights(request: Request) -> Response:
    """The adapter_model.safetensors as it was uploaded."""
    return _StoredFile(services_of(request).store, await _find(request), WEIGHTS_NAME, "application/octet-stream")


def receipt(version: Version) -> dict[str, Any]:
    """What an owner wants to check after an upload: that it is the adapter, and all of it."""
    return {
        "object": "adapter",
        "name": version.name,
        "digest": version.digest,
        "created_at": int(version.created),
        **version.receipt,
    }


async def _take_slot(services: Services) -> None:
    try:
        async with asyncio.timeout(_SLOT_SECONDS):
            await services.intake.upload_slots.acquire()
    except TimeoutError:
        message = f"{services.settings.max_uploads} uploads are being received already."
        raise TooManyRequests(message, retry_after=int(_SLOT_SECONDS)) from None


async def _receive(request: Request, services: Services, staging: Staging) -> str:
    """Write the files to `staging`; returns the name."""
    parts = {
        "name": Part(_MAX_NAME_BYTES),
        "config": Part(MAX_CONFIG_BYTES, staging.path / CONFIG_NAME),
        "weights": Part(services.settings.max_upload_bytes, staging.path / WEIGHTS_NAME),
    }
    values = await read_parts(request, parts)
    try:
        return values["name"].decode()
    except UnicodeDecodeError:
        raise InvalidRequest("The name is not UTF-8.", param="name") from None


async def _find(request: Request) -> Version:
    """The version named in the path, `name` or `name@digest-prefix`."""
    asked = request.path_params["name"]
    name, _, prefix = asked.partition("@")
    try:
        return await services_of(request).intake.find(TENANT, name, prefix or None)
    except UnknownAdapter:
        raise _unknown(asked) from None
    except AmbiguousDigest:
        raise Conflict(f"Several versions of `{name}` start with {prefix}.", param="name") from None


def _unknown(name: str) -> NotFound:
    return NotFound(f"The adapter `{shown(name)}` does not exist.", param="name", code="adapter_not_found")


def _digest_header(version: Version) -> dict[str, str]:
    return {"X-Adapter-Digest": version.digest}


class _StoredFile(Response):
    """A file of a version, which stays on disk until it has been sent, whatever happens to the name meanwhile."""

    def __init__(self, store: AdapterStore, version: Version, filename: str, media_type: str) -> None:
        self._store = store
        self._version = version
        headers = {**_digest_header(version), "ETag": f'"{version.digest}"', "Accept-Ranges": "none"}
        self._file = FileResponse(version.path / filename, media_type=media_type, filename=filename, headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Always the whole file: starlette words a faulty Range in an error shape of its own.
        whole = {**scope, "headers": [(name, value) for name, value in scope["headers"] if name != b"range"]}
        try:
            with self._store.lease(self._version):
                await self._file(whole, receive, send)
        except UnknownAdapter:  # deleted this very moment
            raise _unknown(self._version.name) from None


# A fine-tune's name contains its base's, which may have slashes.
routes: list[BaseRoute] = [
    Route("/v1/adapters", upload, methods=["POST"]),
    Route("/v1/adapters", list_adapters, methods=["GET"]),
    Route("/v1/adapters/{name:path}/config", get_config, methods=["GET"]),
    Route("/v1/adapters/{name:path}/weights", get_weights, methods=["GET"]),
    Route("/v1/adapters/{name:path}", get_adapter, methods=["GET"]),
    Route("/v1/adapters/{name:path}", delete_adapter, methods=["DELETE"]),
]
