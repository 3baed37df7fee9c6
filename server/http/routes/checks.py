"""`/v1/adapters/{name}/warm` and `verify`: loading and checking an adapter on the engine."""

import asyncio
import importlib.util
import uuid
from contextlib import AsyncExitStack, aclosing

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapters.storage.versions import Version
from server.children.helper import HelperLimit, ask_once
from server.client.engine import AdapterLoadFailed
from server.errors import ContextLengthExceeded, InternalError, InvalidRequest, TooManyRequests
from server.http.objects.adapters import Residency, Verification
from server.http.operations import OPEN_ERRORS, Operation
from server.messages.protocol import AdapterRef, Generate, Sampling
from server.model_source import resolve
from server.openai.body import Body
from server.openai.generation import raise_if_failed
from server.openai.target import adapter_ref
from server.services import Services, caller_of, services_of
from server.tenants.caller import Caller

_PROMPT = "The quick brown fox jumps over the lazy dog. In the beginning there was a question, and the answer was:"


ORACLE_QUANTIZATIONS = ("nf4", "fp4", "none")  # quantisations that `adapters.offline.oracle` supports


class VerifyBody(Body):
    """The prompt to score with and without the adapter, and whether to score it with PEFT, which loads another base."""

    prompt: str = Field(default=_PROMPT, min_length=1)
    peft: bool = False


async def warm(request: Request) -> Response:
    """Load an adapter onto the device; respond once it is loaded. Of a split, every version with a share is loaded."""
    services, name = services_of(request), request.path_params["name"]
    async with AsyncExitStack() as held:

        async def open_version(reference: str) -> Version:
            return await held.enter_async_context(services.registry.open(caller_of(request), reference, param="name"))

        versions = [await open_version(name)]
        if "@" not in name:
            others = services.store.pointer(versions[0].tenant, versions[0].name).shares.keys() - {versions[0].digest}
            versions += [await open_version(f"{name}@{digest}") for digest in sorted(others)]
        caller = caller_of(request)
        caller.allowance.check_rows(services.registry.rows(caller, versions))
        try:
            seconds = [await services.engine.warm(adapter_ref(version, caller)) for version in versions]
        except AdapterLoadFailed:
            raise InternalError("The adapter could not be loaded.") from None
    digests = [version.digest for version in versions]
    return JSONResponse({"object": "adapter.residency", "name": name, "digests": digests, "seconds": sum(seconds)})


async def verify(request: Request, body: VerifyBody = VerifyBody()) -> Response:  # noqa: B008 - it is frozen
    """Score a prompt with and without the adapter, to check that it has an effect."""
    services, caller, name = services_of(request), caller_of(request), request.path_params["name"]
    if body.peft:
        _check_oracle(services)
    async with services.registry.open(caller, name, param="name", verify=body.peft) as version:
        if version.receipt.get("num_labels"):
            message = f"`{version.name}` classifies: there are no tokens to score."
            raise InvalidRequest(message, param="name", code="unsupported_task")
        limit = services.engine_info.max_model_len
        (ids,) = await services.text.encode([body.prompt], add_special_tokens=True, max_tokens=limit, param="prompt")
        if not 1 < len(ids) <= limit:
            raise ContextLengthExceeded(f"`prompt` has {len(ids)} tokens; 2 to {limit} can be scored.", param="prompt")
        rows = services.registry.rows(caller, [version])
        tickets = services.admission.enter([len(ids)] * 2, caller.tenant, caller.allowance, 2 * len(ids), rows)
        try:
            with_adapter = await _score(services, caller, ids, [adapter_ref(version, caller)])
            without = await _score(services, caller, ids, [])
        finally:
            for ticket in tickets:
                ticket.end()
        oracle = await _ask_oracle(services, version, ids) if body.peft else None
    return JSONResponse(
        {
            "object": "adapter.verification",
            "name": name,
            "digest": version.digest,
            "prompt_tokens": len(ids),
            "changes_anything": with_adapter != without,
            "mean_logprob": {"adapter": _mean(with_adapter), "base": _mean(without)},
            "logprob_difference": _difference(with_adapter, without),
            "difference_from_peft": None if oracle is None else _difference(with_adapter, oracle),
        },
        headers={"X-Adapter-Digest": version.digest},
    )


async def _score(services: Services, caller: Caller, ids: list[int], adapters: list[AdapterRef]) -> list[float]:
    """Return the log-probability of each token but the first."""
    request = Generate(
        id=uuid.uuid4().hex,
        prompt=ids,
        sampling=Sampling(max_tokens=0, prompt_logprobs=0),
        adapters=adapters,
        tenant=caller.tenant,
    )
    scores: list[float] = []
    async with aclosing(services.engine.generate(request)) as outputs:
        async for output in outputs:
            raise_if_failed(output)
            scores += [entry.logprob for entry in output.prompt_logprobs if entry is not None]
            if output.finish_reason is not None:
                break
    return scores


def _check_oracle(services: Services) -> None:
    if importlib.util.find_spec("peft") is None:
        raise InvalidRequest("The package peft is not installed on the server.", param="peft")
    quantization = services.settings.quantization
    if quantization not in ORACLE_QUANTIZATIONS:
        raise InvalidRequest(
            f"PEFT rounds activations on an {quantization} base: there is no comparison.", param="peft"
        )


async def _ask_oracle(services: Services, version: Version, ids: list[int]) -> list[float]:
    settings = services.settings
    order = {
        "model": str(await asyncio.to_thread(resolve, settings.model, settings.cache_dir)),
        "quantization": settings.quantization,
        "adapter": str(version.path),
        "prompt": ids,
    }
    async with services.uploads.slot():
        try:
            scores: list[float] = await ask_once("adapters.offline.oracle.carry_out", order, settings.verify_seconds)
        except HelperLimit as limit:
            message = f"PEFT {limit} (--verify-seconds)."
            raise InvalidRequest(message, param="peft", code="peft_too_slow") from None
    return scores


def _difference(ours: list[float], theirs: list[float]) -> dict[str, float]:
    differences = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    return {"mean": _mean(differences), "max": max(differences)}


def _mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


routes = [
    Operation(
        "POST",
        "/v1/adapters/{name:path}/warm",
        warm,
        response_type=Residency,
        errors=(*OPEN_ERRORS, InternalError, TooManyRequests),
    ),
    Operation(
        "POST",
        "/v1/adapters/{name:path}/verify",
        verify,
        response_type=Verification,
        errors=(*OPEN_ERRORS, TooManyRequests),
    ),
]
