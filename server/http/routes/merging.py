"""`/v1/adapters/{name}/merge`: an adapter merged into the base, as a checkpoint to download or resident for serving.

Both belong to a version. A checkpoint is in `data_dir/checkpoints` under the version's digest, complete or absent.
A resident merge is in the engine until it is deleted, the engine ends, or no name has the version any more.
"""

import asyncio
import shutil
import uuid
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapters.offline.recipe import MergedDtype
from adapters.storage.versions import UnknownAdapter, Version, split_reference
from server.children.helper import HelperLimit, ask_once
from server.client.engine import MergeRefused
from server.errors import (
    Conflict,
    InternalError,
    InvalidRequest,
    LorakeetError,
    ModelNotFound,
    NotFound,
    StorageFull,
    TooManyRequests,
    disk_faults,
    printable,
)
from server.http.answer import WholeFile
from server.http.objects.adapters import DeletedMerge, MergeObject
from server.http.operations import OPEN_ERRORS, PUBLISH_ERRORS, Operation
from server.http.paging import Query
from server.http.receipts import merge_report
from server.messages.protocol import LOAD_FAILED
from server.model_source import resolve
from server.openai.body import Body, Items
from server.openai.target import adapter_ref
from server.services import Services, caller_of, services_of
from server.tenants.caller import Caller

MAX_PROMPTS = 16
MAX_PROMPT_TOKENS = 256
_PROMPTS = (
    "The capital of France is Paris, and the river that runs through it is the Seine.",
    "def add(a, b):\n    return a + b\n\nprint(add(2, 3))\n",
    "Question: Why is the sky blue?\nAnswer: Because air scatters short waves of light more than long ones.",
    "Dear Ms Smith, thank you for your order. It was sent on Monday and should arrive within three days.",
)
_REFUSALS: dict[str, Callable[[str], LorakeetError]] = {
    "merge_too_large": partial(StorageFull, param="dtype", code="merge_too_large"),
    "merge_busy": partial(TooManyRequests, retry_after=30),
    "merge_exists": partial(Conflict, param="dtype", code="merge_exists"),
    "merge_given_up": partial(Conflict, param="name", code="merge_given_up"),
    "merge_failed": lambda message: InternalError("The adapter could not be merged."),
    LOAD_FAILED: lambda message: InternalError("The adapter could not be loaded."),
}


class MergeBody(Body):
    """The kind of merge and its options."""

    to: Literal["checkpoint", "resident"] = Field(...)
    dtype: MergedDtype | None = None
    prompts: Items[Annotated[str, Field(min_length=1)]] | None = Field(None, min_length=1, max_length=MAX_PROMPTS)

    @model_validator(mode="after")
    def _check_kind(self) -> Self:
        if self.to == "resident" and self.dtype is None:
            raise InvalidRequest("A resident merge needs a `dtype`: `nf4` or `bf16`.", param="dtype")
        for field in ("dtype", "prompts"):
            if self.to == "checkpoint" and getattr(self, field) is not None:
                raise InvalidRequest(f"A checkpoint has no `{field}`: it is bfloat16.", param=field)
        return self


class DeleteMergeQuery(Query):
    to: Literal["checkpoint", "resident"] | None = None


async def merge(request: Request, body: MergeBody) -> Response:
    """Merge an adapter. 201 when the merge was made, 200 when it existed."""
    services = services_of(request)
    to_checkpoint = body.dtype is None
    caller, name = caller_of(request), request.path_params["name"]
    await _check_owner(services, caller, name)
    async with services.registry.open(caller, name, param="name", verify=to_checkpoint) as version:
        if body.dtype is None:
            return await _merge_to_checkpoint(services, version)
        return await _merge_resident(services, version, body.dtype, body.prompts or _PROMPTS)


