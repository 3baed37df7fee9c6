"""The body of `POST /v1/responses`, and the chat request that it is."""

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
from server.openai.parts import parts, renamed
from server.openai.response_input import INPUT_ITEMS, Item, messages_of
from server.openai.schema import INT32, MAX_ADAPTERS, SERVICE_TIERS, SamplingBody, WeightedAdapter
from server.openai.tools import CHOOSING, FunctionTool, NamedFunction, Word, arguments_schema


class ResponseFunction(FunctionTool):
    """A function."""

    no_ops: ClassVar[dict[str, tuple[Any, ...]]] = {
        "allowed_callers": (["direct"],),
        "async": (False,),
        "defer_loading": (False,),
    }

    type: Literal["function"]
    strict: bool = True  # if it can be, where it is not given


class JsonSchemaText(Body):
    """JSON of a schema. It is kept to whether it is `strict` or not."""

    type: Literal["json_schema"]
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    schema_: Schema = Field({}, alias="schema")
    strict: bool = False


class TextConfig(Body):
    """What the answer's text must be."""

    format: Annotated[TextFormat | JsonObjectFormat | JsonSchemaText, Field(discriminator="type")] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningConfig(Body):
    """How much to think; summaries are asked for in vain: thoughts are there as they are."""

    no_ops: ClassVar[dict[str, tuple[Any, ...]]] = {"context": ("auto",), "mode": ("standard",)}

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto", "concise", "detailed"] | None = None
    generate_summary: Literal["auto", "concise", "detailed"] | None = None


class FunctionChoice(NamedFunction):
    """The one function that is to be called."""

    type: Literal["function"]


class AllowedTools(Body):
    """Of the tools, those that may be called."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Items[FunctionChoice] = Field(min_length=1)


ToolChoice = Annotated[
    Word | Annotated[FunctionChoice, Tag("function")] | Annotated[AllowedTools, Tag("allowed_tools")], CHOOSING
]


class ResponseStreamOptions(Body):
    """`stream_options`."""

    include_obfuscation: bool = False  # OpenAI's padding of events against eavesdroppers: none is added


Include = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",  # none is: thoughts are in `content`
    "file_search_call.results",  # these are of tools that are not served
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]
_TOOLS: dict[str, type[Body]] = {"function": ResponseFunction}
_NAMES = (  # of the chat request's fields
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
    """The request's body."""

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
    max_tool_calls: int | None = Field(None, ge=1, le=INT32)  # of built-in tools, of which there are none
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
    client_metadata: Entries[str, Label] = Field({})  # notes of the client on its session

    @model_validator(mode="after")
    def _check_pairs(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("`stream_options` may only be given with `stream: true`.", param="stream_options")
        if self.background and self.store is False:
            raise InvalidRequest("`background` needs `store`: the answer is fetched later.", param="store")
        known = {tool.name for tool in self.tools}
        if isinstance(self.tool_choice, AllowedTools):
            for i, allowed in enumerate(self.tool_choice.tools):
                if allowed.name not in known:
                    param = f"tool_choice.tools.{i}.name"
                    raise InvalidRequest(f"`{param}` is none of the `tools`.", param=param)
        return self

    @property
    def logprobs(self) -> bool:
        """Whether the answer has log-probabilities."""
        return self.top_logprobs is not None or "message.output_text.logprobs" in self.include

    async def settled(self, check: Callable[[Grammar, str], Awaitable[Grammar]]) -> Self:
        """The same where functions that do not say whether they are strict are so if their schema can be followed.

        Args:
            check: raises InvalidRequest for a schema that cannot be.
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
        """The chat request that this is, of these items. Raises InvalidRequest."""
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
            raise self.refusal(as_error(fault)) from None

    @staticmethod
    def refusal(error: LorakeetError) -> LorakeetError:
        """A refusal of that chat request, with the names of this body's fields."""
        tool = re.match(r"tools\.\d+", error.param or "")
        return renamed(error, [(f"{tool[0]}.function", tool[0])] if tool else _NAMES)

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
        asked = self.text.format
        if isinstance(asked, JsonSchemaText):
            schema = asked.model_dump(by_alias=True, exclude={"type"})
            return {"type": "json_schema", "json_schema": schema}
        return None if asked is None else asked.model_dump()

    def shown(self) -> dict[str, Any]:
        """The fields of the request that a response repeats."""
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
