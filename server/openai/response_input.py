"""The input items of `/v1/responses`, and their conversion to chat messages."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from server.openai.body import Body, Items
from server.openai.conversation import CalledFunction
from server.openai.parts import parts

Item = dict[str, Any]
ItemStatus = Literal["in_progress", "completed", "incomplete"]


class InputText(Body):
    """Text for the model."""

    type: Literal["input_text"]
    text: str
    prompt_cache_breakpoint: dict[str, Any] | None = None  # no effect: every prefix is cached


class AnswerText(Body):
    """Text of the model in an earlier answer."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any] = Field([])
    logprobs: list[Any] = Field([])
    parsed: Any = None  # left in answers by OpenAI's `parse`


class RefusalText(Body):
    """A refusal by the model in an earlier answer."""

    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


def _text(text: str) -> Body:
    return InputText.model_construct(type="input_text", text=text)  # valid by construction, and there may be thousands


_TEXTS: dict[str, type[Body]] = {"input_text": InputText, "output_text": AnswerText, "refusal": RefusalText}
_OUTPUTS: dict[str, type[Body]] = {"input_text": InputText, "output_text": AnswerText}
_Id = Annotated[str, Field(min_length=1, max_length=256)]


class MessageItem(Body):
    """A message; `type` may be left out."""

    no_ops: ClassVar[dict[str, tuple[Any, ...]]] = {"phase": ("commentary", "final_answer")}

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Annotated[list[Any], parts("content", _TEXTS, _text)]
    id: str | None = None
    status: ItemStatus | None = None


_CALL_NO_OPS: dict[str, tuple[Any, ...]] = {"caller": ({"type": "direct"},), "async": (False,)}


class CallItem(CalledFunction):
    """A tool call in an earlier answer."""

    no_ops: ClassVar[dict[str, tuple[Any, ...]]] = _CALL_NO_OPS

    type: Literal["function_call"]
    call_id: _Id
    id: str | None = None
    status: ItemStatus | None = None


class CallOutputItem(Body):
    """The result of a tool call."""

    no_ops: ClassVar[dict[str, tuple[Any, ...]]] = _CALL_NO_OPS

    type: Literal["function_call_output"]
    call_id: _Id
    output: Annotated[list[Any], parts("output", _OUTPUTS, _text)]
    id: str | None = None
    status: ItemStatus | None = None


class ThoughtText(Body):
    """Part of a thought."""

    type: Literal["reasoning_text", "summary_text"]
    text: str


class ReasoningItem(Body):
    """A thought in an earlier answer."""

    type: Literal["reasoning"]
    summary: Items[ThoughtText] = Field([])
    content: Items[ThoughtText] = Field([])
    encrypted_content: str | None = None
    id: str | None = None
    status: ItemStatus | None = None


class ItemReference(Body):
    """A reference to an item of a stored response."""

    type: Literal["item_reference"] = "item_reference"
    id: _Id


_ITEMS: dict[str, type[Body]] = {
    "message": MessageItem,
    "function_call": CallItem,
    "function_call_output": CallOutputItem,
    "reasoning": ReasoningItem,
    "item_reference": ItemReference,
}


def _type_of(item: Mapping[str, Any]) -> Any:
    return item.get("type") or ("message" if "role" in item else "item_reference")


def _message(text: str) -> Body:
    return MessageItem.model_validate({"role": "user", "content": text})


INPUT_ITEMS = parts("input", _ITEMS, _message, _type_of)


def as_item(item: Body, number: str) -> Item:
    """Return the item in its stored form. Without an id it gets one, which ends with `number`."""
    match item:
        case MessageItem():
            kind = "output_text" if item.role == "assistant" else "input_text"
            more: Item = {"annotations": [], "logprobs": []} if item.role == "assistant" else {}
            content = [{"type": kind, "text": part.text} | more for part in item.content]
            plain: Item = {"role": item.role, "content": content, "status": item.status or "completed"}
            prefix = "msg"
        case CallItem():
            plain = item.model_dump(include={"call_id", "name", "arguments"}) | {"status": item.status or "completed"}
            prefix = "fc"
        case CallOutputItem():
            texts = [part.text for part in item.output]
            plain = {"call_id": item.call_id, "output": "\n".join(texts), "status": item.status or "completed"}
            prefix = "fco"
        case ReasoningItem():
            plain = item.model_dump(include={"summary", "content"})
            prefix = "rs"
        case _:
            raise TypeError(item)
    return {"id": item.id or f"{prefix}_{number}", "type": item.type} | plain


def messages_of(items: Sequence[Item], instructions: str | None) -> list[dict[str, Any]]:
    """Convert items to chat messages. A thought and the text and calls that follow it become one message.

    Two consecutive texts become two messages.
    """
    messages: list[dict[str, Any]] = []
    if instructions:
        messages.append({"role": "system", "content": instructions})
    thought: dict[str, str] = {}
    for item in items:
        match item["type"]:
            case "message":
                text = "\n".join(part["text"] for part in item["content"])
                is_assistant = item["role"] == "assistant"
                if is_assistant and not thought and messages and "tool_calls" in messages[-1]:
                    # Templates accept no message between calls and their results.
                    messages[-1]["content"] = "\n".join(filter(None, [messages[-1]["content"], text]))
                else:
                    messages.append({"role": item["role"], "content": text} | (thought if is_assistant else {}))
                thought = {}
            case "reasoning":
                thought = {"reasoning": "\n".join(part["text"] for part in item["content"] or item["summary"])}
            case "function_call_output":
                messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": item["output"]})
            case "function_call":
                if thought or not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant", "content": ""} | thought)
                    thought = {}
                function = {"name": item["name"], "arguments": item["arguments"]}
                call = {"id": item["call_id"], "type": "function", "function": function}
                messages[-1].setdefault("tool_calls", []).append(call)
    return messages
