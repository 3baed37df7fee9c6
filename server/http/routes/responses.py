"""`/v1/responses`: the model's next items in a conversation, optionally stored or generated in the background."""

import asyncio
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial
from typing import Any, Literal

from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Send

from server.errors import InvalidRequest, LorakeetError, NotFound, TooManyRequests, as_error
from server.http.answer import CancellableResponse, encode_json, send_events, send_json, until_disconnect
from server.http.operations import OPEN_ERRORS, Operation
from server.http.paging import Query, WholeNumber, WindowQuery, window
from server.openai.chat import Chat, ChatBody, open_chat
from server.openai.response_body import ResponseBody
from server.openai.response_input import Item, ItemReference, as_item
from server.openai.response_objects import DeletedResponse, InputCount, InputItems, ResponseEvent, ResponseObject
from server.openai.responses import ResponseWriter
from server.openai.target import open_target
from server.responses.running import Followed, Running
from server.services import Services, caller_of, services_of
from server.tenants.caller import Caller


class RetrieveQuery(Query):
    stream: Literal["true", "false"] = "false"
    starting_after: WholeNumber | None = Field(None, ge=0)


class ItemsQuery(WindowQuery):
    limit: WholeNumber = Field(20, ge=1, le=100)
    order: Literal["asc", "desc"] = "desc"


class _Work:
    """A request for a response: its input items, its chat request, its id and storage."""

    def __init__(self, services: Services, caller: Caller, body: ResponseBody, number: str, items: list[Item]) -> None:
        self.services = services
        self.caller = caller
        self.body = body
        self.items = items
        self.chat: ChatBody = body.chat(items)
        self.stored = body.store is not False and services.responses.enabled
        self._number = number

    @property
    def id(self) -> str:
        return f"resp_{self._number}"

    def writer(self, chat: Chat) -> ResponseWriter:
        limit = self.services.settings.max_response_bytes
        return ResponseWriter(self.body, chat, self._number, stored=self.stored, max_bytes=limit)

    async def keep(self, writer: ResponseWriter, events: list[Any] | None = None) -> bool:
        """False when clients were told that it ended otherwise."""
        if not self.stored:
            return True
        return await self.services.responses.keep(self.caller.tenant, writer.response, self.items, events)


async def create_response(request: Request, body: ResponseBody) -> CancellableResponse:
    """Generate the next items, whole or as server-sent events; with `background`, return at once to be polled."""
    services = services_of(request)
    if not services.responses.enabled and (body.store or body.background):
        param = "store" if body.store else "background"
        raise InvalidRequest(f"`{param}`: this server keeps no responses (--response-days).", param=param)
    body = await until_disconnect(request.receive, body.with_resolved_strict(services.grammars.check))
    work = await asyncio.to_thread(_work, services, caller_of(request), body)  # slow for long inputs
    return CancellableResponse(partial(_in_background if body.background else _answer, work))


def _work(services: Services, caller: Caller, body: ResponseBody) -> _Work:
    """Prepare a request. Raises LorakeetError."""
    number = uuid.uuid4().hex
    return _Work(services, caller, body, number, _items(services, caller.tenant, body, number))


def _items(services: Services, tenant: str, body: ResponseBody, number: str) -> list[Item]:
    """Return the items to answer, those of earlier responses first. Raises NotFound, InvalidRequest."""
    items: list[Item] = []
    if body.previous_response_id is not None:
        earlier = services.responses.get(tenant, body.previous_response_id, param="previous_response_id")
        if earlier.in_progress:
            message = "The response `previous_response_id` is not finished."
            raise InvalidRequest(message, param="previous_response_id")
        items += [*earlier.items, *earlier.response["output"]]
    taken = {item["id"] for item in items}
    for i, item in enumerate(body.input):
        if isinstance(item, ItemReference):
            resolved = services.responses.item(tenant, item.id, f"input.{i}.id")
        else:
            resolved = as_item(item, f"{number}_in{i}")
        if resolved["id"] in taken:  # ids must be unique for paging
            resolved = resolved | {"id": f"again_{number}_in{i}"}
        taken.add(resolved["id"])
        items.append(resolved)
    return items


async def _answer(work: _Work, send: Send) -> None:
    try:
        async with open_chat(work.services, work.caller, work.chat) as chat:
            writer = work.writer(chat)
            headers = {"X-Adapter-Digest": chat.generation.target.digest}
            async with aclosing(_events(work, writer, chat)) as events:
                if work.body.stream:
                    pings = work.services.settings.stream_ping_seconds
                    await send_events(send, events, headers, writer.fail, ping_seconds=pings)
                else:
                    async for _ in events:
                        pass
                    await send_json(send, writer.response, headers)
    except LorakeetError as error:
        raise work.body.translate_error(error) from None


async def _events(work: _Work, writer: ResponseWriter, chat: Chat) -> AsyncGenerator[ResponseEvent, None]:
    """Yield the response's events. It is stored before the last one."""
    async with aclosing(chat.additions()) as additions:
        async for addition in additions:
            for event in writer.add(addition):
                yield event
    await work.keep(writer)
    yield writer.last()


async def _in_background(work: _Work, send: Send) -> None:
    """Start a background response; send its object, or follow its events."""
    running = Running(work.caller.tenant, work.id, streamed=bool(work.body.stream))
    started: asyncio.Future[ResponseObject] = asyncio.get_running_loop().create_future()
    work.services.responses.start(running, partial(_run, work, running, started))
    response = await asyncio.shield(started)
    headers = {"X-Adapter-Digest": response.system_fingerprint}
    if work.body.stream:
        await _send_log(work.services, send, running, -1, headers)
    else:
        await send_json(send, response, headers)


