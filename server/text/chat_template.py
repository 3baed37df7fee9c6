"""A model's chat template: renders messages to the prompt's text.

Templates are Jinja from the base and trusted, but their input comes from clients. Hence the sandbox, a deadline, a
limit on the output, and only scalars as further arguments.
Renders like `transformers`' `apply_chat_template`, without importing it. The sandbox's program loads this module with
Jinja as its only library, so that a hostile template can reach little.
"""

import json
import re
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from itertools import takewhile
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

RENDER_SECONDS = 2.0
MAX_OUTPUT = 32 * 1024 * 1024  # characters

# `apply_chat_template`'s own arguments, which are no switches of the template.
RESERVED = frozenset(
    {"messages", "conversation", "tools", "documents", "chat_template", "tokenize", "tokenizer_kwargs"}
    | {"add_generation_prompt", "continue_final_message", "padding", "truncation", "max_length"}
    | {"return_tensors", "return_dict", "return_assistant_tokens_mask"}
)
_PART = "{'type': 'text'"  # in a prompt: a template printed the part itself in place of its text
_MAX_SEARCHED = 64  # messages searched for in a prompt
_TAG = "CONTINUE_FINAL_MESSAGE_TAG "  # ends in a space, which shows whether the template trims messages


class TemplateRefusal(Exception):
    """The template cannot be rendered on these messages.

    Attributes:
        param: the request's field at fault.
    """

    def __init__(self, message: str, param: str = "messages") -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class _Unbounded(TemplateRefusal):
    """Rendering took too long or wrote too much; no other form of the messages is tried."""


class _OverrunError(Exception):
    """Rendering takes too long or writes too much. The message is a predicate."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's text; it renders as its content."""

    tags = {"generation"}  # noqa: RUF012  # Jinja's interface

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with a check of the deadline at every call and at every read of an attribute or item."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self, max_characters: int) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
        self.filters["tojson"] = _tojson
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self._render = threading.local()
        self._max_characters = max_characters

    def start_clock(self) -> None:
        """Start the time limit of a rendering in this thread."""
        self._render.deadline = time.monotonic() + RENDER_SECONDS

    def check_clock(self) -> None:
        if time.monotonic() > self._render.deadline:
            raise _OverrunError("takes too long")

    def check_size(self, characters: int) -> None:
        if characters > self._max_characters:
            raise _OverrunError(f"writes more than {self._max_characters} characters")

    def call(self, *args: Any, **kwargs: Any) -> Any:
        self.check_clock()
        return super().call(*args, **kwargs)

    def getattr(self, obj: Any, attribute: str) -> Any:
        self.check_clock()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.check_clock()
        return super().getitem(obj, argument)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        length = len(left) if isinstance(left, str | list | tuple) else abs(left)
        times = len(right) if isinstance(right, str | list | tuple) else abs(right)
        if operator == "**":
            raise _OverrunError("takes too long")
        self.check_size(length * times)
        return super().call_binop(context, operator, left, right)


class ChatTemplate:
    """One compiled template.

    Args:
        source: the Jinja text.
        special_tokens: the template's variables `bos_token`, `eos_token`, ...
        max_characters: limit of its output.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], max_characters: int = MAX_OUTPUT) -> None:
        self.source = source
        self._environment = _Environment(max_characters)
        self._template = self._environment.from_string(source)
        self._special_tokens = dict(special_tokens)
        self._knows_developer = re.search("""["']developer["']""", source) is not None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        arguments: Mapping[str, str | int | float | bool | None] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Render messages of `role` and `content` (text), and calls with objects as arguments, to the prompt's text.

        `continue_final_message` ends the prompt inside the last message, so that the completion continues it.
        Raises `TemplateRefusal` when the template refuses the messages, takes too long or writes too much.
        """
        chat = [dict(message) for message in messages]
        if not self._knows_developer:  # OpenAI's newer name of the system role; most templates predate it
            for message in chat:
                message["role"] = "system" if message["role"] == "developer" else message["role"]
        context = dict(arguments or {}) | {"tools": tools, "add_generation_prompt": add_generation_prompt}
        if not continue_final_message:
            return self._with_instructions(chat, context)
        final = chat[-1]["content"]
        chat[-1]["content"] = final + _TAG
        text = self._with_instructions(chat, context)
        end = text.rfind(_TAG.strip())
        if end < 0 or final.strip() not in text:
            raise TemplateRefusal(
                "The chat template does not keep the last message as it is, so it cannot be continued.",
                "continue_final_message",
            )
        keeps_spaces = text.startswith(_TAG, end)
        return text[:end] if keeps_spaces else text[:end].rstrip()

    def _with_instructions(self, chat: list[dict[str, Any]], context: Mapping[str, Any]) -> str:
        """Render; join leading system messages into one if the template refuses or drops some of several."""
        leading = list(takewhile(lambda message: message["role"] in ("system", "developer"), chat))
        if len(leading) < 2:
            return self._render(chat, context)
        text, refusal = "", None
        try:
            text = self._render(chat, context)
        except TemplateRefusal as exc:
            refusal = exc
        contents = [message["content"].strip() for message in leading]
        if refusal is not None or not all(content in text for content in contents):
            joined = leading[0] | {"content": "\n\n".join(filter(None, (message["content"] for message in leading)))}
            with suppress(TemplateRefusal):
                other = self._render([joined, *chat[len(leading) :]], context)
                if refusal is not None or all(content in other for content in contents):
                    return other
        if refusal is not None:
            raise refusal
        return text

    def _render(self, chat: list[dict[str, Any]], context: Mapping[str, Any]) -> str:
        """Render; if the template drops or refuses contents as strings, pass them as lists of parts."""
        text, refusal = "", None
        try:
            text = self._generate(chat, context)
        except _Unbounded:
            raise
        except TemplateRefusal as exc:
            refusal = exc
        contents = [message["content"].strip() for message in chat if isinstance(message.get("content"), str)]
        missing = len(contents) if refusal else _count_missing(contents, text)
        if not missing:
            return text
        with_parts = [
            message | {"content": [{"type": "text", "text": message["content"]}]}
            if isinstance(message.get("content"), str)
            else message
            for message in chat
        ]
        with suppress(TemplateRefusal):
            other = self._generate(with_parts, context)
            if _PART not in other and _count_missing(contents, other) < missing:
                return other
        if refusal is not None:
            raise refusal
        return text

    def _generate(self, chat: list[dict[str, Any]], context: Mapping[str, Any]) -> str:
        context = self._special_tokens | dict(context) | {"messages": chat, "documents": None}
        pieces, size = [], 0
        self._environment.start_clock()
        try:
            for piece in self._template.generate(context):
                self._environment.check_clock()
                pieces.append(piece)
                size += len(piece)
                self._environment.check_size(size)
        except _OverrunError as overrun:
            raise _Unbounded(f"The chat template {overrun} on these messages.") from None
        except jinja2.TemplateError as exc:  # raised by the template itself, such as "roles must alternate"
            raise TemplateRefusal(f"The chat template refuses these messages: {exc}") from None
        except Exception as exc:
            name = type(exc).__name__
            raise TemplateRefusal(f"The chat template fails on these messages ({name}).") from exc
        return "".join(pieces)


def _count_missing(contents: Sequence[str], text: str) -> int:
    """Return the number of messages missing in a prompt's text; of a long chat, only those at its ends count."""
    searched = (
        contents
        if len(contents) <= _MAX_SEARCHED
        else [*contents[: _MAX_SEARCHED // 2], *contents[-_MAX_SEARCHED // 2 :]]
    )
    return sum(content not in text for content in searched)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON without Jinja's HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
