"""`/v1/adapters/{name}/merge`: an adapter merged into the base as a Hugging Face checkpoint, to be fetched and removed.

A checkpoint belongs to a version: it lies in `data_dir/checkpoints` under the version's digest, whole or not at all.
"""

import asyncio
import shutil
import uuid
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import BaseRoute, Route

from adapters.store import Version
from server.api.body import Body
from server.api.target import hold
from server.errors import InvalidRequest, NotFound, TooManyRequests, shown
from server.intake import disk_faults
from server.models import resolve
from server.services import Services, services_of
from server.worker import WorkerTooSlow, run_worker

_SECONDS = 3600.0
_at_work: set[Path] = set()  # one process serves one data directory


class MergeBody(Body):
    """What to make of it."""

    to: Literal["checkpoint"] = Field(...)


async def make_checkpoint(request: Request) -> Response:
    """Write W + BA in bfloat16. 201 when it was made, 200 when it was there."""
    services, name = services_of(request), request.path_params["name"]
    await MergeBody.read(request)
    with ExitStack() as held:
        version = await hold(services, name, "name", None, held)
        target = _directory(services, version)
        if target.is_dir():
            return _receipt(version, target, 200)
        if _at_work:
            raise TooManyRequests("A checkpoint is being made already.", retry_after=30)
        _at_work.add(target)
        try:
            await _make(services, version, target)
        finally:
            _at_work.discard(target)
    return _receipt(version, target, 201)


async def get_file(request: Request) -> Response:
    """One file of the checkpoint."""
    target, wanted = await _existing(request), request.path_params["file"]
    if wanted not in {path.name for path in target.iterdir()}:
        raise NotFound(f"The checkpoint has no file `{shown(wanted)}`.", param="file")
    return FileResponse(target / wanted, filename=wanted, headers={"Accept-Ranges": "none"})


async def get_checkpoint(request: Request) -> Response:
    """The files of the checkpoint."""
    with ExitStack() as held:
        version = await hold(services_of(request), request.path_params["name"], "name", None, held)
    return _receipt(version, await _existing(request), 200)


async def delete_checkpoint(request: Request) -> Response:
    """Remove the checkpoint; the adapter stays."""
    target = await _existing(request)
    doomed = target.with_name(f".{uuid.uuid4().hex}")
    target.rename(doomed)
    await run_in_threadpool(shutil.rmtree, doomed, ignore_errors=True)
    return JSONResponse({"object": "checkpoint", "name": request.path_params["name"], "deleted": True})


async def _make(services: Services, version: Version, target: Path) -> None:
    settings = services.settings
    base = await asyncio.to_thread(resolve, settings.model, settings.cache_dir)
    work = target.with_name(f".{uuid.uuid4().hex}")
    try:
        with disk_faults():
            await asyncio.to_thread(_clear, target.parent)
            work.mkdir(mode=0o700)
            order = {"base": str(base), "adapter": str(version.path), "target": str(work)}
            await run_worker("adapters.merge", order, _SECONDS)
            work.rename(target)
    except WorkerTooSlow:
        message = f"Merging took more than {_SECONDS:g} s."
        raise InvalidRequest(message, param="to", code="merge_too_slow") from None
    finally:
        await run_in_threadpool(shutil.rmtree, work, ignore_errors=True)


def _clear(checkpoints: Path) -> None:
    """Make the directory, and remove what was left of work that was cut off."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    for left in checkpoints.glob(".*"):
        shutil.rmtree(left, ignore_errors=True)


def _directory(services: Services, version: Version) -> Path:
    return services.settings.data_dir / "checkpoints" / version.digest.removeprefix("sha256:")


async def _existing(request: Request) -> Path:
    services, name = services_of(request), request.path_params["name"]
    with ExitStack() as held:
        target = _directory(services, await hold(services, name, "name", None, held))
    if not target.is_dir():
        raise NotFound(f"`{shown(name)}` has no merged checkpoint.", param="name", code="checkpoint_not_found")
    return target


def _receipt(version: Version, target: Path, status: int) -> Response:
    files = {path.name: path.stat().st_size for path in sorted(target.iterdir())}
    body: dict[str, Any] = {
        "object": "checkpoint",
        "name": version.name,
        "digest": version.digest,
        "dtype": "bfloat16",
        "bytes": sum(files.values()),
        "files": [{"name": name, "bytes": size} for name, size in files.items()],
    }
    return JSONResponse(body, status_code=status, headers={"X-Adapter-Digest": version.digest})


routes: list[BaseRoute] = [
    Route("/v1/adapters/{name:path}/merge/{file}", get_file, methods=["GET"]),
    Route("/v1/adapters/{name:path}/merge", make_checkpoint, methods=["POST"]),
    Route("/v1/adapters/{name:path}/merge", get_checkpoint, methods=["GET"]),
    Route("/v1/adapters/{name:path}/merge", delete_checkpoint, methods=["DELETE"]),
]
