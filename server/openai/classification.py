"""Classification requests: bodies in vLLM's shapes, admission, scores from the engine."""

import asyncio
import math
import uuid
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from server.admission import BACKGROUND, Ticket
from server.errors import ContextLengthExceeded, InvalidRequest
from server.logs import add_log_fields
from server.messages.protocol import Generate, Sampling
from server.metrics import FinishedReason
from server.openai.body import Body, Label
from server.openai.conversation import Conversation
from server.openai.generation import Usage, charge, raise_if_failed
from server.openai.prompts import Prompts, encode_prompts
from server.openai.schema import INT32
from server.openai.target import Target
from server.services import Services


class ClassifyBody(Body):
    """Fields of both kinds of request."""

    no_ops: ClassVar[dict[str, tuple[Any, ...]]] = {"padding": ("do_not_pad",)}

    param: ClassVar[str]  # the field that holds the prompts

    model: str = Field(min_length=1)
    adapter_id: str | None = Field(None, min_length=1)
    use_activation: bool = True  # softmax over the labels, or sigmoid of a single one; else raw scores
    truncate_prompt_tokens: int | None = Field(None, ge=-1, le=INT32)  # -1: to the longest length that fits
    truncation_side: Literal["left", "right"] = "right"  # the side that is cut off
    cache_salt: str | None = Field(None, min_length=1, max_length=256)
    priority: int = Field(0, ge=-INT32, le=INT32)
    user: Label | None = None

    @model_validator(mode="after")
    def _check_truncation(self) -> Self:
        if self.truncate_prompt_tokens == 0:
            raise InvalidRequest("`truncate_prompt_tokens` must not be 0.", param="truncate_prompt_tokens")
        return self

    @abstractmethod
    async def token_ids(self, target: Target, longest: int) -> list[list[int]]:
        """Return the token ids of each prompt, none of them empty."""

    async def prompts(self, target: Target, longest: int) -> list[list[int]]:
        """Return the token ids of each prompt, truncated as requested. Raises ContextLengthExceeded, InvalidRequest."""
        max_tokens, prompts = self.truncate_prompt_tokens, await self.token_ids(target, longest)
        if max_tokens is not None:
            max_tokens = longest if max_tokens == -1 else max_tokens
            prompts = [ids[:max_tokens] if self.truncation_side == "right" else ids[-max_tokens:] for ids in prompts]
        for ids in prompts:
            if len(ids) > longest:
                message = f"This model's maximum context length is {longest} tokens, but this prompt has {len(ids)}."
                raise ContextLengthExceeded(message, param=self.param)
        return prompts


class ClassifyInputBody(ClassifyBody):
    """A classification request of texts or token ids."""

    param = "input"

    input: Prompts
    add_special_tokens: bool = True

    async def token_ids(self, target: Target, longest: int) -> list[list[int]]:
        special = self.add_special_tokens
        return await encode_prompts(target, self.input, longest, add_special_tokens=special, param=self.param)


class ClassifyChatBody(ClassifyBody, Conversation):
    """A classification request of a conversation, as for reward models: without a generation prompt."""

    param = "messages"

    add_generation_prompt: bool = False

    async def token_ids(self, target: Target, longest: int) -> list[list[int]]:
        _, ids = await self.encode(target.text, longest)
        if not ids:
            raise InvalidRequest("The chat template makes an empty prompt of these messages.", param="messages")
        return [ids]


async def scores(
    services: Services, body: ClassifyBody, target: Target, prompts: Sequence[list[int]]
) -> tuple[list[list[float]], Usage]:
    """Return each prompt's label scores. Raises `TooManyRequests` before anything is submitted, LorakeetError later."""
    usage = Usage(sum(map(len, prompts)))
    caller, lengths = target.caller, [len(ids) for ids in prompts]
    rows = services.registry.rows(caller, target.adapters)
    tickets = services.admission.enter(lengths, caller.tenant, caller.allowance, usage.prompt_tokens, rows)
    running = [
        asyncio.ensure_future(_scores(services, body, target, ids, ticket, usage))
        for ids, ticket in zip(prompts, tickets, strict=True)
    ]
    try:
        label_scores = await asyncio.gather(*running)
        await charge(services, target, usage)
        return label_scores, usage
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        for ticket in tickets:
            ticket.end()
        add_log_fields(adapter=target.adapters[0].label, prompt_tokens=usage.prompt_tokens, completion_tokens=0)


async def _scores(
    services: Services, body: ClassifyBody, target: Target, ids: list[int], ticket: Ticket, usage: Usage
) -> list[float]:
    request = Generate(
        id=uuid.uuid4().hex,
        prompt=ids,
        sampling=Sampling(max_tokens=0, temperature=0.0, classify=True),
        adapters=target.refs,
        tenant=target.caller.tenant,
        weight=target.caller.allowance.limits.weight,
        priority=body.priority,
        cache_salt=body.cache_salt or "",
        background=BACKGROUND.get(),
    )
    used = [(version.label, version.digest) for version in target.adapters]
    clock = services.metrics.request(*used, tenant=target.caller.tenant)
    reason: FinishedReason = "abort"
    label_scores: list[float] = []
    try:
        async with aclosing(services.engine.generate(request)) as outputs:
            async for output in outputs:
                raise_if_failed(output)
                ticket.leave(served=True)
                clock.output(0, len(ids), output.queue_seconds)
                usage.cached_tokens += output.cached_tokens
                usage.device_seconds += output.device_seconds
                label_scores += output.scores
        reason = "stop"
    except Exception:
        reason = "error"
        raise
    finally:
        clock.finish(reason)
    return label_scores


def probabilities(label_scores: Sequence[float]) -> list[float]:
    """Return the softmax over the labels, or the sigmoid of a single one."""
    if len(label_scores) == 1:
        return [0.5 * (1.0 + math.tanh(0.5 * label_scores[0]))]
    weights = [math.exp(score - max(label_scores)) for score in label_scores]
    return [weight / sum(weights) for weight in weights]
