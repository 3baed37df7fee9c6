"""`/v1/server/history`: the server's last hour, held in memory, for charts."""

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from adapters.peft_format.sizes import device_bytes
from server import history
from server.http.objects.server import ServerHistory
from server.http.operations import Operation
from server.http.paging import Query
from server.services import services_of


class HistoryQuery(Query):
    """Samples newer than the Unix time `after`."""

    after: float = Field(0.0, ge=0, allow_inf_nan=False)


async def get_history(request: Request, query: HistoryQuery) -> Response:
    """Get the samples of the last hour, in columns, and the limits to compare them with."""
    services = services_of(request)
    info, settings = services.engine.info, services.settings
    limits = {
        "adapter_device_bytes": None if info is None else device_bytes(info.pool_rows, info.linears),
        "adapter_host_bytes": settings.adapter_host_bytes,
        "kv_tokens": None if info is None else info.block_size * info.num_blocks,
        "batch_requests": settings.max_batch_requests,
    }
    return JSONResponse(
        {
            "object": "server.history",
            "interval_seconds": history.SAMPLE_SECONDS,
            "limits": limits,
            "samples": services.history.since(query.after),
        }
    )


routes = [Operation("GET", "/v1/server/history", get_history, response_type=ServerHistory)]
