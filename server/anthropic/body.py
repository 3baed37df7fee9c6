"""The body of `POST /v1/messages`, and its conversion to a chat request."""

import json
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, ValidationError, model_validator

from server.errors import InvalidRequest, LorakeetError, NotFound, as_error
from server.openai.body import Body, Items, Label
from server.openai.chat import ChatBody
from server.openai.grammars import Schema
from server.openai.parts import parts, with_renamed_param
from server.openai.schema import INT32, MAX_STOP_LENGTH, MAX_STOPS
from server.openai.tools import FunctionName

_Id = Annotated[str, Field(min_length=1, max_length=256)]


class CacheControl(Body):
    """A prefix to cache. Changes nothing here, since every prefix is cached."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None
    scope: Label | None = None


class _Cached(Body):
    cache_control: CacheControl | None = None


class TextInput(_Cached):
    """Text."""

    no_ops: ClassVar[dict[str, tuple[Any, ...]]] = {"citations": ([],)}

    type: Literal["text"]
    text: str
    parsed_output: Any = None  # left in answers by the client library's `parse`


class ThinkingInput(Body):
    """A thought in an earlier answer."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class RedactedInput(Body):
    """An unreadable thought of another server; it is left out."""

    type: Literal["redacted_thinking"]
    data: str


class ToolUseInput(_Cached):
    """A call in an earlier answer."""

    no_ops: ClassVar[dict[str, tuple[Any, ...]]] = {"caller": ({"type": "direct"},)}

    type: Literal["tool_use"]
    id: _Id
    name: FunctionName
    input: dict[str, Any]


def _text(text: str) -> Body:
    return TextInput(type="text", text=text)


_TEXT: dict[str, type[Body]] = {"text": TextInput}


class ToolResultInput(_Cached):
    """The result of a tool call."""

    type: Literal["tool_result"]
    tool_use_id: _Id
    content: Annotated[list[Any], parts("content", _TEXT, _text)] = Field([])
    is_error: bool = False  # not passed on; the text has the error


_BLOCKS: dict[str, type[Body]] = _TEXT | {
    "tool_use": ToolUseInput,
    "tool_result": ToolResultInput,
    "thinking": ThinkingInput,
    "redacted_thinking": RedactedInput,
}


class InputMessage(Body):
    """One turn of the conversation."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[list[Any], parts("content", _BLOCKS, _text)]

    @model_validator(mode="after")
    def _check_blocks(self) -> Self:
        foreign_types = {"assistant": ("tool_result",), "user": ("tool_use", "thinking", "redacted_thinking")}
        for i, block in enumerate(self.content):
            if block.type != "text" and block.type in foreign_types.get(self.role, tuple(_BLOCKS)):
                param = f"content.{i}.type"
                raise InvalidRequest(f"`{param}`: no {block.type} in a message of the {self.role}.", param=param)
        return self

    def chat(self) -> Iterator[dict[str, Any]]:
        """Yield the turn as chat messages; tool results come before the text beside them."""
        text = "\n".join(block.text for block in self.content if isinstance(block, TextInput))
        for block in self.content:
            if isinstance(block, ToolResultInput):
                result = "\n".join(part.text for part in block.content)
                yield {"role": "tool", "tool_call_id": block.tool_use_id, "content": result}
        calls = [
            {
                "id": block.id,
                "type": "function",
                "function": {"name": block.name, "arguments": json.dumps(block.input, ensure_ascii=False)},
            }
            for block in self.content
            if isinstance(block, ToolUseInput)
        ]
        if text or calls or not any(isinstance(block, ToolResultInput) for block in self.content):
            thought = "\n".join(block.thinking for block in self.content if isinstance(block, ThinkingInput))
            more = {"tool_calls": calls, "reasoning": thought}
            yield {"role": self.role, "content": text} | {name: value for name, value in more.items() if value}


class MessageTool(_Cached):
    """A tool that the model may call."""

    no_ops: ClassVar[dict[str, tuple[Any, ...]]] = {
        "defer_loading": (False,),
        "eager_input_streaming": (True, False),
        "allowed_callers": (["direct"],),
    }

    type: Literal["custom"] = "custom"
    name: FunctionName
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool = False
    input_examples: list[dict[str, Any]] = Field([])


class MessageToolChoice(Body):
    """Whether tools are called; `name` where one tool is required."""

    type: Literal["auto", "any", "tool", "none"]
    name: FunctionName | None = None
    disable_parallel_tool_use: bool = False

    @model_validator(mode="after")
    def _check_name(self) -> Self:
        if (self.type == "tool") != (self.name is not None):
            message = "`tool_choice.name` goes with the type `tool`, and only with that."
            raise InvalidRequest(message, param="tool_choice.name")
        return self


class Thinking(Body):
    """Whether to think before the answer."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(None, ge=1, le=INT32)
    display: Literal["summarized", "omitted"] | None = None  # "summarized" shows thoughts unchanged


class JsonSchemaOutput(Body):
    """JSON output that matches a schema."""

    type: Literal["json_schema"]
    schema_: Schema = Field(alias="schema")


class OutputConfig(Body):
    """Constraints on the output."""

    format: JsonSchemaOutput | None = None
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None


class Thread(Body):
    """A conversation stored by the server. None is stored here, which clients must expect at any time."""

    type: Literal["create", "continue"]
    previous_message_id: _Id | None = None


class MessageMetadata(Body):
    """The user; a split name resolves to the same version for one user."""

    user_id: Label | None = None


