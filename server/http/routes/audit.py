"""`/v1/admin/audit`: the log of changes, with their authors and times."""

import asyncio

from msgspec import to_builtins
from starlette.requests import Request
from starlette.responses import Response

from server.http.objects.common import ListObject
from server.http.operations import Operation
from server.http.paging import PageQuery, page
from server.services import caller_of, services_of
from server.tenants.audit import Entry


async def list_audit(request: Request, query: PageQuery) -> Response:
    """List a page of changes, newest first. An operator sees all tenants' changes, another admin its own tenant's."""
    own = caller_of(request).visible_tenant
    entries, more = await asyncio.to_thread(services_of(request).audit.page, own, query.limit, query.after)
    return page([to_builtins(entry) for entry in entries], more)


routes = [Operation("GET", "/v1/admin/audit", list_audit, response_type=ListObject[Entry])]
