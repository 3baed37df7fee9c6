"""Generation for completions and chat: length check, admission, samples, usage, from a validated body to its pieces.

Prompts and responses are built by the callers.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Collection, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import msgspec

from server.admission import BACKGROUND, Ticket
from server.errors import ContextLengthExceeded, EngineUnavailable, InternalError, InvalidRequest
from server.logs import add_log_fields
from server.messages.protocol import (
    INVALID_GRAMMAR,
    LOAD_FAILED,
    NON_FINITE,
    TOO_LONG,
    Generate,
    Grammar,
    Output,
    Ready,
    Sampling,
    TokenLogprob,
)
from server.metrics import FinishedReason
from server.openai.assembly import Assembler, Piece
from server.openai.reasoning import Thinking
from server.openai.schema import GenerationBody
from server.openai.target import Target
from server.services import Services

log = logging.getLogger(__name__)


@dataclass
class Usage:
    """Tokens of one request over all its sequences. A prompt counts once for all its samples."""

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0  # of the drafted tokens
    device_seconds: float = 0.0
    reasoning_tokens: int | None = None  # None if the model does not think

    def as_json(self) -> dict[str, Any]:
        """Return OpenAI's `usage` object; drafts are counted as predictions, if there were any."""
        details = {} if self.reasoning_tokens is None else {"reasoning_tokens": self.reasoning_tokens}
        if self.drafted_tokens:
            details["accepted_prediction_tokens"] = self.accepted_tokens
            details["rejected_prediction_tokens"] = self.drafted_tokens - self.accepted_tokens
        return ({"completion_tokens_details": details} if details else {}) | {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(frozen=True)
class Prompt:
    """One prompt: its ids, the limit of new tokens, and its original text if it was given as text."""

    ids: list[int]
    max_tokens: int
    text: str | None = None


@dataclass
class Generation:
    """One request's sequences: every prompt `body.n` times.

    Choice `i` is sample `i % n` of prompt `i // n`. Iterate `pieces` once; `usage` is complete when it ends.
    """

    services: Services
    body: GenerationBody
    target: Target
    prompts: Sequence[Prompt]
    sampling: Sampling
    tool_markers: Collection[str] = ()  # special tokens that begin tool calls; they stay in the text
    thinking: Thinking | None = None
    usage: Usage = field(init=False)
    created: int = field(default_factory=lambda: int(time.time()))
    _tickets: list[Ticket] | None = None

    def __post_init__(self) -> None:
        self.usage = Usage(sum(len(prompt.ids) for prompt in self.prompts))
        if self.thinking is not None:
            self.usage.reasoning_tokens = 0

    @property
    def markers(self) -> Collection[str]:
        """Special tokens that stay in the text for parsers."""
        return self.tool_markers if self.thinking is None else (*self.tool_markers, *self.thinking.format.markers)

    def chunk_usage(self) -> dict[str, Any]:
        """Return the `usage` field of a stream's chunk other than the last."""
        if not self.body.include_usage:
            return {}
        return {"usage": self.usage.as_json() if self.body.continuous_usage else None}

    def envelope(self, id: str, kind: str, choices: Sequence[Any]) -> dict[str, Any]:  # noqa: A002
        """Return a response, or a chunk of one, around its choices."""
        return {
            "id": id,
            "object": kind,
            "created": self.created,
            "model": self.target.requested_name,
            "system_fingerprint": self.target.digest,
            "choices": choices,
        }

    @contextmanager
    def admitted(self) -> Iterator[None]:
        """Enter the queue before `pieces` is iterated. Raises `TooManyRequests`."""
        self._tickets = self._enter()
        try:
            yield
        finally:
            for ticket in self._tickets:
                ticket.end()

    def _enter(self) -> list[Ticket]:
        lengths = [len(prompt.ids) for prompt in self.prompts for _ in range(self.body.n)]
        caller = self.target.caller
        rows = self.services.registry.rows(caller, self.target.adapters)
        return self.services.admission.enter(lengths, caller.tenant, caller.allowance, self.usage.prompt_tokens, rows)

    async def pieces(self) -> AsyncGenerator[tuple[int, Piece], None]:
        """Yield (choice, piece) as they arrive; closing the iterator aborts running sequences.

        Raises `TooManyRequests` before anything is submitted; `EngineUnavailable` and `LorakeetError` at any time.
        """
        tickets = self._enter() if self._tickets is None else self._tickets
        ended, charged = False, None
        try:
            if len(tickets) == 1:
                async with aclosing(self._sample(0, tickets[0])) as pieces:
                    async for piece in pieces:
                        yield 0, piece
            else:
                async with aclosing(self._merge(tickets)) as merged:
                    async for choice, piece in merged:
                        yield choice, piece
            ended = True
        finally:
            for ticket in tickets:
                ticket.end()
            if ended or self.usage.completion_tokens:
                charged = charge(self.services, self.target, self.usage)
            add_log_fields(
                adapter="+".join(version.label for version in self.target.adapters) or None,
                prompt_tokens=self.usage.prompt_tokens,
                completion_tokens=self.usage.completion_tokens,
            )
        if charged is not None:
            await charged  # on disk before the response's last byte is sent

    async def _merge(self, tickets: list[Ticket]) -> AsyncGenerator[tuple[int, Piece], None]:
        """Run all samples concurrently. A prompt's first sample starts alone; the others then reuse its cached KV."""
        arrived: asyncio.Queue[tuple[int, Piece | Exception | None]] = asyncio.Queue()
        prompt_computed = [asyncio.Event() for _ in self.prompts]

        async def run(choice: int) -> None:
            computed = prompt_computed[choice // self.body.n]
            try:
                if choice % self.body.n:
                    await computed.wait()
                async with aclosing(self._sample(choice, tickets[choice])) as pieces:
                    async for piece in pieces:
                        computed.set()
                        arrived.put_nowait((choice, piece))
                arrived.put_nowait((choice, None))
            except Exception as exc:
                arrived.put_nowait((choice, exc))

        tasks = [asyncio.create_task(run(choice)) for choice in range(len(tickets))]
        try:
            running = len(tasks)
            while running:
                choice, item = await arrived.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    running -= 1
                else:
                    yield choice, item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _sample(self, choice: int, ticket: Ticket) -> AsyncGenerator[Piece, None]:
        """Run one sequence and yield its pieces."""
        prompt = self.prompts[choice // self.body.n]
        sample = choice % self.body.n
        assembler = self._assembler(prompt.ids)
        used = [(version.label, version.digest) for version in self.target.adapters]
        clock = self.services.metrics.request(*used, tenant=self.target.caller.tenant)
        reason: FinishedReason = "abort"
        scores: list[TokenLogprob | None] = []  # of the prompt
        try:
            outputs = self.services.engine.generate(self._request(prompt, sample))
            async with aclosing(outputs):
                async for output in outputs:
                    raise_if_failed(output)
                    ticket.leave(served=True)
                    before, thought_before = assembler.tokens, assembler.thought_tokens
                    piece = assembler.add(output)
                    tokens = assembler.tokens - before
                    clock.output(tokens, len(prompt.ids), output.queue_seconds)
                    self.usage.device_seconds += output.device_seconds
                    self.usage.completion_tokens += tokens
                    if self.usage.reasoning_tokens is not None:
                        self.usage.reasoning_tokens += assembler.thought_tokens - thought_before
                    if sample == 0:
                        self.usage.cached_tokens += output.cached_tokens
                    self.usage.drafted_tokens += output.drafted_tokens
                    self.usage.accepted_tokens += min(output.accepted_tokens, tokens)
                    scores += output.prompt_logprobs
                    if not output.tokens and output.finish_reason is None:
                        continue  # prompt logprobs of one chunk
                    if scores:
                        piece, scores = replace(piece, prompt_logprobs=scores), []
                    if self.body.return_token_ids:
                        piece = replace(piece, tokens=output.tokens[:tokens])
                    if piece.finish_reason is not None:
                        reason = piece.finish_reason
                        await outputs.aclose()  # on a stop string the engine would continue
                    yield piece
                    if piece.finish_reason is not None:
                        return
        except Exception:
            reason = "error"
            raise
        finally:
            clock.finish(reason)

    @cached_property
    def _stop_token_ids(self) -> list[int]:
        """The client's stop tokens, and those of the model's files and template unless `ignore_eos` is set."""
        own = () if self.body.ignore_eos else self.target.text.stop_tokens
        in_vocabulary = (id_ for id_ in own if id_ < self.target.vocab_size)
        return list(dict.fromkeys([*self.body.stop_token_ids, *in_vocabulary]))

    @property
    def _speculative_tokens(self) -> int:
        requested = self.body.speculative_tokens
        return self.services.settings.speculative_tokens if requested is None else requested

    def _request(self, prompt: Prompt, sample: int) -> Generate:
        sampling = msgspec.structs.replace(
            self.sampling,
            max_tokens=prompt.max_tokens,
            stop_token_ids=self._stop_token_ids,
            speculative_tokens=self._speculative_tokens,
            seed=(self.sampling.seed + sample) % 2**63,
            prompt_logprobs=None if sample else self.sampling.prompt_logprobs,
        )
        return Generate(
            id=uuid.uuid4().hex,
            prompt=prompt.ids,
            sampling=sampling,
            adapters=self.target.refs,
            tenant=self.target.caller.tenant,
            weight=self.target.caller.allowance.limits.weight,
            priority=self.body.priority,
            cache_salt=self.body.cache_salt or "",
            background=BACKGROUND.get(),
        )

    def _assembler(self, prompt: list[int]) -> Assembler:
        text, skip = self.target.text, self.body.skip_special_tokens
        # If a stop string has a special token, text is decoded with special tokens; they are removed after matching.
        hidden = text.special_texts if skip and text.has_special([*self.body.stop, *self.markers]) else {}
        hidden = {id_: special for id_, special in hidden.items() if not any(special in m for m in self.markers)}
        skip = skip and not hidden and not text.has_special(list(self.markers))
        return Assembler(
            partial(text.decode, skip_special_tokens=skip),
            prompt,
            silent=text.special_ids if skip else (),
            stops=self.body.stop,
            hidden=hidden,
            include_stop=self.body.include_stop_str_in_output,
            min_tokens=self.body.min_tokens,
            stop_token_ids=self.body.stop_token_ids,
            thought=None if self.thinking is None else self.thinking.counter(),
        )


def charge(services: Services, target: Target, usage: Usage) -> asyncio.Future[None]:
    """Charge a request's usage to its tenant; the future is done once it is on disk."""
    caller = target.caller
    if caller.allowance.limited:
        caller.allowance.spend(usage.completion_tokens)
    name = "+".join(version.name_for(caller.tenant) for version in target.adapters)
    counts = usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens
    return services.ledger.add(caller.tenant, name, *counts, usage.device_seconds)


def fit_max_tokens(
    info: Ready, body: GenerationBody, prompt: Sequence[int], *, requested: int | None, default: int | None, param: str
) -> int:
    """Return the number of tokens that may be generated after this prompt.

    Args:
        requested: the client's `max_tokens`, which must fit.
        default: the limit if the client gave none, reduced to fit; None: the rest of the context.
        param: the field of the prompt, for the error.

    Raises `ContextLengthExceeded` with the numbers, and `InvalidRequest` when `min_tokens` exceeds the result.
    """
    room = info.max_model_len - len(prompt)
    max_tokens = 1 if requested is None else requested
    if max_tokens > room:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {info.max_model_len} tokens, but this request needs "
            f"{len(prompt) + max_tokens}: {len(prompt)} for the prompt and {max_tokens} for the completion.",
            param="max_tokens" if requested and room > 0 else param,
            tokens=(len(prompt) + max_tokens, info.max_model_len),
        )
    if requested is None:
        max_tokens = room if default is None else min(default, room)
    if body.min_tokens > max_tokens:
        raise InvalidRequest(
            f"`min_tokens` is {body.min_tokens}, more than the {max_tokens} tokens that may be generated.",
            param="min_tokens",
        )
    return max_tokens


async def checked_grammar(services: Services, body: GenerationBody) -> Grammar | None:
    """Return the body's grammar, checked. Raises `InvalidRequest` when it cannot be enforced."""
    requested = body.requested_grammar()
    return None if requested is None else await services.grammars.check(*requested)


def check_vocabulary(vocab_size: int, body: GenerationBody) -> None:
    """Check the body's token ids. Raises `InvalidRequest` for one outside the vocabulary."""
    for param, ids in (("logit_bias", body.logit_bias), ("stop_token_ids", body.stop_token_ids)):
        for id_ in ids:
            if id_ >= vocab_size:
                raise InvalidRequest(
                    f"`{param}`: token id {id_} is outside the vocabulary of {vocab_size}.", param=param
                )


_CLIENT_FAULTS: dict[str | None, type[InvalidRequest]] = {
    TOO_LONG: ContextLengthExceeded,
    NON_FINITE: InvalidRequest,
    INVALID_GRAMMAR: InvalidRequest,
}


def raise_if_failed(output: Output) -> None:
    """Raise the error of a sequence that failed while the engine continues."""
    if output.finish_reason == "abort":
        raise EngineUnavailable("The engine aborted this request; try again.")
    if output.error is None:
        return
    if (fault := _CLIENT_FAULTS.get(output.code)) is not None:
        raise fault(output.error, code=output.code)
    log.error("a sequence failed: %s (%s)", output.error, output.code)
    raise InternalError("The adapter could not be loaded." if output.code == LOAD_FAILED else "The model failed.")
