"""`/v1/messages`: the next message of a conversation, in Anthropic's shapes."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Send

from server.anthropic.body import CountBody, MessageBody
from server.anthropic.objects import MessageError, MessageEvent, MessageObject, TokenCount
from server.anthropic.writer import MessageWriter
from server.errors import LorakeetError, TooManyRequests, anthropic_body
from server.http.answer import CancellableResponse, encode_json, send_events, send_json
from server.http.operations import OPEN_ERRORS, Operation
from server.openai.chat import Chat, open_chat
from server.openai.target import open_target
from server.services import Services, caller_of, services_of
from server.tenants.caller import Caller


async def create_message(request: Request, body: MessageBody) -> CancellableResponse:
    """Generate the next message, whole or as server-sent events."""
    return CancellableResponse(partial(_answer, services_of(request), caller_of(request), body))


async def _answer(services: Services, caller: Caller, body: MessageBody, send: Send) -> None:
    try:
        chat_body = await asyncio.to_thread(body.chat)  # slow for long conversations
        async with open_chat(services, caller, chat_body, default_max_tokens=body.max_tokens) as chat:
            writer = MessageWriter(chat, body.max_tokens)
            headers = {"X-Adapter-Digest": chat.generation.target.digest}
            async with aclosing(_events(writer, chat)) as events:
                if body.stream:
                    pings = services.settings.stream_ping_seconds
                    await send_events(send, events, headers, anthropic_body, ping_seconds=pings)
                else:
                    async for _ in events:
                        pass
                    await send_json(send, writer.message(), headers)
    except LorakeetError as error:
        raise body.translate_error(error) from None


async def _events(writer: MessageWriter, chat: Chat) -> AsyncGenerator[MessageEvent, None]:
    started = False
    async with aclosing(chat.additions()) as additions:
        async for addition in additions:
            if not started:
                started = True
                for event in writer.begin():
                    yield event
            for event in writer.add(addition):
                yield event


async def count_message_tokens(request: Request, body: CountBody) -> Response:
    """Count the tokens of the prompt."""
    services = services_of(request)
    try:
        chat = await asyncio.to_thread(body.chat)
        async with open_target(services, caller_of(request), chat.model, task="any") as target:
            _, ids = await chat.encode(target.text, services.engine_info.max_model_len)
    except LorakeetError as error:
        raise body.translate_error(error) from None
    return Response(encode_json(TokenCount(input_tokens=len(ids))), media_type="application/json")


routes = [
    Operation(
        "POST",
        "/v1/messages",
        create_message,
        response_type=MessageObject,
        events=MessageEvent,
        errors=(*OPEN_ERRORS, TooManyRequests),
        error_type=MessageError,
    ),
    Operation(
        "POST",
        "/v1/messages/count_tokens",
        count_message_tokens,
        response_type=TokenCount,
        errors=OPEN_ERRORS,
        error_type=MessageError,
    ),
]
