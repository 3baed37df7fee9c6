"""`/v1/messages` in front of a scripted engine. Behaviour shared with chat is tested there."""

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.errors import EngineUnavailable
from tests.server.http.test_tools import use_template
from tests.support.chats import named_events, say, sent_prompt
from tests.support.scripted import BASE, BASE_DIGEST, TEXT, Served, encode, serving
from tests.support.templates import REASONING_TEMPLATES

HELLO = [{"role": "user", "content": "Hi"}]
PROMPT = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
WEATHER: dict[str, Any] = {
    "name": "get_weather",
    "description": "The weather.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALL = 'Let me see.\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path, context=4096) as served:
        yield served


async def post(served: Served, path: str = "", **body: Any) -> httpx.Response:
    given = {"model": BASE, "messages": HELLO, "max_tokens": 200} | body
    return await served.client.post(f"/v1/messages{path}", json=given)


async def made(served: Served, **body: Any) -> dict[str, Any]:
    response = await post(served, **body)
    assert response.status_code == 200, response.text
    message: dict[str, Any] = response.json()
    return message


# --- responses ------------------------------------------------------------------------------------------------


async def test_an_answer_has_anthropics_shape(served: Served) -> None:
    served.engine.cached_tokens = 4
    response = await post(served)
    assert response.headers["x-adapter-digest"] == BASE_DIGEST
    assert response.headers["request-id"] == response.headers["x-request-id"]
    body = response.json()
    assert body.pop("id").startswith("msg_")
    assert sent_prompt(served) == PROMPT
    assert body == {
        "type": "message",
        "role": "assistant",
        "model": BASE,
        "content": [{"type": "text", "text": TEXT}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": len(encode(PROMPT)) - 4,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 4,
            "output_tokens": len(encode(TEXT)) + 1,
        },
    }


async def test_a_stream_has_all_its_events(served: Served) -> None:
    say(served, CALL)
    whole = await made(served, tools=[WEATHER])
    assert [block["type"] for block in whole["content"]] == ["text", "tool_use"]
    assert whole["content"][1] | {"id": ""} == {
        "type": "tool_use",
        "id": "",
        "name": "get_weather",
        "input": {"city": "Rome"},
    }
    assert whole["stop_reason"] == "tool_use"
    stream = named_events(await post(served, tools=[WEATHER], stream=True))
    kinds = [event["type"] for event in stream]
    deltas = [[e["delta"] for e in stream if e["type"] == "content_block_delta" and e["index"] == i] for i in (0, 1)]
    assert kinds == [
        "message_start",
        "ping",
        "content_block_start",
        *["content_block_delta"] * len(deltas[0]),
        "content_block_stop",
        "content_block_start",
        *["content_block_delta"] * len(deltas[1]),
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert "".join(delta["text"] for delta in deltas[0]) == "Let me see."
    assert json.loads("".join(delta["partial_json"] for delta in deltas[1])) == {"city": "Rome"}
    start = stream[0]["message"]
    assert (start["content"], start["stop_reason"], start["role"]) == ([], None, "assistant")
    begun = [event["content_block"] for event in stream if event["type"] == "content_block_start"]
    assert begun[0] == {"type": "text", "text": ""}
    assert begun[1] | {"id": ""} == {"type": "tool_use", "id": "", "name": "get_weather", "input": {}}
    assert stream[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert stream[-2]["usage"] == whole["usage"]


async def test_why_an_answer_ends(served: Served) -> None:
    body = await made(served, stop_sequences=["brown"])
    assert (body["stop_reason"], body["stop_sequence"]) == ("stop_sequence", "brown")
    assert (await made(served, max_tokens=3))["stop_reason"] == "max_tokens"
    served.engine.reply = lambda request: encode("a" * 5000)[: request.sampling.max_tokens]
    body = await made(served, max_tokens=100_000)
    assert body["stop_reason"] == "model_context_window_exceeded"
    assert body["usage"]["output_tokens"] == 4096 - len(encode(PROMPT))


async def test_a_call_cut_short_has_the_arguments_so_far(served: Served) -> None:
    cut = CALL[: CALL.index('me"}')]
    served.engine.reply = lambda request: encode(cut)
    body = await made(served, tools=[WEATHER])
    assert body["stop_reason"] in ("max_tokens", "model_context_window_exceeded")
    assert [block["type"] for block in body["content"]] == ["text", "tool_use"]
    assert body["content"][1]["input"] in ({}, {"city": "Ro"})


FAULTY = [
    '{"city": Rome}',
    "{'city': 1}",
    '{"city": "a\\x"}',
    '{"n": 1e999, "m": NaN}',
    '{"city": "Ro',
    '{"a": "\\ud83d"}',
]


@pytest.mark.parametrize("given", FAULTY)
async def test_arguments_that_are_no_json_are_a_text_in_the_input(served: Served, given: str) -> None:
    say(served, f'<tool_call>{{"name": "get_weather", "arguments": {given}}}</tool_call>')
    [use] = [block for block in (await made(served, tools=[WEATHER]))["content"] if block["type"] == "tool_use"]
    assert use["input"]["INVALID_JSON"].startswith(given)
    stream = named_events(await post(served, tools=[WEATHER], stream=True))
    deltas = [e["delta"]["partial_json"] for e in stream if e.get("delta", {}).get("type") == "input_json_delta"]
    assert json.loads("".join(deltas)) == use["input"]
    assert stream[-1]["type"] == "message_stop"
    result = {"type": "tool_result", "tool_use_id": use["id"], "content": "No JSON.", "is_error": True}
    turns = [{"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]
    await made(served, messages=[*HELLO, *turns], tools=[WEATHER])


async def test_an_empty_answer_has_no_block(served: Served) -> None:
    say(served, "")
    assert (await made(served))["content"] == []


async def test_adapters_answer(served: Served, tmp_path: Path) -> None:
    digest = await served.add_adapter(tmp_path, "poet")
    response = await post(served, model="poet")
    assert (response.headers["x-adapter-digest"], response.json()["model"]) == (digest, "poet")


# --- requests -----------------------------------------------------------------------------------------------


async def test_blocks_make_the_prompt_that_chat_makes(served: Served) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Rome?", "cache_control": {"type": "ephemeral"}}]},
        {
            "role": "assistant",
            "content": [
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "Let me see."},
                {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"city": "Röm"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "sunny"}]},
                {"type": "text", "text": "Well?"},
            ],
        },
    ]
    await made(served, system=[{"type": "text", "text": "Be brief."}], messages=messages, tools=[WEATHER])
    ours = sent_prompt(served)
    parameters = {"parameters": WEATHER["input_schema"]}
    function = {"name": "get_weather", "description": "The weather."} | parameters
    call = {"id": "t1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Röm"}'}}
    chat = {
        "model": BASE,
        "tools": [{"type": "function", "function": function}],
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Rome?"},
            {"role": "assistant", "content": "Let me see.", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "t1", "content": "sunny"},
            {"role": "user", "content": "Well?"},
        ],
    }
    assert (await served.client.post("/v1/chat/completions", json=chat)).status_code == 200
    assert sent_prompt(served) == ours


