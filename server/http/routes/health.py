"""Liveness, readiness, version and metrics, for operators and their tools."""

from importlib.metadata import version

import msgspec
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from server.errors import Unavailable
from server.http.objects.server import Health, Readiness, Version
from server.http.operations import Operation
from server.services import services_of

VERSION = version("lorakeet")


async def health(request: Request) -> Response:
    """Check liveness of this process only, so that it is not killed for a busy or restarting engine."""
    return JSONResponse({"status": "ok"})


async def ready(request: Request) -> Response:
    """Check readiness: whether a request would be served now."""
    services = services_of(request)
    reason = services.engine.unready_reason
    if services.drain.draining:
        reason = "The server is shutting down."
    elif reason is None and services.registry.discovery.pending:
        reason = "Adapters named on the command line are being imported."
    info = services.engine.info
    body = {
        "status": "ready" if reason is None else "unavailable",
        "engine_pid": services.engine.pid,
        "base_digest": info.base_digest if info else None,
        "stop_tokens": services.text.stops_as_json(),
        "int8_drift": msgspec.to_builtins(info.int8_drift) if info else None,
        "kv_cache": msgspec.to_builtins(info.kv_cache) if info else None,
    }
    if reason is None:
        return JSONResponse(body)
    error = Unavailable(reason, retry_after=5)
    return JSONResponse(body | error.body(), status_code=error.status, headers=error.headers)


async def server_version(request: Request) -> Response:
    """Get the server's version."""
    return JSONResponse({"version": VERSION})


async def metrics(request: Request) -> Response:
    """Get all metrics, always in Prometheus's text format."""
    services = services_of(request)
    services.metrics.set_engine_process(alive=services.engine.pid is not None, info=services.engine.info)
    await services.tuning.count_jobs()
    await services.batches.count()
    return Response(services.metrics.render(), headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})


routes = [
    Operation("GET", "/health", health, response_type=Health),
    Operation("GET", "/ready", ready, response_type=Readiness, statuses=(200, 503)),
    Operation("GET", "/version", server_version, response_type=Version),
    Operation("GET", "/metrics", metrics, response_type="text/plain"),
]
