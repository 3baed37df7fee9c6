"""Conversion of a chat's events to the events and the message of `/v1/messages`."""

import uuid
from collections.abc import Iterator
from typing import Any, Literal

from server.anthropic import objects as o
from server.openai.chat import Addition, Call, Chat, Finish
from server.text.tools.arguments import ObjectText
from server.text.tools.source import Arguments, Text, Thought

_REASONS: dict[str, Literal["end_turn", "tool_use"]] = {"stop": "end_turn", "tool_calls": "tool_use"}


class MessageWriter:
    """Builds the events and the message from a chat's additions.

    Args:
        max_tokens: the client's `max_tokens`.
    """

    def __init__(self, chat: Chat, max_tokens: int) -> None:
        self._chat = chat
        self._max_tokens = max_tokens
        self._id = f"msg_{uuid.uuid4().hex}"
        self._blocks: list[o.Block] = []  # while open, the last block is still empty
        self._texts: list[str] | None = None  # of the last block while it is open
        self._input = ObjectText()  # of the last call
        self._ending = o.Ending(stop_reason="end_turn", stop_sequence=None)

    def begin(self) -> Iterator[o.MessageEvent]:
        """Yield the first events of a message."""
        yield o.MessageStart(message=self._message(None))
        yield o.Ping()

    def add(self, addition: Addition) -> Iterator[o.MessageEvent]:
        """Yield the events of an addition."""
        for event in addition.events:
            match event:
                case Text(text):
                    yield from self._write(o.TextBlock(text=""), o.TextBlockDelta(text=text), text)
                case Thought(text):
                    yield from self._write(o.ThinkingBlock(thinking=""), o.ThinkingDelta(thinking=text), text)
                case Call(id_, name):
                    yield from self._open(o.ToolUseBlock(id=id_, name=name, input={}))
                    self._input = ObjectText()
                case Arguments(text):
                    yield from self._write_input(self._input.feed(text))
        if addition.finish is not None:
            yield from self._close(cut=addition.finish.reason == "length" or addition.finish.stop_reason is not None)
            self._ending = self._end(addition.finish)
            yield o.MessageDelta(delta=self._ending, usage=self._usage())
            yield o.MessageStop()

    def message(self) -> o.MessageObject:
        """Return the whole message."""
        return self._message(self._ending)

    def _write(self, block: o.Block, delta: Any, text: str) -> Iterator[o.MessageEvent]:
        if self._texts is None or type(self._blocks[-1]) is not type(block):
            yield from self._open(block)
        yield self._delta(delta, text)

    def _write_input(self, text: str) -> Iterator[o.MessageEvent]:
        if text:
            yield self._delta(o.InputDelta(partial_json=text), text)

    def _delta(self, delta: Any, text: str) -> o.MessageEvent:
        assert self._texts is not None
        self._texts.append(text)
        return o.BlockDelta(index=len(self._blocks) - 1, delta=delta)

    def _open(self, block: o.Block) -> Iterator[o.MessageEvent]:
        yield from self._close()
        self._blocks.append(block)
        self._texts = []
        yield o.BlockStart(index=len(self._blocks) - 1, content_block=block)

    def _close(self, *, cut: bool = False) -> Iterator[o.MessageEvent]:
        if self._texts is None:
            return
        if isinstance(self._blocks[-1], o.ToolUseBlock):
            yield from self._write_input(self._input.end(cut=cut))
        text, self._texts = "".join(self._texts), None
        match self._blocks[-1]:
            case o.ToolUseBlock(id=id_, name=name):
                self._blocks[-1] = o.ToolUseBlock(id=id_, name=name, input=self._input.object())
            case o.ThinkingBlock():
                self._blocks[-1] = o.ThinkingBlock(thinking=text)
            case o.TextBlock():
                self._blocks[-1] = o.TextBlock(text=text)
        yield o.BlockStop(index=len(self._blocks) - 1)

    def _end(self, finish: Finish) -> o.Ending:
        if finish.reason == "length":
            reached_limit = self._chat.generation.usage.completion_tokens >= self._max_tokens
            reason: o.StopReason = "max_tokens" if reached_limit else "model_context_window_exceeded"
            return o.Ending(stop_reason=reason, stop_sequence=None)
        if isinstance(finish.stop_reason, str):
            return o.Ending(stop_reason="stop_sequence", stop_sequence=finish.stop_reason)
        return o.Ending(stop_reason=_REASONS[finish.reason], stop_sequence=None)

    def _message(self, ending: o.Ending | None) -> o.MessageObject:
        return o.MessageObject(
            id=self._id,
            model=self._chat.generation.target.requested_name,
            content=list(self._blocks),
            stop_reason=None if ending is None else ending.stop_reason,
            stop_sequence=None if ending is None else ending.stop_sequence,
            usage=self._usage(),
        )

    def _usage(self) -> o.MessageUsage:
        usage = self._chat.generation.usage
        return o.MessageUsage(
            input_tokens=usage.prompt_tokens - usage.cached_tokens,
            cache_read_input_tokens=usage.cached_tokens,
            output_tokens=usage.completion_tokens,
        )
