"""`/v1/batches`: files of requests, answered with capacity left free by interactive requests, in OpenAI's shapes."""

import asyncio
from typing import Any, Literal

from msgspec import to_builtins
from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.batches.store import Batch, BatchStateError, UnknownBatchError
from server.errors import Conflict, InvalidRequest, NotFound, StorageFull, disk_faults, printable
from server.finetune.files import BATCH, UnknownFileError
from server.http.objects.common import ListObject
from server.http.objects.generation import BatchObject
from server.http.operations import Operation
from server.http.paging import PageQuery, page
from server.openai.body import Body, Metadata
from server.services import caller_of, services_of


class BatchBody(Body):
    """A file of requests and their endpoint."""

    input_file_id: str = Field(min_length=1)
    endpoint: Literal["/v1/chat/completions", "/v1/completions", "/v1/responses"]
    completion_window: Literal["24h"]
    metadata: Metadata | None = None


async def create_batch(request: Request, body: BatchBody) -> Response:
    """Start a batch. The file is validated first; its errors then appear in the object."""
    services = services_of(request)
    try:
        file = await asyncio.to_thread(services.tuning.files.fetch, caller_of(request).tenant, body.input_file_id)
    except UnknownFileError:
        message = f"`input_file_id`: there is no file {printable(body.input_file_id)}."
        raise InvalidRequest(message, param="input_file_id") from None
    if file.purpose != BATCH:
        message = f"`input_file_id`: the file is for `{file.purpose}`; upload it with the purpose `{BATCH}`."
        raise InvalidRequest(message, param="input_file_id")
    with disk_faults():
        batch = await services.batches.create(caller_of(request), body.endpoint, file, body.metadata)
    return JSONResponse(_batch_object(request, batch))


async def list_batches(request: Request, query: PageQuery) -> Response:
    """List a page of batches, newest first."""
    batches, more = await asyncio.to_thread(
        services_of(request).batches.store.page, caller_of(request).tenant, limit=query.limit, after=query.after
    )
    return page([_batch_object(request, batch) for batch in batches], more)


async def get_batch(request: Request) -> Response:
    """Get one batch."""
    return JSONResponse(_batch_object(request, await _find(request)))


async def cancel_batch(request: Request) -> Response:
    """Cancel a batch; finished responses are in the output file once the status is `cancelled`."""
    try:
        batch = await services_of(request).batches.cancel(await _find(request))
    except BatchStateError as refusal:
        raise Conflict(str(refusal)) from None
    return JSONResponse(_batch_object(request, batch))


async def _find(request: Request) -> Batch:
    batch_id = request.path_params["id"]
    try:
        return await asyncio.to_thread(services_of(request).batches.store.get, caller_of(request).tenant, batch_id)
    except UnknownBatchError:
        raise NotFound(f"No such batch: {printable(batch_id)}", param="id", code="batch_not_found") from None


def _batch_object(request: Request, batch: Batch) -> dict[str, Any]:
    """Return OpenAI's object."""
    completed, failed = services_of(request).batches.progress(batch)
    faults = {"object": "list", "data": to_builtins(batch.faults)} if batch.faults else None
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "errors": faults,
        "input_file_id": batch.input_file,
        "completion_window": "24h",
        "status": batch.status,
        "output_file_id": batch.output_file,
        "error_file_id": batch.error_file,
        "created_at": batch.created_at,
        "in_progress_at": batch.times.get("in_progress"),
        "expires_at": batch.expires_at,
        "finalizing_at": batch.times.get("finalizing"),
        "completed_at": batch.times.get("completed"),
        "failed_at": batch.times.get("failed"),
        "expired_at": batch.times.get("expired"),
        "cancelling_at": batch.times.get("cancelling"),
        "cancelled_at": batch.times.get("cancelled"),
        "request_counts": {"total": batch.total, "completed": completed, "failed": failed},
        "metadata": batch.metadata,
    }


routes = [
    Operation("POST", "/v1/batches", create_batch, response_type=BatchObject, errors=(StorageFull,)),
    Operation("GET", "/v1/batches", list_batches, response_type=ListObject[BatchObject]),
    Operation("GET", "/v1/batches/{id}", get_batch, response_type=BatchObject),
    Operation("POST", "/v1/batches/{id}/cancel", cancel_batch, response_type=BatchObject, errors=(Conflict,)),
]