async def _run(work: _Work, running: Running, started: asyncio.Future[ResponseObject]) -> None:
    """Generate a background response, publish its events and store the result."""
    drain = work.services.drain
    drain.enter()
    try:
        async with open_chat(work.services, work.caller, work.chat) as chat:
            with chat.generation.admitted():
                writer = work.writer(chat)
                log = running.events if running.streamed else None
                await work.keep(writer, log)
                for event in writer.begin():
                    running.publish(event)
                started.set_result(writer.response)
                try:
                    async with aclosing(chat.additions()) as additions:
                        async for addition in additions:
                            for event in writer.add(addition):
                                running.publish(event)
                    last = writer.last()
                except asyncio.CancelledError:
                    if not running.cancelled:
                        raise
                    writer.cancel()
                    await work.keep(writer, log)
                    return
                except Exception as fault:
                    last = writer.fail(work.body.translate_error(as_error(fault)))
                if await work.keep(writer, None if log is None else [*log, last]):
                    running.publish(last)
    except Exception as fault:
        if started.done():
            raise
        started.set_exception(work.body.translate_error(as_error(fault)))
    finally:
        drain.leave()


async def count_input_tokens(request: Request, body: ResponseBody) -> Response:
    """Count the prompt tokens of a response, without generating it."""
    services, caller = services_of(request), caller_of(request)
    work = await asyncio.to_thread(_work, services, caller, body)
    try:
        chat = work.chat
        async with open_target(
            services, caller, chat.model, chat.adapter_id, adapters=chat.adapters, user=chat.user, task="any"
        ) as target:
            _, ids = await chat.encode(target.text, services.engine_info.max_model_len)
    except LorakeetError as error:
        raise body.translate_error(error) from None
    return _json(InputCount(input_tokens=len(ids)))


async def compact_response(request: Request) -> Response:
    """Refuse: compaction is not supported."""
    raise NotFound("`/v1/responses/compact` is not served: send fewer items, or a summary of them.", code="unsupported")


async def get_response(request: Request, query: RetrieveQuery) -> Response | CancellableResponse:
    """Get a stored response; with `stream`, its events, if it was created with `background` and `stream`."""
    responses, tenant, id_ = services_of(request).responses, caller_of(request).tenant, request.path_params["id"]
    stored = await asyncio.to_thread(responses.get, tenant, id_)
    if query.stream == "false":
        return _json(stored.response)
    if (followed := responses.events(stored, tenant)) is None:
        message = "`stream` needs a response that was started with `background` and `stream`."
        raise InvalidRequest(message, param="stream")
    after = -1 if query.starting_after is None else query.starting_after
    return CancellableResponse(partial(_send_log, services_of(request), followed=followed, after=after, headers={}))


async def _send_log(services: Services, send: Send, followed: Followed, after: int, headers: dict[str, str]) -> None:
    pings = services.settings.stream_ping_seconds
    async with aclosing(followed.follow(after)) as events:
        await send_events(send, events, headers, _error_event, ping_seconds=pings)


def _error_event(error: LorakeetError) -> dict[str, Any]:
    return error.body()["error"] | {"type": "error"}


async def list_input_items(request: Request, query: ItemsQuery) -> Response:
    """List a page of a response's input items, newest first unless `order=asc`."""
    tenant, id_ = caller_of(request).tenant, request.path_params["id"]
    stored = await asyncio.to_thread(services_of(request).responses.get, tenant, id_)
    items = stored.items if query.order == "asc" else stored.items[::-1]
    part, more = window(query, [item["id"] for item in items])
    page = items[part]
    ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": None, "last_id": None}
    return _json(InputItems(data=page, has_more=more, **ends))


async def cancel_response(request: Request) -> Response:
    """Cancel a background response; a finished one stays unchanged."""
    responses, tenant, id_ = services_of(request).responses, caller_of(request).tenant, request.path_params["id"]
    stored = await asyncio.to_thread(responses.get, tenant, id_)
    if not stored.response["background"]:
        raise InvalidRequest("Only responses with `background` can be cancelled.", param="id")
    await responses.cancel(tenant, id_)
    return _json((await asyncio.to_thread(responses.get, tenant, id_)).response)


async def delete_response(request: Request) -> Response:
    """Delete a response; a running one is stopped."""
    id_ = request.path_params["id"]
    await services_of(request).responses.delete(caller_of(request).tenant, id_)
    return _json(DeletedResponse(id=id_))


def _json(content: Any) -> Response:
    return Response(encode_json(content), media_type="application/json")


routes = [
    Operation(
        "POST",
        "/v1/responses",
        create_response,
        response_type=ResponseObject,
        events=ResponseEvent,
        errors=(*OPEN_ERRORS, TooManyRequests),
    ),
    Operation("POST", "/v1/responses/input_tokens", count_input_tokens, response_type=InputCount, errors=OPEN_ERRORS),
    Operation("POST", "/v1/responses/compact", compact_response, response_type=dict[str, Any], errors=(NotFound,)),
    Operation("GET", "/v1/responses/{id}", get_response, response_type=ResponseObject, events=ResponseEvent),
    Operation("GET", "/v1/responses/{id}/input_items", list_input_items, response_type=InputItems),
    Operation("POST", "/v1/responses/{id}/cancel", cancel_response, response_type=ResponseObject),
    Operation("DELETE", "/v1/responses/{id}", delete_response, response_type=DeletedResponse),
]
