"""Messages of a chat, and their prompt, rendered by a chat template."""

import json
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, model_validator
from pydantic_core import from_json

from server.errors import InvalidRequest
from server.openai.body import Body, Items
from server.openai.tools import FunctionName, Tool, check_tools
from server.text.chat_template import RESERVED
from server.text.processor import TextProcessor
from server.text.tools.arguments import as_object


def _content(value: Any) -> Any:
    """Join text parts with line breaks, as vLLM does. Refusals of earlier answers count as text."""
    if not isinstance(value, list):
        return value
    texts = []
    for i, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get(kind) if kind in ("text", "refusal") else None
        if not isinstance(text, str):
            raise ValueError(f'part {i} is not of the form {{"type": "text", "text": "..."}}; only text is supported')
        texts.append(text)
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
    """A text part of a message."""

    type: Literal["text"]
    text: str


class RefusalPart(BaseModel):
    """A refusal by the model in an earlier answer."""

    type: Literal["refusal"]
    refusal: str


Content = Annotated[str, BeforeValidator(_content, json_schema_input_type=str | list[TextPart | RefusalPart])]
_ARGUMENTS = BeforeValidator(_template_arguments, json_schema_input_type=dict[str, str | int | float | bool | None])


def _arguments(value: Any) -> Any:
    """Return a call's arguments as the JSON text of an object.

    Some clients send the object itself, as chat templates expect it. Text other than a JSON object, sent back from a
    model's answer, is converted by `as_object`.
    """
    if isinstance(value, dict):
        value = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, str):
        raise ValueError("must be an object, or its JSON as a text")
    parsed = as_object(value)
    try:
        if from_json(value) == parsed:
            return value
    except ValueError:
        pass
    return json.dumps(parsed, ensure_ascii=False)


class CalledFunction(Body):
    """A called function with its arguments in JSON."""

    name: FunctionName
    arguments: Annotated[str, BeforeValidator(_arguments, json_schema_input_type=str | dict[str, Any])] = "{}"
    parsed_arguments: Any = Field(None, exclude=True)  # left in answers by OpenAI's `parse`


class ToolCall(Body):
    """A tool call in an earlier answer."""

    no_ops: ClassVar[dict[str, tuple[Any, ...]]] = {"index": tuple(range(128))}
    ignored_fields: ClassVar[frozenset[str]] = frozenset({"extra_content", "provider_specific_fields"})

    id: str = Field(min_length=1, max_length=256)
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Body):
    """One message. Fields that clients send back from an answer (`refusal: null`, `tool_calls: []`) are accepted."""

    no_ops: ClassVar[dict[str, tuple[Any, ...]]] = {
        "tool_calls": ([],),
    }
    ignored_fields: ClassVar[frozenset[str]] = frozenset(
        {
            *("id", "opts", "status", "metadata", "created_at", "createdAt", "timestamp", "cache_control"),
            "copilot_cache_control",
            *("annotations", "extra_content", "provider_specific_fields", "reasoning_details", "thinking_blocks"),
        }
    )

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = ""  # may be missing in an answer or a tool result
    refusal: str | None = None  # an assistant's, in place of its content
    name: str | None = None
    tool_calls: Items[ToolCall] = Field([])
    tool_call_id: str | None = None
    parsed: Any = Field(None, exclude=True)  # left in answers by OpenAI's `parse`
    reasoning: str | None = None  # an assistant's thought before its answer
    reasoning_content: str | None = None  # another name of `reasoning`

    def for_template(self) -> dict[str, Any]:
        """Return the message for a chat template, with the thought as `reasoning`."""
        names = {"reasoning", "reasoning_content", "refusal"} | (set() if self.tool_calls else {"tool_calls"})
        thought = self.reasoning or self.reasoning_content
        more = {"content": self.text} | ({"reasoning": thought} if thought else {})
        return self.model_dump(exclude_none=True, exclude=names) | more

    @property
    def text(self) -> str:
        """The message's content and refusal."""
        return "\n".join(filter(None, [self.content, self.refusal])) if self.refusal else self.content


class Conversation(Body):
    """Messages and the options of rendering them to a prompt; also used by `/tokenize`."""

    messages: Items[Message] = Field(min_length=1)
    tools: Items[Tool] = Field([])
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False  # templates write them themselves
    chat_template_kwargs: Annotated[dict[str, Any], _ARGUMENTS] = Field({})
    reasoning_effort: str | None = Field(None, max_length=64)  # for templates with this argument

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
            if message.role != "assistant" and message.refusal:
                param = f"messages.{i}.refusal"
                raise InvalidRequest(f"`{param}`: only an assistant's message is a refusal.", param=param)
            if message.role != "assistant" and (message.reasoning or message.reasoning_content):
                param = f"messages.{i}.{'reasoning' if message.reasoning else 'reasoning_content'}"
                raise InvalidRequest(f"`{param}`: only an assistant's message has a thought.", param=param)
            if "content" not in message.model_fields_set and message.role not in ("assistant", "tool"):
                raise InvalidRequest(f"`messages.{i}.content`: Field required", param=f"messages.{i}.content")
        return self

    @property
    def shown_tools(self) -> list[Tool]:
        """The tools shown to the model."""
        return self.tools

    @property
    def continued(self) -> str | None:
        """The text of the last message if the answer continues it."""
        return self.messages[-1].text if self.continue_final_message else None

    def _template_arguments(self, text: TextProcessor) -> dict[str, Any]:
        arguments: dict[str, Any] = {}
        if self.reasoning_effort is not None:
            if text.template_takes("reasoning_effort"):
                arguments["reasoning_effort"] = self.reasoning_effort
            elif self.reasoning_effort == "none" and text.template_takes("enable_thinking"):
                arguments["enable_thinking"] = False
        return arguments | self.chat_template_kwargs

    async def encode(self, text: TextProcessor, max_tokens: int) -> tuple[str, list[int]]:
        """Return the prompt and its ids. Raises `InvalidRequest` when the template refuses or it is surely too long."""
        prompt = await text.render_chat(
            await text.in_thread(20 * len(self.messages), lambda: [each.for_template() for each in self.messages]),
            add_generation_prompt=self.add_generation_prompt,
            continue_final_message=self.continue_final_message,
            arguments=self._template_arguments(text),
            tools=[tool.for_template() for tool in self.shown_tools],
            max_tokens=max_tokens,
        )
        special = self.add_special_tokens
        (ids,) = await text.encode([prompt], add_special_tokens=special, max_tokens=max_tokens, param="messages")
        return prompt, ids
