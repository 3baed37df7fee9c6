"""`POST /v1/chat/completions`: a conversation, through the base's chat template, and the next message."""

import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Self

from msgspec import Raw
from pydantic import Field, model_validator
from starlette.requests import Request
from starlette.types import Send

from server.errors import InvalidRequest, TooManyRequests
from server.http.answer import Answer, encode_json, send_events, send_json
from server.http.objects import ChatCompletion, ChatCompletionChunk
from server.http.operations import OPENING, Operation
from server.openai.assembly import Message, Piece
from server.openai.conversation import Conversation
from server.openai.generation import Generation, Prompt, check_vocabulary, checked_grammar, fit_max_tokens
from server.openai.logprobs import AnswerSize, chat_tokens
from server.openai.schema import INT32, GenerationBody
from server.openai.target import open_target
from server.openai.tools import Calling, Tool, ToolChoice, check_choice
from server.services import Services, services_of
from server.text.processor import TextProcessor


class ChatBody(GenerationBody, Conversation):
    """The request's body."""

    no_ops: ClassVar[dict[str, tuple[Any, ...]]] = GenerationBody.no_ops | {
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "echo": (False,),
    }

    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True
    max_tokens: int | None = Field(None, ge=1, le=INT32)
    max_completion_tokens: int | None = Field(None, ge=1, le=INT32)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    reasoning_effort: str | None = None  # hints to models that have such a switch; the template's own arguments go in
    verbosity: str | None = None  # `chat_template_kwargs`

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("`top_logprobs` needs `logprobs: true`.", param="top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise InvalidRequest(
                "`max_tokens` and `max_completion_tokens` differ; give one of them.", param="max_completion_tokens"
            )
        if self.tool_choice != "auto":
            check_choice(self.tool_choice, self.tools)
        return self

    @property
    def shown_tools(self) -> list[Tool]:
        """None of them, if none may be called."""
        return [] if self.tool_choice == "none" else self.tools

    def calling(self, text: TextProcessor) -> Calling | None:
        """How tools are called; None where there are none to call."""
        tools, tool_format = self.shown_tools, text.tool_format
        if not tools or tool_format is None:
            return None
        return Calling(text, tool_format, tools, self.tool_choice, self.parallel_tool_calls)


async def create_chat_completion(request: Request, body: ChatBody) -> Answer:
    """The next message, whole or as server-sent events."""
    return Answer(partial(_answer, services_of(request), body))


async def _answer(services: Services, body: ChatBody, send: Send) -> None:
    info = services.engine_info
    async with open_target(services, body.model, body.adapter_id, adapters=body.adapters, user=body.user) as target:
        check_vocabulary(target.vocab_size, body)
        ids = await body.encode(target.text, info.max_model_len)
        if not ids:
            raise InvalidRequest("The chat template makes an empty prompt of these messages.", param="messages")
        asked = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        room = fit_max_tokens(info, body, ids, asked=asked, default=None, param="messages")
        calling = body.calling(target.text)
        sampling = body.sampling(
            services.sampling_defaults,
            logprobs=body.top_logprobs if body.logprobs else None,
            grammar=await checked_grammar(services, body)
            if calling is None
            else await calling.grammar(services, body.asked_grammar()),
        )
        markers = calling.format.markers if calling else ()
        generation = Generation(services, body, target, [Prompt(ids, room)], sampling, markers)
        writer = _Writer(target.text, body, generation, calling)
        headers = {"X-Adapter-Digest": target.digest}
        if body.stream:
            async with aclosing(writer.chunks()) as chunks:
                await send_events(send, chunks, headers)
        else:
            await send_json(send, await writer.whole(), headers)


# --- OpenAI's shapes --------------------------------------------------------------------------------


_NOTHING = Piece("")


