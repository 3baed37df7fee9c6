"""Conversion of tools, calls and results to a chat template's form."""

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from itertools import groupby, takewhile
from typing import Any

from server.text.tools.format import Frame, ToolFormat
from server.text.tools.table import knows_tools

Message = Mapping[str, Any]

_FIRST_CALL = re.compile(r"""\btool_calls(["']\])?\[0\]""")
_EACH_CALL = re.compile(r"""\bin \w+(\.tool_calls\b|\[["']tool_calls["']\])""")

SYSTEM_TEXT = """\
# Tools

You may call functions to help with the request. These are the functions, one JSON object per line:
<tools>
{tools}
</tools>

To call a function, write a JSON object with its name and arguments between <tool_call> and </tool_call>:
<tool_call>
{{"name": <name of the function>, "arguments": <object of arguments>}}
</tool_call>"""


def for_template(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]], template: str, tool_format: ToolFormat
) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Return messages and tools for this template; tools are None if it must not see any.

    Arguments of calls become objects, and results come in the order of their calls, with their functions' names. For a
    template without tools, they become text in the Hermes format.
    """
    chat = _with_results_in_order([dict(message) for message in messages])
    if not knows_tools(template):
        return _with_system_text(_with_results_as_text(_with_calls_as_text(chat, tool_format.frame)), tools), None
    if "tool_calls" not in template:
        chat = _with_calls_as_text(chat, tool_format.frame)
    named: dict[Any, str] = {}
    ids = _Ids(tool_format)
    for message in chat:
        named |= {call.get("id"): call["function"]["name"] for call in message.get("tool_calls") or ()}
        if message["role"] == "tool" and (name := named.get(message.get("tool_call_id"))) is not None:
            message.setdefault("name", name)  # some templates require a name
        if message.get("tool_calls"):
            message["tool_calls"] = [_call(call, tool_format, ids) for call in message["tool_calls"]]
        if "tool_call_id" in message:
            message["tool_call_id"] = ids.of_result(message["tool_call_id"])
    if tools and re.search(r"""message(\.tools\b|\[["']tools["']\])""", template):
        chat = _with_system(chat, "")
        chat[0]["tools"] = json.dumps([tool["function"] for tool in tools], ensure_ascii=False)
    return chat, [dict(tool) for tool in tools] or None


@lru_cache(64)
def takes_one_call(template: str) -> bool:
    """Whether a chat template refuses or drops all calls of a message but the first."""
    return _FIRST_CALL.search(template) is not None and _EACH_CALL.search(template) is None


def with_one_call_each(messages: Sequence[Message]) -> list[Message]:
    """Split messages with several calls into one message per call, each followed by its results."""
    chat: list[Message] = []
    rest = list(_with_results_in_order([dict(message) for message in messages]))
    while rest:
        message = rest.pop(0)
        calls = message.get("tool_calls", ())
        if len(calls) < 2:
            chat.append(message)
            continue
        results = list(takewhile(lambda each: each["role"] == "tool", rest))
        del rest[: len(results)]
        for call in calls:
            chat.append(message | {"tool_calls": [call]})
            message = {name: value for name, value in message.items() if name != "reasoning"} | {"content": ""}
            own = [each for each in results if each.get("tool_call_id") == call["id"]]
            if not own and results and "tool_call_id" not in results[0]:  # results without ids, matched by their order
                own = results[:1]
            chat += own
            results = [each for each in results if all(each is not one for one in own)]
        chat += results
    return chat


def _with_results_in_order(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sort the results of one message's calls into the order of the calls.

    Most templates omit ids, so the model matches results by position; clients send them in the order of completion.
    """
    ordered: list[dict[str, Any]] = []
    places: dict[str, int] = {}
    for is_result, group in groupby(chat, lambda message: message["role"] == "tool"):
        run = list(group)
        if is_result and all(message.get("tool_call_id") in places for message in run):
            run.sort(key=lambda message: places[message["tool_call_id"]])
        places = {call["id"]: i for i, call in enumerate(run[-1].get("tool_calls", ()))}
        ordered += run
    return ordered


def _call(call: Mapping[str, Any], tool_format: ToolFormat, ids: "_Ids") -> dict[str, Any]:
    function = dict(call["function"])
    if not tool_format.arguments_as_text:
        function["arguments"] = json.loads(function["arguments"])
    return {**call, "id": ids.of_call(call["id"], function["name"]), "function": function}


class _Ids:
    """Call ids in the template's form."""

    def __init__(self, tool_format: ToolFormat) -> None:
        self._length, self._form = tool_format.id_length, tool_format.id_form
        self._formed: dict[Any, str] = {}
        self._count = 0

    def of_call(self, id_: str, name: str) -> str:
        """Return the id of the conversation's next call."""
        if self._form:
            self._formed[id_] = self._form.format(name=name, number=self._count)
            self._count += 1
        return self.of_result(id_)

    def of_result(self, id_: str) -> str:
        """Return the id of an earlier call."""
        if id_ in self._formed:
            return self._formed[id_]
        if self._length is None or (len(id_) == self._length and id_.isalnum()):
            return id_
        return blake2b(id_.encode()).hexdigest()[: self._length]


def _with_calls_as_text(chat: list[dict[str, Any]], frame: Frame) -> list[dict[str, Any]]:
    for message in chat:
        functions = [call["function"] for call in message.pop("tool_calls", ())]
        if functions:
            text = frame.written((each["name"], each["arguments"]) for each in functions)
            message["content"] = "\n".join(filter(None, [message["content"], text]))
    return chat


def _with_results_as_text(chat: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Convert results to users' messages, consecutive ones to a single message."""
    written: list[dict[str, Any]] = []
    for is_result, group in groupby(chat, lambda message: message["role"] == "tool"):
        if is_result:
            texts = [f"<tool_response>\n{message['content']}\n</tool_response>" for message in group]
            written.append({"role": "user", "content": "\n".join(texts)})
        else:
            written += group
    return written


def _with_system_text(chat: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    if not tools:
        return chat
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return _with_system(chat, SYSTEM_TEXT.format(tools=listed))


def _with_system(chat: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """Append text to the system message, which is added if missing."""
    if chat[0]["role"] not in ("system", "developer"):
        return [{"role": "system", "content": text}, *chat]
    chat[0]["content"] = "\n\n".join(filter(None, [chat[0]["content"], text]))
    return chat
