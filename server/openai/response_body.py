"""The body of `POST /v1/responses`, and its conversion to a chat request."""

import json
import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, Tag, ValidationError, model_validator

from server.errors import InvalidRequest, LorakeetError, as_error
from server.messages.protocol import Grammar
from server.openai.body import Body, Entries, Items, Label, Metadata, PromptCacheOptions
from server.openai.chat import ChatBody
from server.openai.grammars import JsonObjectFormat, Schema, TextFormat
from server.openai.parts import parts, with_renamed_param
from server.openai.response_input import INPUT_ITEMS, Item, messages_of
from server.openai.schema import INT32, MAX_ADAPTERS, SERVICE_TIERS, SamplingBody, WeightedAdapter
from server.openai.tools import TOOL_CHOICE_KIND, FunctionTool, NamedFunction, Word, arguments_schema


class ResponseFunction(FunctionTool):
    """A function that the model may call."""

    no_ops: ClassVar[dict[str, tuple[Any, ...]]] = {
        "allowed_callers": (["direct"],),
        "async": (False,),
        "defer_loading": (False,),
    }

    type: Literal["function"]
    strict: bool = True  # when not given: only if the schema can be enforced


class JsonSchemaText(Body):
    """JSON that matches a schema. It is enforced whether `strict` or not."""

    type: Literal["json_schema"]
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    schema_: Schema = Field({}, alias="schema")
    strict: bool = False


class TextConfig(Body):
    """Constraints on the answer's text."""

    format: Annotated[TextFormat | JsonObjectFormat | JsonSchemaText, Field(discriminator="type")] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningConfig(Body):
    """How much to think. Summaries are accepted without effect: thoughts are returned unchanged."""

    no_ops: ClassVar[dict[str, tuple[Any, ...]]] = {"context": ("auto",), "mode": ("standard",)}

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class FunctionChoice(NamedFunction):
    """The function that must be called."""

    type: Literal["function"]