async def _merge_resident(services: Services, version: Version, dtype: MergedDtype, texts: Sequence[str]) -> Response:
    """Serve the version on merged weights, and respond with the merge's report."""
    if variants := version.receipt.get("variants"):
        instead = ": it can be merged to a `checkpoint`" if list(variants) == ["experts"] else ""
        message = f"Only plain LoRA can be merged to be `resident`, not {', '.join(variants)}{instead}."
        raise InvalidRequest(message, param="to", code="unsupported_adapter_feature")
    replaced = Conflict(f"No name points at {version.digest}; merge a version that serves requests.", param="name")
    if not services.store.is_answering(version.digest):
        raise replaced
    prompts = await services.text.encode(texts, add_special_tokens=True, max_tokens=MAX_PROMPT_TOKENS, param="prompts")
    for i, ids in enumerate(prompts):
        if not 0 < len(ids) <= MAX_PROMPT_TOKENS:
            message = f"`prompts.{i}` has {len(ids)} tokens; 1 to {MAX_PROMPT_TOKENS} are accepted."
            raise InvalidRequest(message, param=f"prompts.{i}")
    is_merged = version.digest in services.engine.merges
    try:
        report = await services.engine.merge(adapter_ref(version), dtype, prompts)
    except MergeRefused as refusal:
        make_error = _REFUSALS.get(refusal.code)
        if make_error is not None:
            raise make_error(f"{refusal}.") from None
        raise InvalidRequest(f"{refusal}.", param="to", code=refusal.code) from None
    if not services.store.is_answering(version.digest):  # replaced while the merge was built
        await services.engine.unmerge(version.digest)
        raise replaced
    more = {} if is_merged else {"prompts": list(texts)}
    body = {"object": "merge", "name": version.name, "digest": version.digest, "resident": merge_report(report) | more}
    return JSONResponse(body, status_code=200 if is_merged else 201, headers={"X-Adapter-Digest": version.digest})


async def _merge_to_checkpoint(services: Services, version: Version) -> Response:
    """Write W + BA as a bfloat16 checkpoint."""
    target = _directory(services, version)
    if target.is_dir():
        return _receipt(version, target, 200)
    if services.checkpoint_lock.locked():
        raise TooManyRequests("Another checkpoint is being written.", retry_after=30)
    async with services.checkpoint_lock:
        await _write_checkpoint(services, version, target)
    return _receipt(version, target, 201)


async def get_checkpoint_file(request: Request) -> Response:
    """Download a file of the checkpoint."""
    target, filename = await _checkpoint_directory(request), request.path_params["file"]
    if filename not in {path.name for path in target.iterdir()}:
        raise NotFound(f"The checkpoint has no file `{printable(filename)}`.", param="file")
    return WholeFile(target / filename, filename=filename)


async def get_merge(request: Request) -> Response:
    """Get an adapter's merges: the checkpoint and the resident one."""
    services, name = services_of(request), request.path_params["name"]
    version = await _version(services, caller_of(request), name)
    target, report = _directory(services, version), services.engine.merges.get(version.digest)
    if not target.is_dir() and report is None:
        raise NotFound(f"`{printable(name)}` is not merged.", param="name", code="merge_not_found")
    body = {
        "object": "merge",
        "name": version.name,
        "digest": version.digest,
        "checkpoint": _files(target) if target.is_dir() else None,
        "resident": None if report is None else merge_report(report),
    }
    return JSONResponse(body, headers={"X-Adapter-Digest": version.digest})


async def delete_merge(request: Request, query: DeleteMergeQuery) -> Response:
    """Delete the checkpoint and the resident merge, or with `to` one of them; the adapter stays."""
    services, name, to = services_of(request), request.path_params["name"], query.to
    await _check_owner(services, caller_of(request), name)
    version = await _version(services, caller_of(request), name)
    target, deleted = _directory(services, version), []
    if to != "checkpoint" and await services.engine.unmerge(version.digest):
        deleted.append("resident")
    if to != "resident" and target.is_dir():
        trash = target.with_name(f".{uuid.uuid4().hex}")
        target.rename(trash)
        await run_in_threadpool(shutil.rmtree, trash, ignore_errors=True)
        deleted.append("checkpoint")
    if not deleted:
        raise NotFound(f"`{printable(name)}` is not merged.", param="name", code="merge_not_found")
    return JSONResponse({"object": "merge", "name": name, "digest": version.digest, "deleted": deleted})


