"""A chat request and the events of its answer, for all APIs."""

import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from server.errors import InvalidRequest
from server.openai.assembly import Entry, Piece
from server.openai.body import Body
from server.openai.conversation import Content, Conversation
from server.openai.generation import Generation, Prompt, check_vocabulary, checked_grammar, fit_max_tokens
from server.openai.reasoning import Thinking
from server.openai.schema import INT32, GenerationBody
from server.openai.target import open_target
from server.openai.tools import Calling, Tool, ToolChoice, allowed, check_choice
from server.services import Services
from server.tenants.caller import Caller
from server.text.processor import TextProcessor
from server.text.reasoning import any_text
from server.text.tools.source import Arguments, Begin, Parser, Text, Thought


class Prediction(Body):
    """The client's prediction of the answer, a hint for speed. It is not used here."""

    type: Literal["content"]
    content: Content


class ChatBody(GenerationBody, Conversation):
    """The body of a chat request."""

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
    max_reasoning_tokens: int | None = Field(None, ge=0, le=INT32)  # the thought is ended after so many
    include_reasoning: bool = True
    prediction: Prediction | None = None
    verbosity: str | None = None  # a hint without effect; template arguments go in `chat_template_kwargs`

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
        """The tools shown to the model: none if none may be called."""
        return [] if self.tool_choice == "none" else list(allowed(self.tool_choice, self.tools))

    def calling(self, text: TextProcessor) -> Calling | None:
        """Return the handling of tool calls; None without callable tools."""
        if not self.shown_tools or (tool_format := text.tool_format) is None:
            return None
        return Calling(text, tool_format, self.tools, self.tool_choice, self.parallel_tool_calls)


@dataclass(frozen=True, slots=True)
class Call:
    """The beginning of a function call; its arguments follow."""

    id: str
    name: str


Event = Text | Call | Arguments | Thought


@dataclass(frozen=True, slots=True)
class Finish:
    """The reason an answer ended, and the client's stop token or stop string if one ended it."""

    reason: Literal["stop", "length", "tool_calls"]
    stop_reason: int | str | None


@dataclass(frozen=True, slots=True)
class Addition:
    """The addition of one engine output to a choice's answer; the last has a `finish`."""

    choice: int
    events: list[Event]
    entries: list[Entry]  # log-probabilities, if requested
    tokens: Sequence[int]  # ids, if requested
    finish: Finish | None


@dataclass
class Chat:
    """A running chat request. Iterate `additions` once; the usage is complete when it ends."""

    text: TextProcessor
    generation: Generation
    calling: Calling | None
    shows_thoughts: bool

    async def additions(self) -> AsyncGenerator[Addition, None]:
        """Yield the additions of all choices as they arrive; closing the iterator aborts running sequences."""
        answers: dict[int, _Answer] = {}
        async with aclosing(self.generation.pieces()) as pieces:
            async for choice, piece in pieces:
                if choice not in answers:
                    answers[choice] = _Answer(self._parser())
                events, finish = answers[choice].read(piece)
                if not self.shows_thoughts:
                    events = [event for event in events if not isinstance(event, Thought)]
                yield Addition(choice, events, piece.entries, piece.tokens, finish)

    def _parser(self) -> Parser | None:
        """Return a parser for one answer; None for plain text."""
        thinking = self.generation.thinking
        if self.calling is not None:
            return self.calling.parser(thinking)
        return None if thinking is None else Parser(thinking.reader(any_text), {})


class _Answer:
    """One choice's answer, split into text, calls and thoughts.

    Args:
        parser: of calls and thoughts; None for plain text.
    """

    def __init__(self, parser: Parser | None) -> None:
        self._parser = parser
        self._called = False

    def read(self, piece: Piece) -> tuple[list[Event], Finish | None]:
        """Return the events of a piece, and the finish on the last one."""
        if self._parser is None:
            events: list[Event] = [Text(piece.text)] if piece.text else []
        else:
            cut = piece.finish_reason == "length" or piece.stop_reason is not None
            found = self._parser.feed(piece.text, last=piece.finish_reason is not None, cut=cut)
            events = [_with_id(event) for event in found]
        self._called = self._called or any(isinstance(event, Call) for event in events)
        if piece.finish_reason is None:
            return events, None
        called = piece.finish_reason == "stop" and self._called
        return events, Finish("tool_calls" if called else piece.finish_reason, piece.stop_reason)


def _with_id(event: Text | Begin | Arguments | Thought) -> Event:
    return Call(f"call_{uuid.uuid4().hex[:24]}", event.name) if isinstance(event, Begin) else event


@asynccontextmanager
async def open_chat(
    services: Services, caller: Caller, body: ChatBody, *, default_max_tokens: int | None = None
) -> AsyncIterator[Chat]:
    """Validate a request against its target and prepare it; the target stays open. Nothing is generated yet.

    Args:
        default_max_tokens: tokens of the answer if the body gives no limit; fewer if the context ends first.

    Raises LorakeetError.
    """
    info = services.engine_info
    async with open_target(
        services, caller, body.model, body.adapter_id, adapters=body.adapters, user=body.user
    ) as target:
        check_vocabulary(target.vocab_size, body)
        prompt, ids = await body.encode(target.text, info.max_model_len)
        if not ids:
            raise InvalidRequest("The chat template makes an empty prompt of these messages.", param="messages")
        requested = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        max_tokens = fit_max_tokens(info, body, ids, requested=requested, default=default_max_tokens, param="messages")
        calling = body.calling(target.text)
        grammar = (
            await checked_grammar(services, body)
            if calling is None
            else await calling.grammar(services, body.requested_grammar())
        )
        thinking = budget = None
        if (reasoning := target.text.reasoning_format) is not None:
            thinking = Thinking.for_prompt(target.text, reasoning, prompt, body.continued)
        if thinking is not None:
            grammar, budget = await thinking.grammar(grammar, body.max_reasoning_tokens)
        sampling = body.sampling(
            services.sampling_defaults,
            logprobs=body.top_logprobs if body.logprobs else None,
            grammar=grammar,
            thought=budget,
        )
        generation = Generation(
            services,
            body,
            target,
            [Prompt(ids, max_tokens)],
            sampling,
            calling.format.markers if calling else (),
            thinking,
        )
        yield Chat(target.text, generation, calling, body.include_reasoning)