_TOOLS: dict[str, type[Body]] = {"custom": MessageTool}
_FIELD_NAMES = (  # fields of the chat request -> fields of this body
    ("tool_choice.function", "tool_choice"),
    ("reasoning_effort", "output_config.effort"),
    ("max_completion_tokens", "max_tokens"),
    ("stop", "stop_sequences"),
    ("max_reasoning_tokens", "thinking.budget_tokens"),
)


class CountBody(_Cached):
    """The body of `POST /v1/messages/count_tokens`."""

    no_ops: ClassVar[dict[str, tuple[Any, ...]]] = {
        "speed": ("standard",),
        "mcp_servers": ([],),
        "context_management": ({"edits": []}, {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]}),
    }

    model: str = Field(min_length=1)
    messages: Annotated[list[Any], parts("messages", {"message": InputMessage}, type_of=lambda _: "message")] = Field(
        min_length=1
    )
    system: Annotated[list[Any], parts("system", _TEXT, _text)] = Field([])
    tools: Annotated[list[Any], parts("tools", _TOOLS, type_of=lambda tool: tool.get("type") or "custom")] = Field([])
    tool_choice: MessageToolChoice = MessageToolChoice(type="auto")
    thinking: Thinking = Thinking(type="disabled", budget_tokens=None)
    output_config: OutputConfig = OutputConfig()
    output_format: JsonSchemaOutput | None = None  # beta name of `output_config.format`

    @model_validator(mode="after")
    def _check_form(self) -> Self:
        if self.output_format is not None and self.output_config.format is not None:
            message = "`output_format` and `output_config.format` both say what the answer must be; give one."
            raise InvalidRequest(message, param="output_format")
        return self

    def chat(self) -> ChatBody:
        """Return the equivalent chat request. Raises InvalidRequest."""
        try:
            return ChatBody.validate_object(self._chat())
        except (ValidationError, LorakeetError) as fault:
            raise self.translate_error(as_error(fault)) from None

    def translate_error(self, error: LorakeetError) -> LorakeetError:
        """Return an error of the chat request with the field names of this body."""
        tool, number, *rest = [*(error.param or "").split(".", 3), "", ""]
        if tool == "tools" and rest[0] == "function":
            schema = [(f"tools.{number}.function.parameters", f"tools.{number}.input_schema")]
            return with_renamed_param(error, [*schema, (f"tools.{number}.function", f"tools.{number}")])
        form = "output_config.format" if self.output_format is None else "output_format"
        return with_renamed_param(error, [("response_format.json_schema", form), *_FIELD_NAMES])

    def _chat(self) -> dict[str, Any]:
        messages = _join_turns(message for turn in self.messages for message in turn.chat())
        if self.system:
            messages.insert(0, {"role": "system", "content": "\n".join(part.text for part in self.system)})
        choices = {"any": "required", "tool": {"type": "function", "function": {"name": self.tool_choice.name}}}
        continued = messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]
        form = self.output_format or self.output_config.format or self.output_format
        schema = None if form is None else {"name": "output", "schema": form.schema_, "strict": True}
        return {
            "model": self.model,
            "messages": messages,
            "continue_final_message": continued,
            "add_generation_prompt": not continued,
            "tools": [_as_function(tool) for tool in self.tools],
            "tool_choice": choices.get(self.tool_choice.type, self.tool_choice.type),
            "parallel_tool_calls": not self.tool_choice.disable_parallel_tool_use,
            "response_format": schema and {"type": "json_schema", "json_schema": schema},
            "reasoning_effort": self.output_config.effort,
            "chat_template_kwargs": {"enable_thinking": self.thinking.type != "disabled"},
            "max_reasoning_tokens": self.thinking.budget_tokens,
            "include_reasoning": self.thinking.display != "omitted",
        }


class MessageBody(CountBody):
    """The body of `POST /v1/messages`."""

    no_ops: ClassVar[dict[str, tuple[Any, ...]]] = CountBody.no_ops | {"service_tier": ("auto", "standard_only")}

    max_tokens: int = Field(ge=1, le=INT32)  # fewer are generated if the context ends first
    stop_sequences: Items[Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]] = Field(
        [], max_length=MAX_STOPS
    )
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=0, le=INT32)
    metadata: MessageMetadata = MessageMetadata()
    thread: Thread | None = None
    stream: bool = False

    @model_validator(mode="after")
    def _check_thread(self) -> Self:
        if self.thread is not None and self.thread.type == "continue":
            message = "This server stores no conversations; send all messages."
            raise NotFound(message, param="thread.previous_message_id", code="thread_not_found")
        return self

    @model_validator(mode="after")
    def _check_budget(self) -> Self:
        if self.thinking.budget_tokens is not None and self.thinking.budget_tokens >= self.max_tokens:
            param = "thinking.budget_tokens"
            raise InvalidRequest(f"`{param}` must be less than `max_tokens`.", param=param)
        return self

    def _chat(self) -> dict[str, Any]:
        return super()._chat() | {
            "stop": self.stop_sequences,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "user": self.metadata.user_id,
        }


def _join_turns(messages: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Join consecutive user turns, and consecutive assistant turns, as Anthropic's API does."""
    joined: list[dict[str, Any]] = []
    for message in messages:
        last = joined[-1] if joined else {}
        if message["role"] not in ("user", "assistant") or last.get("role") != message["role"] or "tool_calls" in last:
            joined.append(message)
            continue
        for name in ("content", "reasoning"):
            if any(texts := [last.get(name), message.get(name)]):
                last[name] = "\n".join(filter(None, texts))
        if "tool_calls" in message:
            last["tool_calls"] = message["tool_calls"]
    return joined


def _as_function(tool: MessageTool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.input_schema}
    return {"type": "function", "function": function | {"strict": tool.strict}}
