"""Conversion of a chat's events to the events and the object of `/v1/responses`."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from msgspec.structs import replace

from server.errors import InvalidRequest, LorakeetError, TooManyRequests
from server.openai import response_objects as o
from server.openai.chat import Addition, Call, Chat
from server.openai.logprobs import AnswerSize, chat_tokens
from server.openai.response_body import ResponseBody
from server.text.tools.source import Arguments, Text, Thought

_PREFIX = {"message": "msg", "function_call": "fc", "reasoning": "rs"}


@dataclass
class _OpenItem:
    """The output item being written."""

    kind: Literal["message", "function_call", "reasoning"]
    id: str
    index: int
    call: Call | None = None
    text: list[str] = field(default_factory=list)
    logprobs: o.Logprobs = field(default_factory=list)

    def part(self) -> o.OutputText | o.ReasoningText:
        """Return the item's content part with its text so far."""
        text = "".join(self.text)
        if self.kind == "reasoning":
            return o.ReasoningText(text=text)
        return o.OutputText(text=text, logprobs=list(self.logprobs))

    def item(self, status: o.ItemStatus) -> o.OutputItem:
        """Return the item with its text so far."""
        if self.call is not None:
            name, arguments = self.call.name, "".join(self.text)
            return o.OutputCall(id=self.id, status=status, call_id=self.call.id, name=name, arguments=arguments)
        content: list[Any] = [] if status == "in_progress" else [self.part()]
        kind = o.OutputMessage if self.kind == "message" else o.OutputReasoning
        return kind(id=self.id, status=status, content=content)


class ResponseWriter:
    """Builds the events and the response object from a chat's additions.

    Args:
        number: of the response; its id and its items' ids contain it.
        stored: whether the response is stored.
        max_bytes: `max_response_bytes`.
    """

    def __init__(self, body: ResponseBody, chat: Chat, number: str, *, stored: bool, max_bytes: int) -> None:
        self._body = body
        self._chat = chat
        self._number = number
        self._events = 0
        self._item: _OpenItem | None = None
        self._pending: o.Logprobs = []  # of text not written yet
        self._size = AnswerSize(max_bytes, body.top_logprobs or 0 if body.logprobs else None, 65)
        sampling, target = chat.generation.sampling, chat.generation.target
        self.response = o.ResponseObject(
            id=f"resp_{number}",
            created_at=int(time.time()),
            status="in_progress",
            model=target.requested_name,
            system_fingerprint=target.digest,
            store=stored,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            **body.echoed_fields(),
        )

    def begin(self) -> list[o.ResponseEvent]:
        """Return the first events of a response."""
        return [self._event(o.Created, response=self.response), self._event(o.InProgress, response=self.response)]

    def add(self, addition: Addition) -> list[o.ResponseEvent]:
        """Return the events of an addition."""
        events = [] if self._events else self.begin()
        if self._body.logprobs:
            self._size.add(len(addition.entries))
            self._pending += chat_tokens(self._chat.text, addition.entries)
        for event in addition.events:
            match event:
                case Text(text):
                    events += self._write("message", text)
                case Thought(text):
                    events += self._write("reasoning", text)
                case Call():
                    events += self._open("function_call", event)
                case Arguments(text):
                    events += self._write("function_call", text)
        if addition.finish is not None:
            if self._item is None and not self.response.output:
                events += self._write("message", "")
            cut = addition.finish.reason == "length"
            events += self._close("incomplete" if cut else "completed")
            self._end("incomplete" if cut else "completed")
        return events

    def last(self) -> o.ResponseEvent:
        """Return the last event, once the response has ended."""
        kind = {"completed": o.Completed, "incomplete": o.IncompleteEvent}.get(self.response.status, o.Failed)
        return self._event(kind, response=self.response)

    def fail(self, error: LorakeetError) -> o.ResponseEvent:
        """End the response with an error; return the last event."""
        codes = {InvalidRequest: "invalid_prompt", TooManyRequests: "rate_limit_exceeded"}
        named = next((name for kind, name in codes.items() if isinstance(error, kind)), "server_error")
        self._end("failed", o.ResponseFault(code=named, message=error.message))
        return self.last()

    def cancel(self) -> None:
        """End the response as cancelled, with its output so far."""
        list(self._close("incomplete"))
        self._end("cancelled")

    # --- items

    def _write(self, kind: Literal["message", "function_call", "reasoning"], text: str) -> Iterator[o.ResponseEvent]:
        if self._item is None or self._item.kind != kind:
            yield from self._open(kind)
        assert self._item is not None
        item, logprobs = self._item, self._pending
        self._pending = []
        item.text.append(text)
        at = {"item_id": item.id, "output_index": item.index}
        if kind == "message":
            item.logprobs += logprobs
            if text:
                yield self._event(o.TextDelta, **at, delta=text, logprobs=logprobs)
        elif kind == "reasoning":
            yield self._event(o.ReasoningDelta, **at, delta=text)
        else:
            yield self._event(o.ArgumentsDelta, **at, delta=text)

    def _open(
        self, kind: Literal["message", "function_call", "reasoning"], call: Call | None = None
    ) -> Iterator[o.ResponseEvent]:
        yield from self._close("completed")
        index = len(self.response.output)
        self._item = item = _OpenItem(kind, f"{_PREFIX[kind]}_{self._number}_{index}", index, call)
        yield self._event(o.ItemAdded, output_index=index, item=item.item("in_progress"))
        if call is None:
            yield self._event(o.PartAdded, item_id=item.id, output_index=index, part=item.part())

    def _close(self, status: o.ItemStatus) -> Iterator[o.ResponseEvent]:
        item, self._item = self._item, None
        if item is None:
            return
        at: dict[str, Any] = {"item_id": item.id, "output_index": item.index}
        text = "".join(item.text)
        if item.call is not None:
            yield self._event(o.ArgumentsDone, **at, name=item.call.name, arguments=text)
        else:
            if item.kind == "message":
                item.logprobs += self._pending
                yield self._event(o.TextDone, **at, text=text, logprobs=item.logprobs)
            else:
                yield self._event(o.ReasoningDone, **at, text=text)
            yield self._event(o.PartDone, **at, part=item.part())
        self._pending = []
        done = item.item(status)
        # A new list, since unsent events refer to the old one.
        self.response = replace(self.response, output=[*self.response.output, done])
        yield self._event(o.ItemDone, output_index=item.index, item=done)

    def _end(self, status: o.Status, error: o.ResponseFault | None = None) -> None:
        usage = self._chat.generation.usage
        self.response = replace(
            self.response,
            status=status,
            error=error,
            completed_at=int(time.time()) if status == "completed" else None,
            incomplete_details=o.Incomplete() if status == "incomplete" else None,
            usage=o.ResponseUsage(
                input_tokens=usage.prompt_tokens,
                input_tokens_details=o.InputTokens(cached_tokens=usage.cached_tokens),
                output_tokens=usage.completion_tokens,
                output_tokens_details=o.OutputTokens(reasoning_tokens=usage.reasoning_tokens or 0),
                total_tokens=usage.prompt_tokens + usage.completion_tokens,
            ),
        )

    def _event(self, kind: Any, **fields: Any) -> o.ResponseEvent:
        event: o.ResponseEvent = kind(sequence_number=self._events, **fields)
        self._events += 1
        return event