class AllowedTools(Body):
    """The subset of tools that may be called."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Items[FunctionChoice] = Field(min_length=1)


ToolChoice = Annotated[
    Word | Annotated[FunctionChoice, Tag("function")] | Annotated[AllowedTools, Tag("allowed_tools")], TOOL_CHOICE_KIND
]


class ResponseStreamOptions(Body):
    """`stream_options`."""

    include_obfuscation: bool = False  # OpenAI's padding of events against eavesdroppers; never added


Include = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",  # never present: thoughts are in `content`
    "file_search_call.results",  # this and all below belong to tools that are not served
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]
_TOOLS: dict[str, type[Body]] = {"function": ResponseFunction}
_FIELD_NAMES = (  # fields of the chat request -> fields of this body
    ("messages", "input"),
    ("max_completion_tokens", "max_output_tokens"),
    ("max_tokens", "max_output_tokens"),
    ("response_format.json_schema", "text.format"),
    ("response_format", "text.format"),
    ("reasoning_effort", "reasoning.effort"),
    ("verbosity", "text.verbosity"),
    ("tool_choice.function", "tool_choice"),
)


class ResponseBody(SamplingBody):
    """The body of `POST /v1/responses`."""

    no_ops: ClassVar[dict[str, tuple[Any, ...]]] = {
        "truncation": ("disabled",),
        "service_tier": SERVICE_TIERS,
        "context_management": ([],),
    }

    model: str = Field(min_length=1)
    adapter_id: str | None = Field(None, min_length=1)
    adapters: Items[WeightedAdapter] = Field([], max_length=MAX_ADAPTERS)
    input: Annotated[list[Any], INPUT_ITEMS]
    instructions: str | None = None
    previous_response_id: str | None = Field(None, min_length=1)
    tools: Annotated[list[Any], parts("tools", _TOOLS)] = Field([])
    tool_choice: ToolChoice = "auto"
    parallel_tool_calls: bool = True
    text: TextConfig = TextConfig()
    reasoning: ReasoningConfig = ReasoningConfig()
    max_output_tokens: int | None = Field(None, ge=1, le=INT32)
    max_tool_calls: int | None = Field(None, ge=1, le=INT32)  # no effect: there are no built-in tools
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    top_logprobs: int | None = Field(None, ge=0, le=20)
    include: Items[Include] = Field([])
    stream: bool = False
    stream_options: ResponseStreamOptions | None = None
    store: bool | None = None
    background: bool = False
    metadata: Metadata = Field({})
    chat_template_kwargs: dict[str, Any] = Field({})
    user: Label | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    prompt_cache_retention: Label | None = None
    prompt_cache_options: PromptCacheOptions | None = None
    client_metadata: Entries[str, Label] = Field({})  # the client's notes on its session, ignored

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("`stream_options` may only be given with `stream: true`.", param="stream_options")
        if self.background and self.store is False:
            raise InvalidRequest("`background` needs `store`: the answer is fetched later.", param="store")
        names = {tool.name for tool in self.tools}
        if isinstance(self.tool_choice, AllowedTools):
            for i, allowed in enumerate(self.tool_choice.tools):
                if allowed.name not in names:
                    param = f"tool_choice.tools.{i}.name"
                    raise InvalidRequest(f"`{param}` is none of the `tools`.", param=param)
        return self

    @property
    def logprobs(self) -> bool:
        """Whether the answer has log-probabilities."""
        return self.top_logprobs is not None or "message.output_text.logprobs" in self.include

    async def with_resolved_strict(self, check: Callable[[Grammar, str], Awaitable[Grammar]]) -> Self:
        """Return the body with `strict` resolved: if not given, a function is strict if its schema can be enforced.

        Args:
            check: raises InvalidRequest for a schema that cannot be enforced.
        """
        tools = []
        for i, tool in enumerate(self.tools):
            if "strict" not in tool.model_fields_set and self.tool_choice != "none":
                try:
                    await check(Grammar("json", json.dumps(arguments_schema(tool))), f"tools.{i}.parameters")
                except InvalidRequest:
                    tool = tool.model_copy(update={"strict": False})
            tools.append(tool)
        return self.model_copy(update={"tools": tools})

    def chat(self, items: Sequence[Item]) -> ChatBody:
        """Return the equivalent chat request with these items as messages. Raises InvalidRequest."""
        given: dict[str, Any] = {
            "model": self.model,
            "adapter_id": self.adapter_id,
            "adapters": [adapter.model_dump() for adapter in self.adapters],
            "messages": messages_of(items, self.instructions),
            "tools": self._tools(),
            "tool_choice": self._choice(),
            "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": self._format(),
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "logprobs": self.logprobs,
            "top_logprobs": self.top_logprobs,
            "reasoning_effort": self.reasoning.effort,
            "verbosity": self.text.verbosity,
            "chat_template_kwargs": self.chat_template_kwargs,
            "user": self.user,
        }
        given |= {name: getattr(self, name) for name in SamplingBody.model_fields.keys() & self.model_fields_set}
        given["stop"] = list(self.stop)
        try:
            return ChatBody.validate_object(given)
        except (ValidationError, LorakeetError) as fault:
            raise self.translate_error(as_error(fault)) from None

    @staticmethod
    def translate_error(error: LorakeetError) -> LorakeetError:
        """Return an error of the chat request with the field names of this body."""
        tool = re.match(r"tools\.\d+", error.param or "")
        return with_renamed_param(error, [(f"{tool[0]}.function", tool[0])] if tool else _FIELD_NAMES)

    def _tools(self) -> list[dict[str, Any]]:
        return [{"type": "function", "function": tool.model_dump(exclude={"type"})} for tool in self.tools]

    def _choice(self) -> str | dict[str, Any]:
        match self.tool_choice:
            case FunctionChoice(name=name):
                return {"type": "function", "function": {"name": name}}
            case AllowedTools(mode=mode, tools=tools):
                named = [{"type": "function", "function": {"name": tool.name}} for tool in tools]
                return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": named}}
            case choice:
                return choice

    def _format(self) -> dict[str, Any] | None:
        requested = self.text.format
        if isinstance(requested, JsonSchemaText):
            schema = requested.model_dump(by_alias=True, exclude={"type"})
            return {"type": "json_schema", "json_schema": schema}
        return None if requested is None else requested.model_dump()

    def echoed_fields(self) -> dict[str, Any]:
        """Return the request's fields that a response repeats."""
        choice, form = self.tool_choice, self.text.format or TextFormat(type="text")
        text = {"format": form.model_dump(by_alias=True, exclude_none=True)}
        return {
            "background": self.background,
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "max_tool_calls": self.max_tool_calls,
            "metadata": self.metadata,
            "parallel_tool_calls": self.parallel_tool_calls,
            "previous_response_id": self.previous_response_id,
            "prompt_cache_key": self.prompt_cache_key,
            "reasoning": {"effort": self.reasoning.effort, "summary": self.reasoning.summary},
            "safety_identifier": self.safety_identifier,
            "text": text | ({"verbosity": self.text.verbosity} if self.text.verbosity else {}),
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [tool.model_dump() for tool in self.tools],
            "top_logprobs": self.top_logprobs or 0,
            "user": self.user,
        }
