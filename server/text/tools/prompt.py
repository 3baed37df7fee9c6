"""Tools, calls and results as a chat template takes them."""

import json
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

from server.text.tools.format import ToolFormat
from server.text.tools.table import knows_tools

Message = Mapping[str, Any]

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
    """Messages and tools for this template; tools are None where it is to see none.

    Arguments of calls become objects. A template that knows no tools gets them as text, in the Hermes format.
    """
    chat = [dict(message) for message in messages]
    if not knows_tools(template):
        return _as_text(chat, tools), None
    for message in chat:
        if message.get("tool_calls"):
            message["tool_calls"] = [_call(call, tool_format) for call in message["tool_calls"]]
        if "tool_call_id" in message:
            message["tool_call_id"] = _id(message["tool_call_id"], tool_format.id_length)
    return chat, [dict(tool) for tool in tools] or None


def _call(call: Mapping[str, Any], tool_format: ToolFormat) -> dict[str, Any]:
    function = dict(call["function"])
    if not tool_format.arguments_as_text:
        function["arguments"] = json.loads(function["arguments"])
    return {**call, "id": _id(call["id"], tool_format.id_length), "function": function}


def _id(id_: str, length: int | None) -> str:
    """Some templates refuse ids of another length."""
    if length is None or (len(id_) == length and id_.isalnum()):
        return id_
    return blake2b(id_.encode()).hexdigest()[:length]


def _as_text(chat: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    written: list[dict[str, Any]] = []
    for message in chat:
        if message["role"] == "tool":
            result = f"<tool_response>\n{message['content']}\n</tool_response>"
            if written and written[-1].get("tool_response"):
                written[-1]["content"] += "\n" + result
            else:
                written.append({"role": "user", "content": result, "tool_response": True})
            continue
        calls = message.pop("tool_calls", ())
        texts = [message["content"]] * bool(message["content"] or not calls)
        texts += [
            f'<tool_call>\n{{"name": {json.dumps(call["function"]["name"])}, '
            f'"arguments": {call["function"]["arguments"]}}}\n</tool_call>'
            for call in calls
        ]
        written.append(message | {"content": "\n".join(texts)})
    for message in written:
        message.pop("tool_response", None)
    if tools:
        text = SYSTEM_TEXT.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools))
        if written[0]["role"] in ("system", "developer"):
            written[0]["content"] += "\n\n" + text
        else:
            written.insert(0, {"role": "system", "content": text})
    return written
