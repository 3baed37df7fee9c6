"""`/v1/fine_tuning`: jobs, their events and checkpoints in OpenAI's shapes, and an estimate of their memory."""

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated, Any

from msgspec import to_builtins
from pydantic import BeforeValidator, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from adapters.peft_format.directory import AdapterSpec
from adapters.peft_format.fields import AdapterError
from adapters.storage.database import UnknownCursorError
from adapters.strict_json import encode_line
from server.client.engine import TrainingRefused
from server.errors import InvalidRequest, NotFound, TooManyRequests, printable
from server.finetune import hyperparameters
from server.finetune.files import UnknownFileError
from server.finetune.jobs import FINAL, Event, Job, JobSpec, JobStateError, StoredCheckpoint, UnknownJobError
from server.finetune.preparation import memory_request
from server.http.answer import PING
from server.http.objects.common import ListObject
from server.http.objects.training import CheckpointObject, Estimate, EventObject, JobObject
from server.http.operations import OPEN_ERRORS, Operation
from server.http.paging import ListQuery, PageQuery, WholeNumber, page
from server.http.quotas import check_training_quota
from server.messages.training import ModuleShape
from server.openai.target import Target, open_target
from server.openai.training_body import EstimateBody, JobBody, LoraBody
from server.registry.capacity import check_fit
from server.services import Services, caller_of, services_of

_POLL_SECONDS = 1.0  # between polls for a stream's next event without a notification
_STREAM_PAGE = 200
_ORGANIZATION = "org-lorakeet"


class JobsQuery(PageQuery):
    metadata: Annotated[dict[str, str] | None, BeforeValidator(lambda text: None if text == "null" else text)] = Field(
        {}
    )


class EventsQuery(ListQuery):
    limit: WholeNumber = Field(20, ge=1, le=1000)


class CheckpointsQuery(ListQuery):
    limit: WholeNumber = Field(10, ge=1, le=1000)


# --- creation and estimates -------------------------------------------------------------------------


async def create_job(request: Request, body: JobBody) -> Response:
    """Create a job: validate the request, as far as possible now, and queue it."""
    services = services_of(request)
    chosen = body.chosen_hyperparameters
    await check_training_quota(request)
    for param, file_id in (("training_file", body.training_file), ("validation_file", body.validation_file)):
        if file_id is not None:
            await asyncio.to_thread(_check_file, services, caller_of(request).tenant, param, file_id)
    async with AsyncExitStack() as held:
        target = await held.enter_async_context(open_target(services, caller_of(request), body.model, task="any"))
        lora, _ = _shape(services, target, body.lora)
        training = _training(services, body)
        spec = JobSpec(
            model=body.model,
            base=services.settings.base_name,
            adapter=target.digest if target.refs else None,
            training_file=body.training_file,
            validation_file=body.validation_file,
            suffix=body.suffix or "",
            seed=secrets.randbelow(2**31) if body.seed is None else body.seed,
            metadata=body.metadata,
            hyperparameters=chosen,
            lora=lora,
            training=training,
            integrations=[integration.model_dump() for integration in body.integrations or []] or None,
        )
        initial = Path(target.refs[0].path) if target.refs else None
        job = await services.tuning.manager.create(caller_of(request).tenant, spec, initial)
    return JSONResponse(job_object(services, job))


async def estimate(request: Request, body: EstimateBody) -> Response:
    """Estimate the memory of a job of this shape, in bytes."""
    services = services_of(request)
    base = services.engine_info
    async with open_target(services, caller_of(request), body.model, task="any") as target:
        lora, shapes = _shape(services, target, body.lora)
    training = _training(services, body)
    tokens = max(hyperparameters.micro_batch_tokens(training, base), hyperparameters.max_seq_len(training, base))
    memory_question = memory_request(shapes, lora, hyperparameters.optimizer(training, base), tokens)
    try:
        plan = await services.engine.plan_memory(memory_question)
    except TrainingRefused as refusal:
        raise InvalidRequest(str(refusal), param="model", code=refusal.code) from None
    return JSONResponse(
        {
            "object": "fine_tuning.estimate",
            "parameters": hyperparameters.parameters(shapes, base),
            "tokens": tokens,
            "base": plan.base,
            "adapter": plan.adapter,
            "gradients": plan.gradients,
            "optimizer": plan.optimizer,
            "checkpoint": plan.checkpoint,
            "activations": plan.activations,
            "total": {mode: plan.total(mode) for mode in plan.activations},
            "available": plan.available,
            "mode": plan.mode,
        }
    )


def _check_file(services: Services, tenant: str, param: str, file_id: str) -> None:
    try:
        stored = services.tuning.files.get(tenant, file_id)
    except UnknownFileError:
        message = f"`{param}`: there is no file {printable(file_id)}."
        raise InvalidRequest(message, param=param, code="file_not_found") from None
    if stored.purpose != "fine-tune":
        raise InvalidRequest(f"`{param}`: {file_id} is not a file for fine-tuning.", param=param)


