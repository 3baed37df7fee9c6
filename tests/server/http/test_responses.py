"""`/v1/responses` in front of a scripted engine. Behaviour shared with chat is tested there."""

import json
import re
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from server.errors import EngineUnavailable
from server.messages.protocol import Generate, Output
from tests.server.http.test_tools import use_template
from tests.support.chats import named_events, say, sent_prompt
from tests.support.responses import made, post
from tests.support.scripted import BASE, BASE_DIGEST, TEXT, ScriptedEngine, Served, encode, serving
from tests.support.templates import REASONING_TEMPLATES

PROMPT = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": False,
}
CALL = 'Let me see.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path, context=4096) as served:
        yield served


# --- responses ------------------------------------------------------------------------------------------------


async def test_an_answer_has_openais_shape(served: Served) -> None:
    response = await post(served, temperature=0.5, metadata={"a": "b"}, max_output_tokens=200)
    assert response.headers["x-adapter-digest"] == BASE_DIGEST
    body = response.json()
    assert sent_prompt(served) == PROMPT
    number = body["id"].removeprefix("resp_")
    assert body.pop("created_at") <= body.pop("completed_at")
    usage = body.pop("usage")
    assert usage["input_tokens"] == len(encode(PROMPT))
    assert usage["output_tokens"] == len(encode(TEXT)) + 1
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    text = {"type": "output_text", "text": TEXT, "annotations": [], "logprobs": []}
    message = {"id": f"msg_{number}_0", "type": "message", "role": "assistant", "status": "completed"}
    assert body == {
        "id": body["id"],
        "object": "response",
        "status": "completed",
        "error": None,
        "incomplete_details": None,
        "model": BASE,
        "system_fingerprint": BASE_DIGEST,
        "output": [message | {"content": [text]}],
        "background": False,
        "instructions": None,
        "max_output_tokens": 200,
        "max_tool_calls": None,
        "metadata": {"a": "b"},
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "prompt_cache_key": None,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": None,
        "service_tier": "default",
        "store": True,
        "temperature": 0.5,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": 0,
        "top_p": 1.0,
        "truncation": "disabled",
        "user": None,
    }


async def test_a_stream_of_text_has_all_its_events(served: Served) -> None:
    say(served, "Hi there")
    whole = (await made(served))["output"]
    stream = named_events(await post(served, stream=True))
    assert [event["sequence_number"] for event in stream] == list(range(len(stream)))
    kinds = [event["type"] for event in stream]
    deltas = [event for event in stream if event["type"] == "response.output_text.delta"]
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * len(deltas),
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert len(deltas) > 1
    assert "".join(delta["delta"] for delta in deltas) == "Hi there" == stream[-4]["text"]
    assert stream[0]["response"]["status"] == "in_progress"
    assert stream[0]["response"]["output"] == []
    assert stream[2]["item"] | {"id": ""} == whole[0] | {"id": "", "status": "in_progress", "content": []}
    assert stream[3]["part"]["text"] == ""
    last = stream[-1]["response"]
    assert (last["status"], last["output"]) == ("completed", [stream[-2]["item"]])
    assert last["output"][0] | {"id": ""} == whole[0] | {"id": ""}
    assert {event["item_id"] for event in deltas} == {last["output"][0]["id"]}


async def test_calls_are_items_of_their_own(served: Served) -> None:
    say(served, CALL)
    message, call = (await made(served, tools=[WEATHER]))["output"]
    assert message["content"][0]["text"] == "Let me see."
    assert call["call_id"].startswith("call_")
    assert call | {"id": "", "call_id": ""} == {
        "id": "",
        "type": "function_call",
        "status": "completed",
        "call_id": "",
        "name": "get_weather",
        "arguments": '{"city": "Rome"}',
    }
    stream = named_events(await post(served, tools=[WEATHER], stream=True))
    mine = [event for event in stream if event.get("output_index") == 1]
    deltas = [event["delta"] for event in mine if event["type"] == "response.function_call_arguments.delta"]
    assert [event["type"] for event in mine] == [
        "response.output_item.added",
        *["response.function_call_arguments.delta"] * len(deltas),
        "response.function_call_arguments.done",
        "response.output_item.done",
    ]
    assert "".join(deltas) == mine[-2]["arguments"] == '{"city": "Rome"}'
    assert mine[0]["item"]["arguments"] == ""


