"""`POST /v1/completions`: the completion of a prompt given as text or token ids."""

import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from msgspec import Raw
from pydantic import Field
from starlette.requests import Request
from starlette.types import Send

from server.errors import InvalidRequest, TooManyRequests
from server.http.answer import CancellableResponse, encode_json, send_events, send_json
from server.http.objects.generation import Completion
from server.http.operations import OPEN_ERRORS, Operation
from server.messages.protocol import Ready
from server.openai.assembly import Piece
from server.openai.generation import Generation, Prompt, check_vocabulary, checked_grammar, fit_max_tokens
from server.openai.logprobs import AnswerSize, columns, echoed_columns, extend, with_echo
from server.openai.prompts import Prompts, encode_prompts
from server.openai.schema import INT32, GenerationBody
from server.openai.target import Target, open_target
from server.services import Services, caller_of, services_of
from server.tenants.caller import Caller
from server.text.processor import TextProcessor
from server.text.streaming import Detokenizer

DEFAULT_MAX_TOKENS = 16


class CompletionBody(GenerationBody):
    """The body of `POST /v1/completions`."""

    no_ops: ClassVar[dict[str, tuple[Any, ...]]] = GenerationBody.no_ops | {"suffix": ("",), "tools": ([],)}

    prompt: Prompts
    max_tokens: int | None = Field(None, ge=0, le=INT32)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False
    add_special_tokens: bool = True


async def create_completion(request: Request, body: CompletionBody) -> CancellableResponse:
    """Generate a completion, whole or as server-sent events."""
    if body.max_tokens == 0 and not body.echo:
        raise InvalidRequest("`max_tokens` may be 0 only with `echo`.", param="max_tokens")
    return CancellableResponse(partial(_answer, services_of(request), caller_of(request), body))


async def _answer(services: Services, caller: Caller, body: CompletionBody, send: Send) -> None:
    services.admission.check_size(len(body.prompt) * body.n, "n" if len(body.prompt) < body.n else "prompt")
    async with open_target(
        services, caller, body.model, body.adapter_id, adapters=body.adapters, user=body.user
    ) as target:
        check_vocabulary(target.vocab_size, body)
        prompts = await _encode_prompts(services.engine_info, target, body)
        echoes: list[_Echo] = []
        if body.echo:
            work = partial(_echoes, target.text, body, prompts)
            echoes = await target.text.in_thread(sum(len(prompt.ids) for prompt in prompts), work)
        sampling = body.sampling(
            services.sampling_defaults,
            logprobs=body.logprobs,
            prompt_logprobs=body.logprobs if body.echo else None,
            grammar=await checked_grammar(services, body),
        )
        generation = Generation(services, body, target, prompts, sampling)
        writer = _Writer(target.text, body, generation, echoes, services.settings.max_response_bytes)
        headers = {"X-Adapter-Digest": target.digest}
        if body.stream:
            async with aclosing(writer.chunks()) as chunks:
                await send_events(send, chunks, headers, ping_seconds=services.settings.stream_ping_seconds)
        else:
            await send_json(send, await writer.full_response(), headers)


async def _encode_prompts(info: Ready, target: Target, body: CompletionBody) -> list[Prompt]:
    special = body.add_special_tokens
    encoded = await encode_prompts(target, body.prompt, info.max_model_len, add_special_tokens=special, param="prompt")
    prompts = []
    for given, ids in zip(body.prompt, encoded, strict=True):
        room = fit_max_tokens(info, body, ids, requested=body.max_tokens, default=DEFAULT_MAX_TOKENS, param="prompt")
        prompts.append(Prompt(ids, room, given if isinstance(given, str) else None))
    return prompts


# --- echo -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Echo:
    """A prompt as repeated before its completion."""

    text: str
    offsets: list[int]  # start of each token; empty unless logprobs are requested


def _echoes(text: TextProcessor, body: CompletionBody, prompts: Sequence[Prompt]) -> list[_Echo]:
    return [_echo(text, body, prompt) for prompt in prompts]


def _echo(text: TextProcessor, body: CompletionBody, prompt: Prompt) -> _Echo:
    if prompt.text is not None:
        with_offsets = body.logprobs is not None
        offsets = text.offsets(prompt.text, add_special_tokens=body.add_special_tokens) if with_offsets else []
        return _Echo(prompt.text, offsets)
    skip = body.skip_special_tokens
    decode = partial(text.decode, skip_special_tokens=skip)
    detokenizer = Detokenizer(decode, silent=text.special_ids if skip else ())
    echoed, offsets = "", []
    for token in prompt.ids:
        offsets.append(len(echoed))
        echoed += detokenizer.add(token)
    return _Echo(echoed + detokenizer.flush(), offsets)