def _shape(
    services: Services, target: Target, requested: LoraBody | None
) -> tuple[hyperparameters.LoraOptions, dict[str, ModuleShape]]:
    """Return the adapter's shape, checked to be servable. Raises InvalidRequest."""
    base = services.engine_info
    if target.refs:
        if requested is not None and requested.model_fields_set - {"lora_dropout", "scale_vector"}:
            message = f"`lora`: {printable(target.requested_name)} is an adapter, and its shape stays as it is."
            raise InvalidRequest(message, param="lora")
        spec = AdapterSpec.read(Path(target.refs[0].path))
        options = (requested or LoraBody()).options()
        try:
            shapes = hyperparameters.trained_on(spec)
        except AdapterError as error:
            raise InvalidRequest(f"`model`: {printable(target.requested_name)} {error}.", param="model") from None
        if spec.variants.experts and options.lora_dropout:
            message = "`lora.lora_dropout`: adapters of experts are trained without."
            raise InvalidRequest(message, param="lora.lora_dropout")
        return options, shapes
    lora = (requested or LoraBody()).options()
    try:
        shapes = hyperparameters.modules(hyperparameters.adapter_config(lora, services.settings.base_name, base), base)
        check_fit(hyperparameters.saved_spec(shapes, base), base)
    except AdapterError as error:
        param = f"lora.{error.param}"
        raise InvalidRequest(f"`{param}`: {error}", param=param, code=error.code) from None
    return lora, shapes


def _training(services: Services, body: JobBody | EstimateBody) -> hyperparameters.TrainingOptions:
    longest = services.engine_info.max_model_len
    training = hyperparameters.TrainingOptions() if body.training is None else body.training.options()
    if training.max_seq_len is not None and training.max_seq_len > longest:
        message = f"`training.max_seq_len`: the base is served with at most {longest} tokens."
        raise InvalidRequest(message, param="training.max_seq_len")
    return training


# --- queries -----------------------------------------------------------------------------------------


async def list_jobs(request: Request, query: JobsQuery) -> Response:
    """List a page of jobs, newest first; `metadata[key]=value` filters, `metadata=null` selects jobs without any."""
    services = services_of(request)
    jobs, more = await asyncio.to_thread(
        services.tuning.jobs.page,
        caller_of(request).tenant,
        limit=query.limit,
        after=query.after,
        metadata=query.metadata,
    )
    return page([job_object(services, job) for job in jobs], more)


async def get_job(request: Request) -> Response:
    """Get one job."""
    return JSONResponse(job_object(services_of(request), await _find(request)))


async def list_events(request: Request, query: EventsQuery) -> Response:
    """List a page of a job's events, newest first; with `Accept: text/event-stream`, stream them as they happen."""
    job = await _find(request)
    if "text/event-stream" in request.headers.get("accept", ""):
        last = request.headers.get("last-event-id")
        try:
            return await _stream_events(request, job, last or query.after)
        except UnknownCursorError:
            if not last:
                raise
            message = "`Last-Event-ID` is not the id of an event of this job."
            raise InvalidRequest(message, param="Last-Event-ID") from None
    events, more = await asyncio.to_thread(
        services_of(request).tuning.jobs.events, job.id, limit=query.limit, after=query.after
    )
    return page([event_object(event) for event in events], more)