async def test_a_last_message_of_the_assistant_is_continued(served: Served) -> None:
    await made(served, messages=[*HELLO, {"role": "assistant", "content": "Once upon"}])
    assert sent_prompt(served) == f"{PROMPT}Once upon"


async def test_turns_of_one_role_are_one_turn(served: Served) -> None:
    """Anthropic joins them too; many chat templates refuse consecutive turns of one role."""
    use = {"type": "tool_use", "id": "t", "name": "f", "input": {}}
    result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "x"}]}
    turns = [("assistant", "A"), ("assistant", [use])], [("user", "B"), ("user", "C"), ("system", "S"), ("user", "D")]
    before, after = ([{"role": role, "content": content} for role, content in part] for part in turns)
    await made(served, messages=[*HELLO, *HELLO, *before, result, *after])
    ours = sent_prompt(served)
    call = {"id": "t", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "Hi\nHi"},
        {"role": "assistant", "content": "A", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "t", "content": "x"},
        {"role": "user", "content": "B\nC"},
        {"role": "system", "content": "S"},
        {"role": "user", "content": "D"},
    ]
    await served.client.post("/v1/chat/completions", json={"model": BASE, "messages": messages})
    assert sent_prompt(served) == ours


HARMLESS: dict[str, dict[str, Any]] = {
    "a thread is begun": {"thread": {"type": "create"}},
    "no edits": {"context_management": {"edits": []}},
    "all thoughts are kept": {
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    },
    "a cache for everybody": {"cache_control": {"type": "ephemeral", "scope": "global"}},
    "what parse left": {
        "messages": [
            {"role": "assistant", "content": [{"type": "text", "text": "a", "parsed_output": {"a": 1}}]},
            *HELLO,
        ]
    },
}


@pytest.mark.parametrize("name", HARMLESS)
async def test_what_clients_send_and_nothing_depends_on_is_accepted(served: Served, name: str) -> None:
    await made(served, **HARMLESS[name])


async def test_a_thread_is_never_found(served: Served) -> None:
    """Clients then send the whole conversation, as for an expired thread."""
    response = await post(served, thread={"type": "continue", "previous_message_id": "msg_1"})
    error = response.json()["error"]
    assert (response.status_code, error["type"]) == (404, "not_found_error")
    assert (error["param"], error["code"]) == ("thread.previous_message_id", "thread_not_found")
    response = await post(served, context_management={"edits": [{"type": "clear_tool_uses_20250919"}]})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "context_management")


