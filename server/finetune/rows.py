"""Lines of training data: their schema, and the checks that name a bad line and its field.

Messages, tools and calls are as in chat requests; arguments may also be objects, and ids may be missing.
"""

import itertools
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import msgspec

from adapters.strict_json import BYTE_ORDER_MARK, JsonFault, parse_json

MAX_LINE_BYTES = 4 << 20


class DatasetError(ValueError):
    """A refused data set; `line` counts from 1 and `field` is the faulty field's path within the line."""

    def __init__(self, reason: str, line: int | None = None, field: str | None = None) -> None:
        where = [f"line {line}"] if line is not None else []
        where += [f"field `{field}`"] if field else []
        super().__init__(f"{', '.join(where)}: {reason}" if where else reason)
        self.reason = reason
        self.line = line
        self.field = field


NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}  # of a tool without `parameters`


class TextPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    type: Literal["text"]
    text: str


class CalledFunction(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    name: str
    arguments: str | dict[str, Any] | None = None

    @property
    def json(self) -> str:
        if isinstance(self.arguments, dict):
            return json.dumps(self.arguments, ensure_ascii=False)
        return self.arguments or "{}"


class ToolCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    function: CalledFunction
    id: str | None = None
    type: Literal["function"] = "function"
    index: int | None = None


class Function(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    function: Function
    type: Literal["function"] = "function"

    def for_template(self) -> dict[str, Any]:
        """Return the tool in the form of requests' tools."""
        shown: dict[str, Any] = {"name": self.function.name, "description": self.function.description}
        shown["parameters"] = NO_ARGUMENTS if self.function.parameters is None else self.function.parameters
        return {"type": "function", "function": {name: value for name, value in shown.items() if value is not None}}


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One turn. `weight` 0 excludes an assistant turn from the loss; a thought has any of three names."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None  # optional beside calls only
    name: str | None = None
    weight: Literal[0, 1] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    thinking: str | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or ""

    @property
    def thought(self) -> str:
        return self.reasoning or self.reasoning_content or self.thinking or ""

    @property
    def trained(self) -> bool:
        """Whether its tokens count in the loss."""
        return self.role == "assistant" and self.weight != 0 and bool(self.text or self.tool_calls or self.thought)


class ChatExample(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    messages: list[Message]
    tools: list[Tool] | None = None
    parallel_tool_calls: bool | None = None

    def shown_tools(self) -> list[dict[str, Any]]:
        """Return the tools for the chat template."""
        return [tool.for_template() for tool in self.tools or ()]

    def shown_messages(self) -> list[dict[str, Any]]:
        """Return the messages in the form of requests'. Calls without ids get numbers, which results take in order."""
        numbers, open_calls = itertools.count(), []
        shown = []
        for message in self.messages:
            each: dict[str, Any] = {"role": message.role, "content": message.text}
            if message.tool_calls:
                calls = [
                    {
                        "id": call.id or f"call_{next(numbers)}",
                        "type": "function",
                        "function": {"name": call.function.name, "arguments": call.function.json},
                    }
                    for call in message.tool_calls
                ]
                each["tool_calls"] = calls
                open_calls = [call["id"] for call in calls]
            if message.thought:
                each["reasoning"] = message.thought
            if message.name is not None:
                each["name"] = message.name
            if message.role == "tool":
                answered = message.tool_call_id or (open_calls[0] if open_calls else None)
                open_calls = [id_ for id_ in open_calls if id_ != answered]
                each |= {} if answered is None else {"tool_call_id": answered}
            shown.append(each)
        return shown


class CompletionExample(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    prompt: str
    completion: str


class TextExample(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    text: str


Example = ChatExample | CompletionExample | TextExample
ExampleType = type[ChatExample] | type[CompletionExample] | type[TextExample]
_FIELDS: dict[ExampleType, set[str]] = {  # fields that determine an example's kind
    ChatExample: {"messages"},
    CompletionExample: {"prompt", "completion"},
    TextExample: {"text"},
}
for _kind in _FIELDS:  # once, in one thread: concurrent first uses of a type crash msgspec
    msgspec.json.Decoder(_kind)


def read_examples(lines: Iterable[bytes]) -> Iterator[tuple[int, Example | None]]:
    """Parse JSONL: `(line number, example)`, with None for a blank line.

    Raises:
        DatasetError: naming the line, and the faulty field if there is one.
    """
    for number, line in enumerate(lines, start=1):
        if len(line) > MAX_LINE_BYTES:
            raise DatasetError(f"longer than {MAX_LINE_BYTES} bytes", number)
        if number == 1:
            line = line.removeprefix(BYTE_ORDER_MARK)
        yield number, (_parse(line, number) if line.strip() else None)


def _parse(line: bytes, number: int) -> Example:
    try:
        record = parse_json(line)
    except JsonFault as fault:
        if fault.key is not None:
            raise DatasetError("duplicate field", number, fault.key) from fault
        raise DatasetError(str(fault), number) from fault
    if not isinstance(record, dict):
        raise DatasetError(f"must be a JSON object, not {type(record).__name__}", number)
    record = _without_empty_fields(record)
    kind = _kind_of(record, number)
    try:
        example = msgspec.convert(record, kind, strict=True)
    except msgspec.ValidationError as error:
        reason, name = _locate(str(error))
        raise DatasetError(reason, number, name) from error
    if isinstance(example, ChatExample):
        _check_chat(example, number)
    _check_unicode(record, number)
    return example


_EMPTY: tuple[Any, ...] = (None, "", [], {})


def _without_empty_fields(record: dict[str, Any]) -> dict[str, Any]:
    """Return the record without null or empty unknown fields, and without null fields of other kinds.

    Responses of chat endpoints have such fields (`refusal`, `tool_calls`), and table exports one for every column.
    """
    given = [names for names in _FIELDS.values() if any(record.get(name) is not None for name in names)]
    if given:
        others = set().union(*_FIELDS.values()).difference(*given)
        record = {name: value for name, value in record.items() if not (name in others and value is None)}
    known = set().union(*_FIELDS.values())
    record = {name: value for name, value in record.items() if name in known or value not in _EMPTY}
    if isinstance(messages := record.get("messages"), list):
        record["messages"] = [_plain_message(message) for message in messages]
    return record


def _plain_message(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    plain = {name: value for name, value in message.items() if name in Message.__struct_fields__ or value not in _EMPTY}
    weight = plain.get("weight")
    if isinstance(weight, float) and weight in (0.0, 1.0):
        plain["weight"] = int(weight)
    return plain


def _locate(message: str) -> tuple[str, str]:
    """Split msgspec's "Object missing required field `role` - at `$.messages[0]`" into (reason, field's path)."""
    reason, _, place = message.partition(" - at `$")
    path = place.rstrip("`").lstrip(".")
    if unknown := re.fullmatch(r"Object contains unknown field `(.*)`", reason):
        return "unknown field", f"{path}.{unknown[1]}".lstrip(".")
    if missing := re.fullmatch(r"Object missing required field `(.*)`", reason):
        return "missing", f"{path}.{missing[1]}".lstrip(".")
    return reason, path


def _kind_of(record: dict[str, Any], number: int) -> ExampleType:
    """Return a record's kind by its fields. Raises DatasetError."""
    present = [kind for kind, names in _FIELDS.items() if names & record.keys()]
    if not present:
        raise DatasetError("has neither `messages`, nor `prompt` and `completion`, nor `text`", number)
    for name in record:
        if not any(name in kind.__struct_fields__ for kind in present):
            raise DatasetError("unknown field", number, name)
    if len(present) > 1:
        raise DatasetError(f"mixes kinds of example: {', '.join(record)}", number, list(record)[-1])
    return present[0]


def _check_chat(example: ChatExample, number: int) -> None:
    if not example.messages:
        raise DatasetError("is empty", number, "messages")
    for index, message in enumerate(example.messages):
        if message.weight is not None and message.role != "assistant":
            raise DatasetError("only an assistant message has a weight", number, f"messages[{index}].weight")
        if message.role == "system" and index > 0:
            raise DatasetError("a system message comes first", number, f"messages[{index}].role")
        if message.content is None and not message.tool_calls:
            raise DatasetError("missing", number, f"messages[{index}].content")
        if (message.tool_calls or message.thought) and message.role != "assistant":
            raise DatasetError("only an assistant message calls tools or thinks", number, f"messages[{index}]")
        if example.parallel_tool_calls is False and len(message.tool_calls or ()) > 1:
            reason = "several calls, where `parallel_tool_calls` is false"
            raise DatasetError(reason, number, f"messages[{index}].tool_calls")
        for i, call in enumerate(message.tool_calls or ()):
            if not _is_object(call.function.json):
                path = f"messages[{index}].tool_calls[{i}].function.arguments"
                raise DatasetError("must be an object, or the JSON text of one", number, path)
    names = [tool.function.name for tool in example.tools or ()]
    if len(set(names)) < len(names):
        raise DatasetError("two functions have the same name", number, "tools")
    if not any(message.role == "assistant" for message in example.messages):
        raise DatasetError("no assistant message to learn from", number, "messages")


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _check_unicode(value: Any, number: int, path: str = "") -> None:
    """Raise DatasetError for lone surrogates, which JSON can express and no tokenizer can encode."""
    match value:
        case str():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                raise DatasetError("contains a lone surrogate", number, path) from error
        case dict():
            for name, item in value.items():
                _check_unicode(item, number, f"{path}.{name}" if path else name)
        case list():
            for index, item in enumerate(value):
                _check_unicode(item, number, f"{path}[{index}]")
