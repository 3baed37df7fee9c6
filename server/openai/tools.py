"""Tools in OpenAI's shapes, and the grammar and parser of answers that may call them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Field, Tag

from server.errors import InvalidRequest
from server.messages.protocol import Grammar
from server.openai.body import Body, Items
from server.openai.closed_schema import closed
from server.openai.reasoning import Thinking
from server.services import Services
from server.text.processor import TextProcessor
from server.text.tools.format import ToolFormat
from server.text.tools.grammar import calls_grammar
from server.text.tools.source import NAME, Parser

FunctionName = Annotated[str, Field(pattern=f"^{NAME}$")]
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


class FunctionTool(Body):
    """A function. Without `parameters` it takes none. The arguments of a `strict` function always validate."""

    ignored_fields: ClassVar[frozenset[str]] = frozenset({"cache_control"})

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] = Field(_NO_ARGUMENTS)
    strict: bool = False


class Tool(Body):
    """One tool of a request."""

    ignored_fields: ClassVar[frozenset[str]] = frozenset({"cache_control"})

    type: Literal["function"]
    function: FunctionTool

    def for_template(self) -> dict[str, Any]:
        """Return the tool for a chat template."""
        return self.model_dump(exclude_none=True, exclude={"function": {"strict"}})


class NamedFunction(Body):
    """A function's name."""

    name: FunctionName


class NamedTool(Body):
    """The function that must be called."""

    type: Literal["function"]
    function: NamedFunction


class AllowedFunctions(Body):
    """Some of the tools, and whether one of them must be called."""

    mode: Literal["auto", "required"]
    tools: Items[NamedTool] = Field(min_length=1)


class AllowedTools(Body):
    """A choice of some of the tools; the model sees only these."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedFunctions


def tool_choice_kind(value: Any) -> str | None:
    """Return the kind of a `tool_choice`, for the discriminator."""
    kind = value.get("type") if isinstance(value, dict) else "word"
    return kind if isinstance(kind, str) else None


TOOL_CHOICE_KIND = Discriminator(
    tool_choice_kind,
    custom_error_type="tool_choice",
    custom_error_message="must be none, auto, required, a function or allowed_tools; other tools are not served",
)
Word = Annotated[Literal["none", "auto", "required"], Tag("word")]
ToolChoice = Annotated[
    Word | Annotated[NamedTool, Tag("function")] | Annotated[AllowedTools, Tag("allowed_tools")], TOOL_CHOICE_KIND
]


def arguments_schema(function: FunctionTool) -> dict[str, Any]:
    """Return the schema of a function's arguments when it is enforced."""
    return closed({"type": "object"} | function.parameters)


def check_tools(tools: Sequence[Tool]) -> None:
    """Check the tools. Raises `InvalidRequest` for a duplicate name and for arguments that are not an object."""
    seen = set()
    for i, tool in enumerate(tools):
        name = tool.function.name
        if name in seen:
            raise InvalidRequest(f"`tools` has two functions named `{name}`.", param=f"tools.{i}.function.name")
        seen.add(name)
        if tool.function.parameters.get("type", "object") != "object":
            param = f"tools.{i}.function.parameters"
            raise InvalidRequest(f"`{param}` must be the schema of an object: arguments have names.", param=param)


def check_choice(choice: ToolChoice, tools: Sequence[Tool]) -> None:
    """Check the choice. Raises `InvalidRequest` if it needs tools without any, or names an unknown one."""
    if choice == "required" and not tools:
        raise InvalidRequest("`tool_choice` needs `tools`.", param="tool_choice")
    names = {tool.function.name for tool in tools}
    named: Sequence[tuple[str, NamedTool]] = []
    if isinstance(choice, NamedTool):
        named = [("tool_choice", choice)]
    elif isinstance(choice, AllowedTools):
        named = [(f"tool_choice.allowed_tools.tools.{i}", tool) for i, tool in enumerate(choice.allowed_tools.tools)]
    for place, tool in named:
        if tool.function.name not in names:
            message = f"`{place}` names `{tool.function.name}`, which is none of the `tools`."
            raise InvalidRequest(message, param=f"{place}.function.name")


def allowed(choice: ToolChoice, tools: Sequence[Tool]) -> Sequence[Tool]:
    """Return the tools that the choice allows."""
    if not isinstance(choice, AllowedTools):
        return tools
    names = {tool.function.name for tool in choice.allowed_tools.tools}
    return [tool for tool in tools if tool.function.name in names]


@dataclass(frozen=True)
class Calling:
    """Enforcing and parsing of tool calls in one request's answers.

    Attributes:
        tools: all tools of the request, even if it allows only some.
    """

    text: TextProcessor
    format: ToolFormat
    tools: Sequence[Tool]
    choice: ToolChoice
    parallel: bool

    @property
    def required(self) -> bool:
        """Whether the answer must be a call."""
        choice = self.choice.allowed_tools.mode if isinstance(self.choice, AllowedTools) else self.choice
        return choice == "required" or isinstance(choice, NamedTool)

    def parser(self, thinking: Thinking | None) -> Parser:
        """Return a parser for one answer, which may begin with a thought."""
        reader = self.format.reader if thinking is None else thinking.reader(self.format.reader)
        parameters = {tool.function.name: tool.function.parameters for tool in self.tools}
        return Parser(reader, parameters, calls_only=self.required)

    async def grammar(self, services: Services, requested: tuple[Grammar, str] | None) -> Grammar | None:
        """Return the answer's grammar, checked; None if any text is allowed.

        Args:
            requested: the grammar of an answer without calls, and the name of its field.

        Raises `InvalidRequest`.
        """
        strict = any(tool.function.strict for tool in self._callable)
        if requested is None and self.parallel and not strict and not self.required:
            return None
        if requested is not None and not self.required and not self.format.frame.marker:
            message = f"`{requested[1]}` with `tools` needs `tool_choice`: this model writes calls as bare JSON."
            raise InvalidRequest(message, param=requested[1])
        lark = calls_grammar(
            self.format.frame,
            [(tool.function.name, self._schema(tool)) for tool in self._callable],
            {token: id_ for id_, token in self.text.added_tokens.items() if token in self.format.markers},
            required=self.required,
            several=self.parallel and not isinstance(self.choice, NamedTool),
            answer=None if requested is None or self.required else _schema_of(*requested),
        )
        try:
            return await services.grammars.check(Grammar("lark", lark), "tools")
        except InvalidRequest:  # find the cause
            if requested is not None:
                await services.grammars.check(*requested)
            for i, tool in enumerate(self.tools):
                if tool not in self._callable:
                    continue
                schema = Grammar("json", json.dumps(self._schema(tool)))
                await services.grammars.check(schema, f"tools.{i}.function.parameters")
            raise

    @property
    def _callable(self) -> Sequence[Tool]:
        if not isinstance(self.choice, NamedTool):
            return allowed(self.choice, self.tools)
        return [tool for tool in self.tools if tool.function.name == self.choice.function.name]

    def _schema(self, tool: Tool) -> Mapping[str, Any]:
        return arguments_schema(tool.function) if self.required or tool.function.strict else {"type": "object"}


def _schema_of(grammar: Grammar, param: str) -> Mapping[str, Any]:
    """Return the schema of an answer without calls. Raises InvalidRequest for other grammars than JSON."""
    if grammar.kind == "json_object":
        return {"type": "object"}
    if grammar.kind == "json":
        schema: dict[str, Any] = json.loads(grammar.text)
        return schema
    raise InvalidRequest(
        f"`{param}` cannot be combined with `tools` that may be called, unless it is a JSON Schema.", param=param
    )