# --- OpenAI's shapes --------------------------------------------------------------------------------


class _Writer:
    """Builds a completion from a generation's pieces."""

    def __init__(
        self, text: TextProcessor, body: CompletionBody, generation: Generation, echoes: list[_Echo], max_bytes: int
    ) -> None:
        self._text = text
        self._body = body
        self._generation = generation
        self._echoes = echoes
        self._echoed: dict[int, dict[str, bytes]] = {}  # columns by prompt, once its first sample has them
        size = partial(AnswerSize, max_bytes, body.logprobs, 25)
        self._size = size()
        for prompt, echo in zip(generation.prompts, echoes, strict=bool(echoes)):
            if body.stream:
                size().add(len(prompt.ids), len(echo.text))  # one event holds a whole prompt
            else:
                self._size.add(len(prompt.ids) * body.n, len(echo.text) * body.n)
        self._started: set[int] = set()  # choices whose first part has been sent
        self._id = f"cmpl-{uuid.uuid4().hex}"

    async def chunks(self) -> AsyncGenerator[dict[str, Any], None]:
        """Yield a chunk per piece; with `include_usage` a last one of usage."""
        async with aclosing(self._generation.pieces()) as pieces:
            async for index, piece in pieces:
                await self._encode_prompt_logprobs(index, piece)
                begins = index not in self._started
                if choice := self._choice(index, piece):
                    if begins:
                        choice = self._with_echo(index, choice)
                    yield self._envelope([choice]) | self._generation.chunk_usage()
        if self._body.include_usage:
            yield self._envelope([]) | {"usage": self._generation.usage.as_json()}

    async def full_response(self) -> dict[str, Any]:
        """Return the whole response in one object."""
        choices: dict[int, dict[str, Any]] = {}
        encoded_choices: dict[int, Raw] = {}
        async with aclosing(self._generation.pieces()) as pieces:
            async for index, piece in pieces:
                self._size.add(len(piece.entries))
                await self._encode_prompt_logprobs(index, piece)
                more = self._choice(index, piece)
                if more is None:
                    continue
                choice = choices.setdefault(index, more)
                if choice is not more:
                    choice["text"] += more["text"]
                    if choice["logprobs"] is not None:
                        extend(choice["logprobs"], more["logprobs"])
                    if self._body.return_token_ids:
                        choice["token_ids"] += more["token_ids"]
                    choice |= {key: more[key] for key in ("finish_reason", "stop_reason")}
                if piece.finish_reason is not None:
                    choice = self._with_echo(index, choices.pop(index))
                    encoded_choices[index] = Raw(encode_json(choice))  # far smaller, and spread over time
        ordered = [encoded_choices[index] for index in sorted(encoded_choices)]
        return self._envelope(ordered) | {"usage": self._generation.usage.as_json()}

    async def _encode_prompt_logprobs(self, index: int, piece: Piece) -> None:
        """Encode a prompt's log-probabilities once for all its samples."""
        if piece.prompt_logprobs:
            prompt = index // self._body.n
            ids, offsets = self._generation.prompts[prompt].ids, self._echoes[prompt].offsets
            work = partial(echoed_columns, self._text, ids, offsets, piece.prompt_logprobs)
            self._echoed[prompt] = await self._text.in_thread(100 * len(ids), work)

    def _choice(self, index: int, piece: Piece) -> dict[str, Any] | None:
        """Return a piece's addition to its choice; None if there is nothing to send yet."""
        prompt = index // self._body.n
        echo = self._echoes[prompt] if self._echoes else None
        with_logprobs = self._body.logprobs is not None
        text = piece.text
        begins = index not in self._started
        logprobs = columns(self._text, piece.entries, start=len(echo.text) if echo else 0) if with_logprobs else None
        if echo is not None and begins:
            text = echo.text + text
        elif not piece:
            return None
        self._started.add(index)
        choice = {
            "index": index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
        }
        if self._body.return_token_ids:
            ids = self._generation.prompts[prompt].ids
            choice |= {"token_ids": list(piece.tokens)} | ({"prompt_token_ids": ids} if begins else {})
        return choice

    def _with_echo(self, index: int, choice: dict[str, Any]) -> dict[str, Any]:
        """Return the choice with its prompt's log-probabilities first, if requested."""
        echoed = self._echoed.get(index // self._body.n)
        return choice if echoed is None else choice | {"logprobs": with_echo(echoed, choice["logprobs"])}

    def _envelope(self, choices: Sequence[Any]) -> dict[str, Any]:
        return self._generation.envelope(self._id, "text_completion", choices)


routes = [
    Operation(
        "POST",
        "/v1/completions",
        create_completion,
        response_type=Completion,
        events=Completion,
        errors=(*OPEN_ERRORS, TooManyRequests),
    )
]