class InOneStep(ScriptedEngine):
    """Returns all tokens in one step, as with tokens forced by a grammar."""

    async def generate(self, request: Generate) -> AsyncGenerator[Output, None]:
        outputs = [output async for output in super().generate(request)]
        tokens = [token for output in outputs for token in output.tokens]
        logprobs = [entry for output in outputs for entry in output.logprobs]
        yield msgspec.structs.replace(outputs[-1], tokens=tokens, logprobs=logprobs)


async def test_an_event_shows_nothing_that_comes_after_it(tmp_path: Path) -> None:
    async with serving(tmp_path, CALL, InOneStep, context=4096) as served:
        stream = named_events(
            await post(served, tools=[WEATHER], stream=True, include=["message.output_text.logprobs"], top_logprobs=1)
        )
    assert [event["response"]["output"] for event in stream if "response" in event][:-1] == [[], []]
    [part] = [event["part"] for event in stream if event["type"] == "response.content_part.added"]
    assert (part["text"], part["logprobs"]) == ("", [])
    assert [event["output_index"] for event in stream if event["type"] == "response.output_item.added"] == [0, 1]


async def test_vllms_parameters_of_sampling_are_the_chats(served: Served) -> None:
    drawn = {"seed": 11, "top_k": 40, "min_p": 0.1, "repetition_penalty": 1.1, "presence_penalty": 1.0, "min_tokens": 2}
    ends = {"stop": None, "stop_token_ids": [9], "ignore_eos": True, "priority": -3, "cache_salt": "mine"}
    response = await post(served, **drawn, **ends)
    assert response.status_code == 200, response.text
    (request,) = served.engine.requests
    assert {name: getattr(request.sampling, name) for name in drawn} == drawn
    assert (request.sampling.stop_token_ids, request.priority, request.cache_salt) == ([9], -3, "mine")
    refused = await post(served, stop=["", "x"])
    assert refused.json()["error"]["param"].startswith("stop")


async def test_an_answer_cut_short_is_incomplete(served: Served) -> None:
    body = await made(served, max_output_tokens=3)
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert body["output"][0]["status"] == "incomplete"
    stream = named_events(await post(served, max_output_tokens=3, stream=True))
    assert stream[-1]["type"] == "response.incomplete"


async def test_an_empty_answer_is_an_empty_message(served: Served) -> None:
    say(served, "")
    assert (await made(served))["output"][0]["content"][0]["text"] == ""


async def test_log_probabilities_spell_the_text(served: Served) -> None:
    say(served, "a 漢")
    body = await made(served, include=["message.output_text.logprobs"], top_logprobs=2)
    logprobs = body["output"][0]["content"][0]["logprobs"]
    assert bytes(byte for token in logprobs for byte in token["bytes"]).decode() == "a 漢"
    assert all(len(token["top_logprobs"]) == 2 for token in logprobs)
    stream = named_events(await post(served, top_logprobs=2, stream=True))
    deltas = [event for event in stream if event["type"] == "response.output_text.delta"]
    assert [token for delta in deltas for token in delta["logprobs"]] == logprobs


async def test_a_failure_ends_the_stream_with_an_event(served: Served) -> None:
    served.engine.fail = {3: EngineUnavailable("The engine stopped while this request was running.")}
    stream = named_events(await post(served, stream=True))
    assert stream[-1]["type"] == "response.failed"
    assert stream[-1]["response"]["error"]["code"] == "server_error"
    assert stream[-1]["sequence_number"] == len(stream) - 1
    served.engine.fail = {0: EngineUnavailable("The engine stopped while this request was running.")}
    assert (await post(served, stream=True)).status_code == 503


async def test_adapters_answer(served: Served, tmp_path: Path) -> None:
    digest = await served.add_adapter(tmp_path, "poet")
    body = await made(served, model="poet")
    assert (body["model"], body["system_fingerprint"]) == ("poet", digest)


# --- input --------------------------------------------------------------------------------------------------


