"""Messages of a chat, and the prompt that they make through a chat template."""

import json
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, model_validator

from server.errors import InvalidRequest
from server.openai.body import Body, Items
from server.openai.tools import FunctionName, Tool, check_tools
from server.text.chat_template import RESERVED
from server.text.processor import TextProcessor


def _content(value: Any) -> Any:
    """Text, or text parts, which are joined by line breaks as vLLM does."""
    if not isinstance(value, list):
        return value
    texts = []
    for i, part in enumerate(value):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(f'part {i} is not of the form {{"type": "text", "text": "..."}}; only text is supported')
        texts.append(part["text"])
    if not texts:
        raise ValueError("must not be an empty list")
    return "\n".join(texts)


def _template_arguments(value: Any) -> Any:
    if not isinstance(value, dict):
        raise ValueError("must be an object")
    for name, argument in value.items():
        if name in RESERVED or not name.isidentifier():
            raise ValueError(f"{name[:100]!r} cannot be given")
        if not (argument is None or isinstance(argument, str | int | float)):
            raise ValueError(f"{name[:100]!r} must be a string, a number, true, false or null")
    return value


class TextPart(BaseModel):
    """Part of a message."""

    type: Literal["text"]
    text: str


_CONTENT = BeforeValidator(_content, json_schema_input_type=str | Annotated[list[TextPart], Field(min_length=1)])
_ARGUMENTS = BeforeValidator(_template_arguments, json_schema_input_type=dict[str, str | int | float | bool | None])


def _arguments(value: Any) -> Any:
    """JSON of an object, as models write it."""
    try:
        if isinstance(value, str) and isinstance(json.loads(value or "{}"), dict):
            return value or "{}"
    except (ValueError, RecursionError):
        pass
    raise ValueError("must be the JSON text of an object")


class CalledFunction(Body):
    """A function that was called, and its arguments in JSON."""

    name: FunctionName
    arguments: Annotated[str, BeforeValidator(_arguments)]


class ToolCall(Body):
    """A call in an earlier answer."""

    no_ops: ClassVar[dict[str, tuple[Any, ...]]] = {"index": tuple(range(128))}

    id: str = Field(min_length=1, max_length=256)
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Body):
    """One message. What clients send back from an answer (`refusal: null`, `tool_calls: []`) is accepted."""

    no_ops: ClassVar[dict[str, tuple[Any, ...]]] = {
        "tool_calls": ([],),
        "annotations": ([],),
        "reasoning_content": ("",),
    }

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str, _CONTENT] = ""  # may only be missing beside `tool_calls`
    name: str | None = None
    tool_calls: Items[ToolCall] = Field([])
    tool_call_id: str | None = None

    def for_template(self) -> dict[str, Any]:
        """The message as a chat template sees it."""
        return self.model_dump(exclude_none=True, exclude=set() if self.tool_calls else {"tool_calls"})


class Conversation(Body):
    """What makes a prompt of messages; `/tokenize` takes it too."""

    messages: Items[Message] = Field(min_length=1)
    tools: Items[Tool] = Field([])
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False  # the template writes them
    chat_template_kwargs: Annotated[dict[str, Any], _ARGUMENTS] = Field({})

    @model_validator(mode="after")
    def _check_continuation(self) -> Self:
        if self.continue_final_message and self.add_generation_prompt:
            raise InvalidRequest(
                "`continue_final_message` needs `add_generation_prompt: false`: the prompt ends in the last message.",
                param="continue_final_message",
            )
        return self

    @model_validator(mode="after")
    def _check_tools(self) -> Self:
        if self.tools:
            check_tools(self.tools)
        for i, message in enumerate(self.messages):
            if message.tool_calls and message.role != "assistant":
                param = f"messages.{i}.tool_calls"
                raise InvalidRequest(f"`{param}`: only an assistant's message calls tools.", param=param)
            if "content" not in message.model_fields_set and not message.tool_calls:
                raise InvalidRequest(f"`messages.{i}.content`: Field required", param=f"messages.{i}.content")
        return self

    @property
    def shown_tools(self) -> list[Tool]:
        """Those that the model is told of."""
        return self.tools

    async def encode(self, text: TextProcessor, max_tokens: int) -> list[int]:
        """The prompt's token ids. Raises `InvalidRequest` when the template refuses, or it must be too long."""
        prompt = await text.render_chat(
            await text.in_thread(20 * len(self.messages), lambda: [each.for_template() for each in self.messages]),
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=self.continue_final_message,
            arguments=self.chat_template_kwargs,
            tools=[tool.for_template() for tool in self.shown_tools],
            max_tokens=max_tokens,
        )
        special = self.add_special_tokens
        (ids,) = await text.encode([prompt], add_special_tokens=special, max_tokens=max_tokens, param="messages")
        return ids