async def test_choices_and_formats_are_those_of_chat(served: Served) -> None:
    other = WEATHER | {"name": "other"}
    for choice, grammar in (
        ({"type": "auto"}, False),
        ({"type": "none"}, False),
        ({"type": "any"}, True),
        ({"type": "tool", "name": "other"}, True),
        ({"type": "auto", "disable_parallel_tool_use": True}, True),
    ):
        await made(served, tools=[WEATHER, other], tool_choice=choice)
        assert (served.engine.requests[-1].sampling.grammar is not None) == grammar, choice
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "schema": schema}
    for asked in ({"output_config": {"format": form}}, {"output_format": form}):
        await made(served, **asked)
        found = served.engine.requests[-1].sampling.grammar
        assert found is not None
        assert json.loads(found.text) == schema | {"additionalProperties": False}


async def test_sampling_is_the_clients(served: Served) -> None:
    await made(served, temperature=0.5, top_p=0.5, top_k=7, metadata={"user_id": "x"}, service_tier="auto")
    sampling = served.engine.requests[-1].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_tokens) == (0.5, 0.5, 7, 200)


async def test_answers_and_refusals_have_an_id_under_anthropics_name(served: Served) -> None:
    for response in (await post(served), await post(served, messages=[]), await post(served, "/count_tokens")):
        assert response.headers["request-id"] == response.headers["x-request-id"]
    assert "request-id" not in (await served.client.get("/v1/models")).headers


async def test_tokens_are_counted_as_they_are_used(served: Served) -> None:
    served.engine.cached_tokens = 0
    asked = {"system": "Be brief.", "tools": [WEATHER]}
    used = (await made(served, **asked))["usage"]["input_tokens"]
    response = await post(served, "/count_tokens", max_tokens=None, **asked)
    assert response.json() == {"input_tokens": used}
    idle = {"mcp_servers": [], "context_management": {"edits": []}, "speed": "standard"}  # sent by assistants
    response = await post(served, "/count_tokens", max_tokens=None, **asked, **idle)
    assert response.json() == {"input_tokens": used}


# --- refusals -----------------------------------------------------------------------------------------------