async def test_instructions_and_items_make_the_prompt(served: Served) -> None:
    items = [
        {"role": "developer", "content": "D"},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Rome?"}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Let me see.", "annotations": []}]},
        {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": '{"city": "Rome"}'},
        {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "sunny"}]},
    ]
    await made(served, instructions="Be brief.", input=items)
    responses = sent_prompt(served)
    function = {"name": "get_weather", "arguments": '{"city": "Rome"}'}
    call = {"id": "c1", "type": "function", "function": function}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": "D"},
        {"role": "user", "content": "Rome?"},
        {"role": "assistant", "content": "Let me see.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    await served.client.post("/v1/chat/completions", json={"model": BASE, "messages": messages})
    assert sent_prompt(served) == responses


async def test_functions_are_strict_if_they_can_be(served: Served) -> None:
    """Unless `strict` is given: MCP servers' schemas have keywords that grammars do not support."""
    unique = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    bare = {name: value for name, value in WEATHER.items() if name != "strict"}
    tools = [bare, bare | {"name": "set", "parameters": unique}, bare | {"name": "loose", "strict": False}]
    assert [tool["strict"] for tool in (await made(served, tools=tools))["tools"]] == [True, False, False]
    grammar = served.engine.requests[-1].sampling.grammar
    assert grammar is not None
    assert '"city"' in grammar.text
    assert "uniqueItems" not in grammar.text
    for more in ({"tools": [tools[0], tools[1] | {"strict": True}]}, {"tools": tools, "tool_choice": "required"}):
        response = await post(served, **more)
        place = "tools.1.parameters.properties.a.uniqueItems"
        assert (response.status_code, response.json()["error"]["param"]) == (400, place)


async def test_formats_and_choices_are_those_of_chat(served: Served) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    await post(served, text={"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}})
    grammar = served.engine.requests[-1].sampling.grammar
    assert grammar is not None
    assert json.loads(grammar.text) == schema | {"additionalProperties": False}
    await post(served, text={"format": {"type": "json_object"}})
    grammar = served.engine.requests[-1].sampling.grammar
    assert grammar is not None
    assert grammar.kind == "json_object"
    other = WEATHER | {"name": "other"}
    for choice in (
        {"type": "function", "name": "other"},
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "other"}]},
    ):
        body = await made(served, tools=[WEATHER, other], tool_choice=choice)
        grammar = served.engine.requests[-1].sampling.grammar
        assert grammar is not None
        assert "get_weather" not in grammar.text
        assert body["tool_choice"] == choice


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no input": ({"input": None}, "input"),
    "empty input": ({"input": []}, "input"),
    "input number": ({"input": 5}, "input"),
    "image": (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        "input.0.content.0.type",
    ),
    "file": ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input.0.content.0.type"),
    "role": ({"input": [{"role": "narrator", "content": "x"}]}, "input.0.role"),
    "item": ({"input": [{"type": "computer_call", "id": "x"}]}, "input.0.type"),
    "arguments": (
        {"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": ["x"]}]},
        "input.0.arguments",
    ),
    "web search": ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
    "mcp": ({"tools": [WEATHER, {"type": "mcp", "server_label": "x"}]}, "tools.1.type"),
    "tool twice": ({"tools": [WEATHER, WEATHER]}, "tools.1.name"),
    "tool schema": (
        {"tools": [WEATHER | {"strict": True, "parameters": {"type": "object", "patternProperties": {"(": {}}}}]},
        "tools.0.parameters.patternProperties.(",
    ),
    "tool field": ({"tools": [WEATHER | {"colour": "red"}]}, "tools.0.colour"),
    "choice": ({"tool_choice": "required"}, "tool_choice"),
    "choice name": ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "x"}}, "tool_choice.name"),
    "choice of a built-in": ({"tool_choice": {"type": "web_search_preview"}}, "tool_choice"),
    "format": ({"text": {"format": {"type": "xml"}}}, "text.format"),
    "schema": (
        {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "colour"}}}},
        "text.format.schema.type",
    ),
    "too long": ({"max_output_tokens": 100_000}, "max_output_tokens"),
    "long input": ({"input": "漢" * 5000}, "input"),
    "truncation": ({"truncation": "auto"}, "truncation"),
    "conversation": ({"conversation": "conv_1"}, "conversation"),
    "prompt": ({"prompt": {"id": "p"}}, "prompt"),
    "include": ({"include": ["everything"]}, "include.0"),
    "temperature": ({"temperature": 3}, "temperature"),
    "background without store": ({"background": True, "store": False}, "store"),
    "stream_options": ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
    "n": ({"n": 2}, "n"),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_refusals_name_the_field(served: Served, name: str) -> None:
    body, param = REFUSED[name]
    response = await post(served, **body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert not re.search(r"`(messages|response_format|max_completion)|\.function", error["message"]), error
    assert served.engine.requests == []


# --- thoughts -----------------------------------------------------------------------------------------------


async def test_a_thought_is_an_item_before_the_answer(served: Served) -> None:
    use_template(served, REASONING_TEMPLATES["qwen3"])
    say(served, "<think>\nIs it far?\n</think>\n\nYes.")
    body = await made(served, reasoning={"effort": "low"})
    thought, message = body["output"]
    text = {"type": "reasoning_text", "text": "Is it far?"}
    assert thought | {"id": ""} == {
        "id": "",
        "type": "reasoning",
        "status": "completed",
        "summary": [],
        "content": [text],
    }
    assert message["content"][0]["text"] == "Yes."
    assert body["usage"]["output_tokens_details"]["reasoning_tokens"] > 3
    stream = named_events(await post(served, stream=True))
    mine = [event for event in stream if event.get("output_index") == 0]
    deltas = [event["delta"] for event in mine if event["type"] == "response.reasoning_text.delta"]
    assert [event["type"] for event in mine] == [
        "response.output_item.added",
        "response.content_part.added",
        *["response.reasoning_text.delta"] * len(deltas),
        "response.reasoning_text.done",
        "response.content_part.done",
        "response.output_item.done",
    ]
    assert "".join(deltas) == mine[-3]["text"] == "Is it far?"
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    items = [{"role": "user", "content": "Hi"}, thought, call]
    await made(served, input=[*items, {"type": "function_call_output", "call_id": "c", "output": "x"}])
    assert "<think>\nIs it far?\n</think>" in sent_prompt(served)


@pytest.mark.parametrize("given", ['{"city": Rome}', '{"city": "Ro', "{'city': 1}"])
async def test_arguments_that_are_no_json_can_be_gone_on_from(served: Served, given: str) -> None:
    say(served, f'<tool_call>{{"name": "get_weather", "arguments": {given}}}</tool_call>')
    first = await made(served, tools=[WEATHER | {"strict": False}])
    [call] = [item for item in first["output"] if item["type"] == "function_call"]
    assert call["arguments"].startswith(given)
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "No JSON."}
    await made(served, input=[output], previous_response_id=first["id"])
    await made(served, input=[call, output])


