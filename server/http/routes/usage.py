"""`/v1/usage`: usage by tenant, adapter and day."""

import asyncio
from typing import Annotated, Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from server.http.objects.common import ListObject
from server.http.objects.server import UsageRow
from server.http.operations import Operation
from server.http.paging import WindowQuery, page, window
from server.services import caller_of, services_of
from server.tenants.caller import tenant_name, tenant_of

_Day = Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]


class UsageQuery(WindowQuery):
    """Days in UTC, both included. `tenant` selects one tenant; only operators see other tenants."""

    first_day: _Day = "0000-00-00"
    last_day: _Day = "9999-99-99"
    tenant: str | None = None
    adapter: str | None = None


async def list_usage(request: Request, query: UsageQuery) -> Response:
    """List requests and tokens by day, tenant and adapter; all of them unless `limit` and `after` select a page.

    A request counts once, when it has ended or when its client disconnects after the first token.
    """
    caller = caller_of(request)
    tenant = None if query.tenant is None else tenant_of(query.tenant)
    own = caller.visible_tenant
    rows: list[dict[str, Any]] = []
    if own is None or tenant in (None, own):
        find = services_of(request).ledger.rows
        rows = await asyncio.to_thread(find, own if tenant is None else tenant, query.first_day, query.last_day)
    visible = [_usage_row(row) for row in rows if not row["adapter"] or caller.sees(row["adapter"])]
    visible = [row for row in visible if query.adapter in (None, row["adapter"])]
    part, more = window(query, [row["id"] for row in visible])
    return page(visible[part], more)


def _usage_row(row: dict[str, Any]) -> dict[str, Any]:
    tenant = tenant_name(row["tenant"])
    id_ = f"{row['day']}/{tenant}/{row['adapter']}"
    named = {"tenant": tenant, "adapter": row["adapter"] or None, "device_seconds": round(row["device_seconds"], 6)}
    return {"object": "usage", "id": id_, **row, **named}


routes = [Operation("GET", "/v1/usage", list_usage, response_type=ListObject[UsageRow])]