FORM = {"type": "json_schema", "schema": {"type": "object"}}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no max_tokens": ({"max_tokens": None}, "max_tokens"),
    "no messages": ({"messages": []}, "messages"),
    "role": ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
        "messages.0.content.0.type",
    ),
    "document in a result": (
        {
            "messages": [
                {
                    "role": "user",
                    "content": [{"type": "tool_result", "tool_use_id": "x", "content": [{"type": "document"}]}],
                }
            ]
        },
        "messages.0.content.0.content.0.type",
    ),
    "result of the assistant": (
        {"messages": [{"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "x"}]}]},
        "messages.0.content.0.type",
    ),
    "system image": ({"system": [{"type": "image"}]}, "system.0.type"),
    "web search": ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0.type"),
    "tool twice": ({"tools": [WEATHER, WEATHER]}, "`tools` has two functions named `get_weather`"),
    "tool schema": (
        {"tools": [WEATHER | {"strict": True, "input_schema": {"type": "object", "minProperties": "x"}}]},
        "tools.0.input_schema",
    ),
    "tool of text": ({"tools": [WEATHER | {"input_schema": {"type": "string"}}]}, "tools.0.input_schema"),
    "choice": ({"tool_choice": {"type": "any"}}, "tool_choice"),
    "choice name": ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "x"}}, "`tool_choice` names `x`"),
    "no name": ({"tools": [WEATHER], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
    "budget": ({"thinking": {"type": "enabled", "budget_tokens": 200}}, "thinking.budget_tokens"),
    "schema": (
        {"output_config": {"format": {"type": "json_schema", "schema": {"type": "colour"}}}},
        "output_config.format.schema",
    ),
    "a schema by its name in the beta": (
        {"output_format": {"type": "json_schema", "schema": {"type": "colour"}}},
        "output_format.schema",
    ),
    "two schemas": (
        {"output_format": FORM, "output_config": {"format": FORM}},
        "output_format",
    ),
    "container": ({"container": "c"}, "container"),
    "long prompt": ({"messages": [{"role": "user", "content": "漢" * 5000}]}, "context length"),
    "stop_sequences": ({"stop_sequences": [""]}, "stop_sequences.0"),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_refusals_have_anthropics_shape_and_name_the_field(served: Served, name: str) -> None:
    body, named = REFUSED[name]
    response = await post(served, **body)
    assert response.status_code == 400
    answer = response.json()
    assert (answer["type"], set(answer["error"])) == ("error", {"type", "message", "param", "code"})
    assert answer["error"]["type"] == "invalid_request_error"
    assert named in answer["error"]["message"]
    said = f"{answer['error']['message']} `{answer['error']['param']}`"
    assert not re.search(r"`(response_format|tools\.0\.function)", said)
    assert served.engine.requests == []


async def test_errors_have_anthropics_types(served: Served) -> None:
    response = await post(served, model="nobody")
    assert (response.status_code, response.json()["error"]["type"]) == (404, "not_found_error")
    assert response.headers["request-id"] == response.headers["x-request-id"]
    served.engine.fail = {0: EngineUnavailable("The engine stopped while this request was running.")}
    response = await post(served)
    assert (response.status_code, response.json()["error"]["type"]) == (503, "overloaded_error")
    served.engine.fail = {3: EngineUnavailable("The engine stopped while this request was running.")}
    stream = named_events(await post(served, stream=True))
    message = "The engine stopped while this request was running."
    code = "service_unavailable"
    error = {"type": "overloaded_error", "message": message, "param": None, "code": code}
    assert stream[-1] == {"type": "error", "error": error}
    served.services.drain.begin()
    assert (await post(served)).json()["error"]["type"] == "overloaded_error"


async def test_a_prompt_that_is_too_long_is_refused_in_anthropics_words(served: Served) -> None:
    for text, words in (
        (
            "x" * 4090,
            r"^prompt is too long: 4\d{3} tokens > 4096 maximum\. This model's maximum context length is 4096",
        ),
        ("x" * 100_000, "^prompt is too long: `messages` has a text of more than"),
    ):
        for stream in (False, True):
            response = await post(served, messages=[{"role": "user", "content": text}], stream=stream)
            error = response.json()["error"]
            assert (response.status_code, error["type"]) == (400, "invalid_request_error")
            assert (error["code"], error["param"]) == ("context_length_exceeded", "messages")
            assert re.match(words, error["message"])


async def test_the_key_may_come_as_x_api_key(tmp_path: Path) -> None:
    async with serving(tmp_path, api_key=("sk-1",)) as served:
        path, body = "/v1/messages", {"model": BASE, "messages": HELLO, "max_tokens": 5}
        response = await served.client.post(path, json=body)
        assert (response.status_code, response.json()["error"]["type"]) == (401, "authentication_error")
        for headers, status in (
            ({"x-api-key": "sk-1"}, 200),
            ({"x-api-key": "sk-2"}, 401),
            ({"Authorization": "Bearer sk-1"}, 200),
            ({"Authorization": "Bearer sk-2", "x-api-key": "sk-1"}, 401),
        ):
            assert (await served.client.post(path, json=body, headers=headers)).status_code == status


# --- thoughts -----------------------------------------------------------------------------------------------


async def test_a_thought_is_a_block_before_the_answer(served: Served) -> None:
    use_template(served, REASONING_TEMPLATES["qwen3"])
    say(served, "<think>\nIs it far?\n</think>\n\nYes.")
    body = await made(served, thinking={"type": "enabled", "budget_tokens": 100})
    assert served.engine.requests[-1].sampling.thought is not None
    assert body["content"] == [
        {"type": "thinking", "thinking": "Is it far?", "signature": ""},
        {"type": "text", "text": "Yes."},
    ]
    stream = named_events(await post(served, thinking={"type": "adaptive"}, stream=True))
    deltas = [e["delta"] for e in stream if e["type"] == "content_block_delta" and e["index"] == 0]
    assert {delta["type"] for delta in deltas} == {"thinking_delta"}
    assert "".join(delta["thinking"] for delta in deltas) == "Is it far?"
    unseen = {"type": "adaptive", "display": "omitted"}
    assert (await made(served, thinking=unseen))["content"] == body["content"][1:]
    assert "Is it far?" not in (await post(served, thinking=unseen, stream=True)).text
    use = {"type": "tool_use", "id": "t", "name": "f", "input": {}}
    result = {"type": "tool_result", "tool_use_id": "t", "content": "x"}
    turns = [{"role": "assistant", "content": [body["content"][0], use]}, {"role": "user", "content": [result]}]
    await made(served, messages=[*HELLO, *turns], thinking={"type": "enabled", "budget_tokens": 100})
    assert "<think>\nIs it far?\n</think>" in sent_prompt(served)


async def test_there_is_no_thought_unless_it_is_asked_for(served: Served) -> None:
    use_template(served, REASONING_TEMPLATES["qwen3"])
    for thinking, prompt in ((None, True), ({"type": "disabled"}, True), ({"type": "adaptive"}, False)):
        say(served, "Yes.")
        await made(served, thinking=thinking)
        assert sent_prompt(served).endswith("<think>\n\n</think>\n\n") == prompt