HARMLESS: dict[str, dict[str, Any]] = {
    "what a client says of itself": {"client_metadata": {"session": "x"}},
    "caching": {"prompt_cache_options": {"mode": "implicit", "ttl": "30m", "prewarm": False}},
    "thinking as always": {"reasoning": {"effort": "low", "context": "auto", "mode": "standard"}},
    "a tool for the model alone": {
        "tools": [WEATHER | {"allowed_callers": ["direct"], "async": False, "defer_loading": False}]
    },
    "a call by the model": {
        "input": [
            {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}", "caller": {"type": "direct"}},
            {"type": "function_call_output", "call_id": "c", "output": "x", "caller": {"type": "direct"}},
        ]
    },
    "what parse left": {
        "input": [{"role": "assistant", "content": [{"type": "output_text", "text": "{}", "parsed": {"a": 1}}]}]
    },
    "where to cut": {
        "input": [
            {
                "role": "user",
                "content": [{"type": "input_text", "text": "x", "prompt_cache_breakpoint": {"mode": "explicit"}}],
            }
        ]
    },
}


@pytest.mark.parametrize("name", HARMLESS)
async def test_what_clients_send_and_nothing_depends_on_is_accepted(served: Served, name: str) -> None:
    await made(served, **HARMLESS[name])


async def test_the_tokens_of_an_input_are_counted(served: Served) -> None:
    earlier = await made(served, store=True)
    for asked in ({"instructions": "Be brief.", "tools": [WEATHER]}, {"previous_response_id": earlier["id"]}):
        used = (await made(served, **asked))["usage"]["input_tokens"]
        requests = len(served.engine.requests)
        response = await served.client.post("/v1/responses/input_tokens", json={"model": BASE, "input": "Hi"} | asked)
        assert response.json() == {"object": "response.input_tokens", "input_tokens": used}
        assert len(served.engine.requests) == requests
    response = await served.client.post("/v1/responses/input_tokens", json={"model": BASE, "input": [{"type": "x"}]})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "input.0.type"
    response = await served.client.post("/v1/responses/input_tokens", json={"model": "none", "input": "Hi"})
    assert response.status_code == 404


async def test_no_input_is_made_shorter(served: Served) -> None:
    response = await served.client.post("/v1/responses/compact", json={"model": BASE, "input": "Hi"})
    assert response.status_code == 404
    assert "/v1/responses/compact" in response.json()["error"]["message"]
