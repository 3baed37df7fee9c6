"""vLLM's endpoints for loading adapters from the local disk or a hub: same bodies, same status codes.

They exist only with `--lora-dir` or `--adapter-hub`, and load only adapters under that directory or allowed there.
"""

from pathlib import Path
from typing import Any, ClassVar

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from adapters.peft_format.fields import AdapterError
from adapters.storage.versions import UnknownAdapter
from server.errors import InvalidRequest, LorakeetError, NotFound, as_error, printable
from server.http.answer import until_disconnect
from server.http.fetching import fetch
from server.http.operations import PUBLISH_ERRORS, Operation
from server.http.quotas import check_storage_quota
from server.hub import SCHEME
from server.openai.body import Body, Label
from server.openai.parts import with_renamed_param
from server.registry.publish import FILES
from server.services import Services, caller_of, check_bound, services_of
from server.tenants.caller import Caller


class InvalidUserInput(InvalidRequest):
    """400 with vLLM's error type."""

    type = "InvalidUserInput"


class NotFoundError(NotFound):
    """404 with vLLM's error type."""

    type = "NotFoundError"


class LoadBody(Body):
    no_ops: ClassVar[dict[str, tuple[Any, ...]]] = {"is_3d_lora_weight": (False,)}

    lora_name: str = ""
    lora_path: str = ""
    load_inplace: bool = False
    base_model_name: Label | None = None  # sent by gateways, ignored


class UnloadBody(Body):
    lora_name: str = ""
    lora_int_id: int | None = None


async def load(request: Request, body: LoadBody) -> Response:
    """Load the PEFT directory at `lora_path` as `lora_name`; `load_inplace` replaces an existing name."""
    services, caller = services_of(request), caller_of(request)
    if not body.lora_name or not body.lora_path:
        raise InvalidUserInput("Both 'lora_name' and 'lora_path' must be provided.")
    check_bound(caller, body.lora_name)
    if not body.load_inplace and _exists(services, caller, body.lora_name):
        message = f"The lora adapter '{printable(body.lora_name)}' has already been loaded."
        raise InvalidUserInput(f"{message} Set 'load_inplace' to replace it.", param="lora_name")
    try:
        if body.lora_path.startswith(SCHEME):
            _ = services.engine_info  # nothing can be checked without a base, so refuse before fetching
            async with services.uploads.slot():
                fetched = fetch(request, body.lora_name, body.lora_path, param="lora_path")
                await until_disconnect(request.receive, fetched)
        else:
            await _import(request, services, caller, body)
    except (LorakeetError, AdapterError) as fault:
        raise with_renamed_param(as_error(fault), [("name", "lora_name")]) from None
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


async def _import(request: Request, services: Services, caller: Caller, body: LoadBody) -> None:
    """Publish an adapter from a local directory."""
    if (root := services.settings.lora_dir) is None:
        raise _missing()
    root = root / caller.tenant  # the default tenant uses the directory itself
    directory = await run_in_threadpool(_directory_under, root, body.lora_path)
    await check_storage_quota(request, directory)
    await services.registry.publisher.import_directory(caller.tenant, body.lora_name, directory, root=root)


async def unload(request: Request, body: UnloadBody) -> Response:
    """Unload an adapter: delete its name. `lora_int_id` is accepted and ignored."""
    services = services_of(request)
    if not body.lora_name:
        raise InvalidUserInput("'lora_name' must be provided.", param="lora_name")
    if not _exists(services, caller_of(request), body.lora_name):
        raise NotFoundError(f"The lora adapter '{printable(body.lora_name)}' cannot be found.", param="lora_name")
    await services.registry.delete(caller_of(request), body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _exists(services: Services, caller: Caller, name: str) -> bool:
    try:
        check_bound(caller, name)
        services.store.get(caller.tenant, name)
    except (UnknownAdapter, NotFound):
        return False
    return True


def _missing() -> NotFoundError:
    message = "'lora_path' names no adapter directory under the server's --lora-dir."
    return NotFoundError(message, param="lora_path")


def _directory_under(root: Path, path: str) -> Path:
    """Return the client's directory, if it and its files, links resolved, are under `root`. Raises NotFoundError."""
    missing = _missing()
    if "\0" in path:
        raise missing
    root = root.resolve()
    try:
        directory = (root / path).resolve()
        files = [(directory / name).resolve() for name in FILES]
        # The same error whether or not a path outside exists, which is not revealed.
        if not all(found.is_relative_to(root) for found in (directory, *files)) or not directory.is_dir():
            raise missing
    except (OSError, RuntimeError):  # path too long, or a loop of links
        raise missing from None
    return directory


routes = [
    Operation(
        "POST", "/v1/load_lora_adapter", load, response_type="text/plain", errors=(NotFoundError, *PUBLISH_ERRORS)
    ),
    Operation("POST", "/v1/unload_lora_adapter", unload, response_type="text/plain", errors=(NotFoundError,)),
]
