"""`/v1/files`: training data, batches and results in OpenAI's shapes. Training data is validated line by line."""

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.errors import InvalidRequest, NotFound, disk_faults, printable
from server.finetune import hyperparameters
from server.finetune.dataset import load_dataset
from server.finetune.files import PURPOSES, TRAINING, StoredFile, UnknownFileError
from server.finetune.preview import preview
from server.finetune.rows import DatasetError
from server.finetune.tokenizer import TrainingTokenizer
from server.http.answer import WholeFile
from server.http.multipart import Part, read_parts
from server.http.objects.common import DeletedObject, ListObject
from server.http.objects.training import FileObject, PreviewedLine
from server.http.operations import PUBLISH_ERRORS, Operation
from server.http.paging import ListQuery, Query, WholeNumber, page
from server.http.quotas import check_storage_quota
from server.services import Services, caller_of, services_of
from server.settings import Settings

_MAX_FILENAME = 255
_UPLOAD = "upload"

T = TypeVar("T")


class FilesQuery(ListQuery):
    limit: WholeNumber = Field(10_000, ge=1, le=10_000)
    order: Literal["asc", "desc"] = "desc"
    purpose: str | None = None


class PreviewQuery(Query):
    """Lines after the one with the number `after`."""

    after: WholeNumber = 0
    limit: WholeNumber = Field(20, ge=1, le=100)


async def upload_file(request: Request) -> Response:
    """Upload a file. Every line of training data is validated."""
    services = services_of(request)
    _ = services.engine_info  # lines cannot be checked without a base, so refuse before receiving
    await check_storage_quota(request)
    async with services.uploads.slot():
        with disk_faults(), services.tuning.files.staging() as directory:
            path, filename, purpose = await _receive(request, services, directory)
            await check_storage_quota(request, directory)
            report = await asyncio.to_thread(_check, services, path) if purpose == TRAINING else None
            add = partial(
                services.tuning.files.add,
                caller_of(request).tenant,
                path,
                filename=filename,
                purpose=purpose,
                report=report,
            )
            stored = await asyncio.to_thread(add)
    return JSONResponse(file_object(stored))


async def _receive(request: Request, services: Services, directory: Path) -> tuple[Path, str, str]:
    names = ["upload.jsonl"]
    parts = _parts(services.settings, directory, names.append)
    values = await read_parts(request, parts, services.uploads.threads)
    purpose = values["purpose"].decode(errors="replace")
    if purpose not in PURPOSES:
        known = " or ".join(f"`{each}`" for each in PURPOSES)
        raise InvalidRequest(f"`purpose` must be {known}: no other files are used here.", param="purpose")
    return directory / _UPLOAD, Path(names[-1]).name[:_MAX_FILENAME] or names[0], purpose


def _parts(settings: Settings, directory: Path, on_filename: Callable[[str], None] | None = None) -> dict[str, Part]:
    return {
        "file": Part(settings.max_upload_bytes, directory / _UPLOAD, on_filename=on_filename),
        "purpose": Part(64),
    }


def _check(services: Services, path: Path) -> dict[str, int]:
    """Validate training data and return its counts. Raises InvalidRequest."""
    base = services.engine_info
    with path.open("rb") as file:
        try:
            data = load_dataset(
                file,
                TrainingTokenizer(services.text, base.eos_token_ids),
                max_length=hyperparameters.max_seq_len(hyperparameters.TrainingOptions(), base),
            )
        except DatasetError as error:
            raise InvalidRequest(str(error), param="file", code="invalid_file") from None
    return data.report.as_dict()


async def list_files(request: Request, query: FilesQuery) -> Response:
    """List a page of files, newest first unless `order=asc`."""
    files, more = await asyncio.to_thread(
        services_of(request).tuning.files.page,
        caller_of(request).tenant,
        limit=query.limit,
        after=query.after,
        purpose=query.purpose,
        newest_first=query.order == "desc",
    )
    return page([file_object(stored) for stored in files], more)


async def get_file(request: Request) -> Response:
    """Get one file's object."""
    return JSONResponse(file_object(await _find(request)))


async def get_content(request: Request) -> Response:
    """Download a file."""
    stored = await _find(request, fetched=True)
    media_type = "text/csv" if stored.filename.endswith(".csv") else "application/jsonl"
    return WholeFile(stored.path, media_type=media_type, filename=stored.filename)


async def preview_file(request: Request, query: PreviewQuery) -> Response:
    """Preview a page of a training file's lines as tokens, with the trained tokens marked."""
    services, stored = services_of(request), await _find(request, fetched=True)
    if stored.purpose != TRAINING:
        raise InvalidRequest("Only data for fine-tuning has a preview.", param="id")
    base = services.engine_info
    look = partial(
        preview,
        stored.path,
        services.text,
        TrainingTokenizer(services.text, base.eos_token_ids),
        after=query.after,
        limit=query.limit,
        max_length=hyperparameters.max_seq_len(hyperparameters.TrainingOptions(), base),
    )
    lines, more = await asyncio.to_thread(look)
    return JSONResponse({"object": "list", "data": lines, "has_more": more})


async def delete_file(request: Request) -> Response:
    """Delete a file. Jobs that have already read it are not affected."""
    await _on_file(request, services_of(request).tuning.files.delete)
    return JSONResponse({"id": request.path_params["id"], "object": "file", "deleted": True})


async def _find(request: Request, *, fetched: bool = False) -> StoredFile:
    """Find the file in the path; with `fetched`, its bytes are on the local disk."""
    files = services_of(request).tuning.files
    return await _on_file(request, files.fetch if fetched else files.get)


async def _on_file(request: Request, work: Callable[[str, str], T]) -> T:
    """Run `work` for the file in the path. Raises NotFound if there is none."""
    file_id = request.path_params["id"]
    try:
        return await asyncio.to_thread(work, caller_of(request).tenant, file_id)
    except UnknownFileError:
        raise NotFound(f"No such File object: {printable(file_id)}", param="id", code="file_not_found") from None


def file_object(stored: StoredFile) -> dict[str, Any]:
    """Return OpenAI's object; `report`, the counts of the validation, is ours."""
    counts = ", ".join(f"{name.replace('_', ' ')}: {count}" for name, count in stored.report.items())
    return {
        "id": stored.id,
        "object": "file",
        "bytes": stored.bytes,
        "created_at": stored.created_at,
        "filename": stored.filename,
        "purpose": stored.purpose,
        "status": "processed",
        "expires_at": None,
        "status_details": counts or None,
        "report": stored.report or None,
    }


routes = [
    Operation("POST", "/v1/files", upload_file, form=_parts, response_type=FileObject, errors=PUBLISH_ERRORS),
    Operation("GET", "/v1/files", list_files, response_type=ListObject[FileObject]),
    Operation("GET", "/v1/files/{id}", get_file, response_type=FileObject),
    Operation("GET", "/v1/files/{id}/content", get_content, response_type="application/jsonl, text/csv"),
    Operation("GET", "/v1/files/{id}/preview", preview_file, response_type=ListObject[PreviewedLine]),
    Operation("DELETE", "/v1/files/{id}", delete_file, response_type=DeletedObject),
]