async def _stream_events(request: Request, job: Job, after: str | None) -> Response:
    services = services_of(request)
    jobs = services.tuning.jobs
    await asyncio.to_thread(jobs.events, job.id, limit=1, after=after)

    async def stream() -> AsyncIterator[bytes]:
        last, idle_seconds = after, 0.0
        pings = services.settings.stream_ping_seconds
        while True:
            now = await asyncio.to_thread(jobs.get, caller_of(request).tenant, job.id)
            ended = now.status in FINAL or services.drain.draining
            more = True
            while more:
                events, more = await asyncio.to_thread(
                    jobs.events, job.id, limit=_STREAM_PAGE, after=last, newest_first=False
                )
                for event in events:
                    last, idle_seconds = event.id, 0.0
                    yield b"id: %b\ndata: %b\n\n" % (event.id.encode(), encode_line(event_object(event)))
            if ended:
                break
            if pings and idle_seconds >= pings:
                yield PING
                idle_seconds = 0.0
            began = time.monotonic()
            await services.tuning.manager.wait_for_change(
                min(_POLL_SECONDS, pings - idle_seconds) if pings else _POLL_SECONDS
            )
            idle_seconds += time.monotonic() - began
        yield b"data: [DONE]\n\n"

    return StreamingResponse(stream(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


async def list_checkpoints(request: Request, query: CheckpointsQuery) -> Response:
    """List a page of a job's checkpoints, newest first."""
    job = await _find(request)
    checkpoints, more = await asyncio.to_thread(
        services_of(request).tuning.jobs.checkpoints, job.id, limit=query.limit, after=query.after
    )
    return page([checkpoint_object(job, checkpoint) for checkpoint in checkpoints], more)


async def _find(request: Request) -> Job:
    job_id = request.path_params["id"]
    try:
        return await asyncio.to_thread(services_of(request).tuning.jobs.get, caller_of(request).tenant, job_id)
    except UnknownJobError:
        message = f"Could not find fine tune: {printable(job_id)}"
        raise NotFound(message, param="fine_tuning_job_id", code="fine_tune_not_found") from None


# --- control -------------------------------------------------------------------------------------------


async def cancel_job(request: Request) -> Response:
    """Cancel a job for good; only published checkpoints are kept."""
    return await _steer(request, services_of(request).tuning.manager.cancel)


async def pause_job(request: Request) -> Response:
    """Pause a job after the current step, which is saved."""
    return await _steer(request, services_of(request).tuning.manager.pause)


async def resume_job(request: Request) -> Response:
    """Resume a paused job."""
    return await _steer(request, services_of(request).tuning.manager.resume)


async def _steer(request: Request, change: Callable[[Job], Awaitable[Job]]) -> Response:
    try:
        job = await change(await _find(request))
    except JobStateError as error:
        raise InvalidRequest(str(error), code="invalid_job_state") from None
    return JSONResponse(job_object(services_of(request), job))


# --- objects -----------------------------------------------------------------------------------------------


def job_object(services: Services, job: Job) -> dict[str, Any]:
    """Return OpenAI's object. `lora`, `training`, `step`, `total_steps`, `stop_token_ids`, the formats are ours."""
    spec, plan = job.spec, None if job.start is None else job.start.plan
    effective = to_builtins(spec.hyperparameters)
    if plan is not None:
        effective |= {"n_epochs": plan.n_epochs, "batch_size": plan.batch_size}
        if spec.hyperparameters.learning_rate_multiplier == "auto":
            effective["learning_rate_multiplier"] = 1.0
    return {
        "id": job.id,
        "object": "fine_tuning.job",
        "created_at": job.created_at,
        "finished_at": job.finished_at,
        "estimated_finish": services.tuning.manager.estimated_finish(job),
        "error": None if job.error is None else to_builtins(job.error),
        "fine_tuned_model": job.fine_tuned_model,
        "hyperparameters": effective,
        "model": spec.model,
        "organization_id": _ORGANIZATION,
        "result_files": job.result_files,
        "seed": spec.seed,
        "status": job.status,
        "trained_tokens": job.trained_tokens if job.status in FINAL else None,
        "training_file": spec.training_file,
        "validation_file": spec.validation_file,
        "integrations": spec.integrations,
        "metadata": spec.metadata,
        "method": {"type": "supervised", "supervised": {"hyperparameters": effective}},
        "lora": to_builtins(spec.lora) if job.start is None else job.start.config,
        "training": to_builtins(spec.training if plan is None else plan),
        "step": job.step,
        "total_steps": job.total_steps or None,
        "stop_token_ids": job.stop_tokens,
        "tool_format": job.tool_format,
        "reasoning_format": job.reasoning_format,
    }


def event_object(event: Event) -> dict[str, Any]:
    """Return OpenAI's object."""
    return {
        "id": event.id,
        "object": "fine_tuning.job.event",
        "created_at": event.created_at,
        "level": event.level,
        "message": event.message,
        "type": event.type,
        "data": event.data,
    }


def checkpoint_object(job: Job, checkpoint: StoredCheckpoint) -> dict[str, Any]:
    """Return OpenAI's object."""
    return {
        "id": checkpoint.id,
        "object": "fine_tuning.job.checkpoint",
        "created_at": checkpoint.created_at,
        "fine_tuned_model_checkpoint": checkpoint.name,
        "fine_tuning_job_id": job.id,
        "step_number": checkpoint.metrics.step,
        "metrics": {name: getattr(checkpoint.metrics, name) for name in checkpoint.metrics.__struct_fields__},
    }


_JOB = "/v1/fine_tuning/jobs/{id}"
routes = [
    Operation(
        "POST", "/v1/fine_tuning/jobs", create_job, response_type=JobObject, errors=(*OPEN_ERRORS, TooManyRequests)
    ),
    Operation("GET", "/v1/fine_tuning/jobs", list_jobs, response_type=ListObject[JobObject]),
    Operation("POST", "/v1/fine_tuning/estimate", estimate, response_type=Estimate, errors=OPEN_ERRORS),
    Operation("GET", _JOB, get_job, response_type=JobObject),
    Operation(
        "GET",
        f"{_JOB}/events",
        list_events,
        response_type=ListObject[EventObject],
        events=EventObject,
        headers={"Last-Event-ID": "Of a stream: the event after which to continue."},
    ),
    Operation("GET", f"{_JOB}/checkpoints", list_checkpoints, response_type=ListObject[CheckpointObject]),
    Operation("POST", f"{_JOB}/cancel", cancel_job, response_type=JobObject),
    Operation("POST", f"{_JOB}/pause", pause_job, response_type=JobObject),
    Operation("POST", f"{_JOB}/resume", resume_job, response_type=JobObject),
]
