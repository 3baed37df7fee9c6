"""`POST /v1/chat/completions`: the next message of a conversation, which a chat template renders."""

import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any

from msgspec import Raw
from starlette.requests import Request
from starlette.types import Send

from server.errors import TooManyRequests
from server.http.answer import CancellableResponse, encode_json, send_events, send_json
from server.http.objects.generation import ChatCompletion, ChatCompletionChunk
from server.http.operations import OPEN_ERRORS, Operation
from server.openai.chat import Addition, Call, Chat, ChatBody, Event, open_chat
from server.openai.logprobs import AnswerSize, chat_tokens
from server.services import Services, caller_of, services_of
from server.tenants.caller import Caller
from server.text.tools.source import Arguments, Text, Thought


async def create_chat_completion(request: Request, body: ChatBody) -> CancellableResponse:
    """Generate the next message, whole or as server-sent events."""
    return CancellableResponse(partial(_answer, services_of(request), caller_of(request), body))


async def _answer(services: Services, caller: Caller, body: ChatBody, send: Send) -> None:
    async with open_chat(services, caller, body) as chat:
        writer = _Writer(body, chat, services.settings.max_response_bytes)
        headers = {"X-Adapter-Digest": chat.generation.target.digest}
        if body.stream:
            async with aclosing(writer.chunks()) as chunks:
                await send_events(send, chunks, headers, ping_seconds=services.settings.stream_ping_seconds)
        else:
            await send_json(send, await writer.full_response(), headers)


# --- OpenAI's shapes --------------------------------------------------------------------------------


class _Message:
    """The message of one choice as it is built."""

    def __init__(self) -> None:
        self.content: str | None = None
        self.thought = ""
        self.calls: list[dict[str, Any]] = []

    def add(self, event: Event) -> dict[str, Any]:
        """Add an event; return its delta."""
        match event:
            case Text(text):
                self.content = (self.content or "") + text
                return {"content": text}
            case Thought(text):
                self.thought += text
                return _thought(text)
            case Call(id_, name):
                self.calls.append({"id": id_, "type": "function", "function": {"name": name, "arguments": ""}})
                call = self.calls[-1]
                return self._part(call | {"function": dict(call["function"])})
            case Arguments(text):
                self.calls[-1]["function"]["arguments"] += text
                return self._part({"function": {"arguments": text}})

    def _part(self, part: dict[str, Any]) -> dict[str, Any]:
        return {"tool_calls": [{"index": len(self.calls) - 1} | part]}

    def deltas(self, addition: Addition) -> list[dict[str, Any]]:
        """Return the deltas of an addition. An answer without calls gets a content, even if empty."""
        deltas = [self.add(event) for event in addition.events]
        if addition.finish and self.content is None and not self.calls:
            deltas.append(self.add(Text("")))
        return deltas

    def full_message(self) -> dict[str, Any]:
        """Return the whole message."""
        calls = {"tool_calls": self.calls} if self.calls else {}
        thought = _thought(self.thought) if self.thought else {}
        return {"role": "assistant", "content": self.content, "refusal": None} | thought | calls


def _thought(text: str) -> dict[str, str]:
    """Return a thought under both names that clients use."""
    return {"reasoning": text, "reasoning_content": text}


class _Writer:
    """Builds chat messages from a chat's additions."""

    def __init__(self, body: ChatBody, chat: Chat, max_bytes: int) -> None:
        self._body = body
        self._chat = chat
        self._messages: dict[int, _Message] = {}  # by choice
        self._size = AnswerSize(max_bytes, body.top_logprobs, 65) if body.logprobs else None
        self._id = f"chatcmpl-{uuid.uuid4().hex}"

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """Yield a chunk per delta, each choice's first with its role; with `include_usage` a last one of usage."""
        generation = self._chat.generation
        async with aclosing(self._chat.additions()) as additions:
            async for addition in additions:
                first: dict[str, Any] = {}
                begins = addition.choice not in self._messages
                deltas = self._messages.setdefault(addition.choice, _Message()).deltas(addition)
                if begins:
                    first = self._prompt_ids()
                    content = deltas.pop(0) if deltas and "content" in deltas[0] else {"content": self._empty_content}
                    deltas.insert(0, {"role": "assistant"} | content)
                elif not deltas and (addition.entries or addition.finish or addition.tokens):
                    deltas = [{}]
                without_extras = replace(addition, entries=[], tokens=(), finish=None)
                for i, delta in enumerate(deltas):  # the last delta carries logprobs, ids and finish
                    common = self._common(addition if i == len(deltas) - 1 else without_extras)
                    choice = {"index": addition.choice, "delta": delta} | common
                    yield self._envelope("chat.completion.chunk", [choice]) | first | generation.chunk_usage()
                    first = {}
        if self._body.include_usage:
            yield self._envelope("chat.completion.chunk", []) | {"usage": generation.usage.as_json()}

    async def full_response(self) -> dict[str, Any]:
        """Return the whole response in one object."""
        tokens: dict[int, list[dict[str, Any]]] = {}
        choices: dict[int, Raw] = {}  # encoded when finished: far smaller, and spread over time
        ids: dict[int, list[int]] = {}
        async with aclosing(self._chat.additions()) as additions:
            async for addition in additions:
                index = addition.choice
                ids.setdefault(index, []).extend(addition.tokens)
                message = self._messages.setdefault(index, _Message())
                message.deltas(addition)
                if self._size is not None:
                    self._size.add(len(addition.entries))
                    tokens.setdefault(index, []).extend(chat_tokens(self._chat.text, addition.entries))
                if addition.finish is not None:
                    common = self._common(replace(addition, entries=[], tokens=ids[index]), tokens.pop(index, []))
                    choices[index] = Raw(encode_json({"index": index, "message": message.full_message()} | common))
        ordered = [choices[index] for index in sorted(choices)]
        answer = self._envelope("chat.completion", ordered) | self._prompt_ids()
        return answer | {"usage": self._chat.generation.usage.as_json()}

    def _prompt_ids(self) -> dict[str, list[int]]:
        [prompt] = self._chat.generation.prompts
        return {"prompt_token_ids": prompt.ids} if self._body.return_token_ids else {}

    @property
    def _empty_content(self) -> str | None:
        """The content of the first delta without text."""
        return "" if self._chat.calling is None else None

    def _common(self, addition: Addition, tokens: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        logprobs = None
        if self._body.logprobs:
            content = chat_tokens(self._chat.text, addition.entries) if tokens is None else tokens
            logprobs = {"content": content, "refusal": None}
        return {
            "logprobs": logprobs,
            "finish_reason": addition.finish and addition.finish.reason,
            "stop_reason": addition.finish and addition.finish.stop_reason,
        } | ({"token_ids": list(addition.tokens)} if self._body.return_token_ids else {})

    def _envelope(self, kind: str, choices: Sequence[Any]) -> dict[str, Any]:
        return self._chat.generation.envelope(self._id, kind, choices)


routes = [
    Operation(
        "POST",
        "/v1/chat/completions",
        create_chat_completion,
        response_type=ChatCompletion,
        events=ChatCompletionChunk,
        errors=(*OPEN_ERRORS, TooManyRequests),
    )
]