class _Writer:
    """Writes a generation's pieces down as chat messages."""

    def __init__(self, text: TextProcessor, body: ChatBody, generation: Generation, calling: Calling | None) -> None:
        self._text = text
        self._body = body
        self._generation = generation
        self._calling = calling
        self._messages: dict[int, Message] = {}  # by choice
        limit = generation.services.settings.max_response_bytes
        self._size = AnswerSize(limit, body.top_logprobs if body.logprobs else None, 65)
        self._id = f"chatcmpl-{uuid.uuid4().hex}"

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """A chunk per delta, each choice's first with its role; with `include_usage` a last one of usage."""
        async with aclosing(self._generation.pieces()) as pieces:
            async for index, piece in pieces:
                first: dict[str, Any] = {}
                begins = index not in self._messages
                message = self._message(index)
                deltas = message.add(piece.text, last=piece.finish_reason is not None)
                if begins:
                    first = self._prompt_ids()
                    content = deltas.pop(0) if deltas and "content" in deltas[0] else {"content": self._nothing}
                    deltas.insert(0, {"role": "assistant"} | content)
                elif not deltas and (piece.entries or piece.finish_reason or piece.tokens):
                    deltas = [{}]
                tokens = chat_tokens(self._text, piece.entries)
                for i, delta in enumerate(deltas):  # the last one has all that is not text
                    last = i == len(deltas) - 1
                    common = self._common(piece, tokens, message) if last else self._common(_NOTHING, [], message)
                    choice = {"index": index, "delta": delta} | common
                    yield self._envelope("chat.completion.chunk", [choice]) | first | self._generation.chunk_usage()
                    first = {}
        if self._body.include_usage:
            yield self._envelope("chat.completion.chunk", []) | {"usage": self._generation.usage.as_json()}

    async def whole(self) -> dict[str, Any]:
        """Everything in one object."""
        tokens: dict[int, list[dict[str, Any]]] = {}
        choices: dict[int, Raw] = {}  # written down as soon as it can be: far smaller, and not all at once
        ids: dict[int, list[int]] = {}
        async with aclosing(self._generation.pieces()) as pieces:
            async for index, piece in pieces:
                self._size.add(len(piece.entries))
                ids.setdefault(index, []).extend(piece.tokens)
                message = self._message(index)
                message.add(piece.text, last=piece.finish_reason is not None)
                tokens.setdefault(index, []).extend(chat_tokens(self._text, piece.entries))
                if piece.finish_reason is not None:
                    whole = self._common(replace(piece, tokens=ids[index]), tokens.pop(index), message)
                    choices[index] = Raw(encode_json({"index": index, "message": message.whole()} | whole))
        ordered = [choices[index] for index in sorted(choices)]
        answer = self._envelope("chat.completion", ordered) | self._prompt_ids()
        return answer | {"usage": self._generation.usage.as_json()}

    def _prompt_ids(self) -> dict[str, list[int]]:
        [prompt] = self._generation.prompts
        return {"prompt_token_ids": prompt.ids} if self._body.return_token_ids else {}

    def _message(self, index: int) -> Message:
        if index not in self._messages:
            self._messages[index] = Message(self._calling.parser() if self._calling else None)
        return self._messages[index]

    @property
    def _nothing(self) -> str | None:
        """Content before there is any."""
        return "" if self._calling is None else None

    def _common(self, piece: Piece, tokens: list[dict[str, Any]], message: Message) -> dict[str, Any]:
        return {
            "logprobs": {"content": tokens, "refusal": None} if self._body.logprobs else None,
            "finish_reason": message.finish_reason(piece.finish_reason),
            "stop_reason": piece.stop_reason,
        } | ({"token_ids": list(piece.tokens)} if self._body.return_token_ids else {})

    def _envelope(self, kind: str, choices: Sequence[Any]) -> dict[str, Any]:
        return self._generation.envelope(self._id, kind, choices)


routes = [
    Operation(
        "POST",
        "/v1/chat/completions",
        create_chat_completion,
        answers=ChatCompletion,
        events=ChatCompletionChunk,
        refuses=(*OPENING, TooManyRequests),
    )
]