async def _write_checkpoint(services: Services, version: Version, target: Path) -> None:
    settings = services.settings
    base = await asyncio.to_thread(resolve, settings.model, settings.cache_dir)
    staging = target.with_name(f".{uuid.uuid4().hex}")
    try:
        with disk_faults():
            await asyncio.to_thread(_prepare_directory, target.parent)
            staging.mkdir(mode=0o700)
            info = services.engine_info
            experts = {name: size._asdict() for name, size in info.experts.items()}
            files = {"renamed": info.renamed, "transposed": info.transposed, "experts": experts}
            order = {"base": str(base), "adapter": str(version.path), "target": str(staging), **files}
            await ask_once("adapters.offline.merge.carry_out", order, settings.merge_seconds)
            staging.rename(target)
    except HelperLimit as limit:
        message = f"Merging {limit} (--merge-seconds)."
        raise InvalidRequest(message, param="to", code="merge_too_slow") from None
    finally:
        await run_in_threadpool(shutil.rmtree, staging, ignore_errors=True)


def _prepare_directory(checkpoints: Path) -> None:
    """Create the directory, and remove the leftovers of interrupted merges."""
    checkpoints.mkdir(parents=True, exist_ok=True)
    for left in checkpoints.glob(".*"):
        shutil.rmtree(left, ignore_errors=True)


def _directory(services: Services, version: Version) -> Path:
    return services.settings.data_dir / "checkpoints" / version.digest.removeprefix("sha256:")


async def _check_owner(services: Services, caller: Caller, reference: str) -> None:
    """Check that the caller owns the adapter. Raises ModelNotFound, PermissionDenied."""
    try:
        await services.registry.find_owned(caller, split_reference(reference)[0])
    except UnknownAdapter:
        raise ModelNotFound(reference, param="name") from None


async def _version(services: Services, caller: Caller, name: str) -> Version:
    """Return the version that a request would get."""
    async with services.registry.open(caller, name, param="name") as version:
        return version


async def _checkpoint_directory(request: Request) -> Path:
    services, name = services_of(request), request.path_params["name"]
    target = _directory(services, await _version(services, caller_of(request), name))
    if not target.is_dir():
        raise NotFound(f"`{printable(name)}` has no merged checkpoint.", param="name", code="checkpoint_not_found")
    return target


def _receipt(version: Version, target: Path, status: int) -> Response:
    body = {"object": "merge", "name": version.name, "digest": version.digest, "checkpoint": _files(target)}
    return JSONResponse(body, status_code=status, headers={"X-Adapter-Digest": version.digest})


def _files(target: Path) -> dict[str, Any]:
    files = {path.name: path.stat().st_size for path in sorted(target.iterdir())}
    return {
        "dtype": "bfloat16",
        "bytes": sum(files.values()),
        "files": [{"name": name, "bytes": size} for name, size in files.items()],
    }


routes = [
    Operation(
        "GET",
        "/v1/adapters/{name:path}/merge/{file}",
        get_checkpoint_file,
        response_type="*/*",
        errors=OPEN_ERRORS,
    ),
    Operation(
        "POST",
        "/v1/adapters/{name:path}/merge",
        merge,
        response_type=MergeObject,
        statuses=(200, 201),
        errors=(*OPEN_ERRORS, *PUBLISH_ERRORS, InternalError),
    ),
    Operation("GET", "/v1/adapters/{name:path}/merge", get_merge, response_type=MergeObject, errors=OPEN_ERRORS),
    Operation("DELETE", "/v1/adapters/{name:path}/merge", delete_merge, response_type=DeletedMerge, errors=OPEN_ERRORS),
]
