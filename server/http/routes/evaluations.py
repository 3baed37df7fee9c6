"""`/v1/evaluations`: loss, perplexity and exact match of an adapter compared with the base."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from msgspec import to_builtins
from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.errors import InvalidRequest, NotFound, printable
from server.finetune.evaluation_store import Evaluation, UnknownEvaluationError
from server.finetune.files import UnknownFileError
from server.http.objects.common import DeletedObject, ListObject
from server.http.objects.training import EvaluationObject
from server.http.operations import OPEN_ERRORS, Operation
from server.http.paging import PageQuery, page
from server.openai.body import Body
from server.openai.schema import INT32
from server.openai.target import open_target
from server.services import caller_of, services_of


class EvaluationBody(Body):
    """The model to evaluate and the file of examples."""

    model: str = Field(min_length=1)
    file: str = Field(min_length=1)
    max_examples: int | None = Field(default=None, ge=1, le=INT32)


async def create_evaluation(request: Request, body: EvaluationBody) -> Response:
    """Start an evaluation; the result is in the object once its status is `succeeded`."""
    services = services_of(request)
    try:
        await asyncio.to_thread(services.tuning.files.get, caller_of(request).tenant, body.file)
    except UnknownFileError:
        raise InvalidRequest(f"`file`: there is no file {printable(body.file)}.", param="file") from None
    async with open_target(services, caller_of(request), body.model) as target:
        version = target.adapters[0] if target.adapters else None
        evaluation = await services.tuning.evaluations.create(
            caller_of(request).tenant,
            model=body.model,
            adapter=version.name_for(caller_of(request).tenant) if version else None,
            digest=version.digest if version else None,
            file=body.file,
            max_examples=body.max_examples,
        )
    return JSONResponse(evaluation_object(evaluation))


async def list_evaluations(request: Request, query: PageQuery) -> Response:
    """List a page of evaluations, newest first."""
    evaluations, more = await asyncio.to_thread(
        services_of(request).tuning.evaluations.store.page,
        caller_of(request).tenant,
        limit=query.limit,
        after=query.after,
    )
    return page([evaluation_object(evaluation) for evaluation in evaluations], more)


async def get_evaluation(request: Request) -> Response:
    """Get one evaluation."""
    return JSONResponse(evaluation_object(await _find(request)))


async def delete_evaluation(request: Request) -> Response:
    """Delete an evaluation; a running one is stopped."""
    evaluation_id = request.path_params["id"]
    with _as_not_found(evaluation_id):
        await services_of(request).tuning.evaluations.delete(caller_of(request).tenant, evaluation_id)
    return JSONResponse({"id": evaluation_id, "object": "evaluation", "deleted": True})


async def _find(request: Request) -> Evaluation:
    evaluation_id, evaluations = request.path_params["id"], services_of(request).tuning.evaluations
    with _as_not_found(evaluation_id):
        return await asyncio.to_thread(evaluations.store.get, caller_of(request).tenant, evaluation_id)


@contextmanager
def _as_not_found(evaluation_id: str) -> Iterator[None]:
    try:
        yield
    except UnknownEvaluationError:
        raise NotFound(f"No such evaluation: {printable(evaluation_id)}", param="id") from None


def evaluation_object(evaluation: Evaluation) -> dict[str, Any]:
    """Return the JSON object; `results.adapter` is null when the base itself is evaluated."""
    done = evaluation.status == "succeeded"
    return {
        "id": evaluation.id,
        "object": "evaluation",
        "status": evaluation.status,
        "created_at": evaluation.created_at,
        "finished_at": evaluation.finished_at,
        "model": evaluation.model,
        "digest": evaluation.digest,
        "file": evaluation.file,
        "examples": evaluation.examples if done else None,
        "tokens": evaluation.tokens if done else None,
        "results": {"base": to_builtins(evaluation.base), "adapter": to_builtins(evaluation.adapted)} if done else None,
        "result_files": evaluation.result_files,
        "error": None if evaluation.error is None else to_builtins(evaluation.error),
    }


routes = [
    Operation("POST", "/v1/evaluations", create_evaluation, response_type=EvaluationObject, errors=OPEN_ERRORS),
    Operation("GET", "/v1/evaluations", list_evaluations, response_type=ListObject[EvaluationObject]),
    Operation("GET", "/v1/evaluations/{id}", get_evaluation, response_type=EvaluationObject),
    Operation("DELETE", "/v1/evaluations/{id}", delete_evaluation, response_type=DeletedObject),
]
