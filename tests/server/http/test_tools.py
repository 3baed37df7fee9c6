"""Tools in `/v1/chat/completions`: in front of a scripted engine, and enforced in a real one."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import httpx2
import jsonschema_rs
import openai
import pytest
from tokenizers import Tokenizer

from server.engine.engine import Engine
from server.text.chat_template import ChatTemplate
from server.text.processor import TextProcessor
from tests.server.http.test_structured_output import FollowingEngine
from tests.support.chats import sent_prompt
from tests.support.completions import events
from tests.support.offline import load_engine
from tests.support.scripted import BASE, EOS, Served, encode, serving
from tests.support.templates import TOOL_TEMPLATES
from tests.support.tiny import CHAT_TEMPLATE

HELLO: list[Any] = [{"role": "user", "content": "How is Rome?"}]
WEATHER_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 6}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {"name": "get_weather", "description": "The weather.", "parameters": WEATHER_SCHEMA},
}
NAMELESS: dict[str, Any] = {
    "name": "go",
    "description": "-",
    "parameters": {"type": "object", "properties": {"a": {"type": "string", "maxLength": 4}}, "required": ["a"]}
    | {"additionalProperties": False},
}
NOW: dict[str, Any] = {"type": "function", "function": {"name": "now"}}
STRICT: dict[str, Any] = {"type": "function", "function": WEATHER["function"] | {"strict": True}}
CALLS = (
    'Let me "see".\n<tool_call>\n{"name": "get_weather", "arguments": {"city": "R{ö}m\\"e", "days": 2}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path, CALLS, context=4096) as served:
        yield served


def use_template(served: Served, template: str) -> None:
    """Replace the base's chat template."""
    text = TextProcessor(served.services.text.tokenizer, ChatTemplate(template, {}), {"eos_token": "<|im_end|>"})
    object.__setattr__(served.services, "text", text)


async def chat(served: Served, **body: Any) -> httpx.Response:
    asked = {"model": BASE, "messages": HELLO, "tools": [WEATHER, NOW]} | body
    return await served.client.post("/v1/chat/completions", json=asked)


def assembled(chunks: list[Any], index: int = 0) -> dict[str, Any]:
    """The message assembled from a stream's deltas, and its finish reason."""
    message: dict[str, Any] = {"content": None, "tool_calls": []}
    reason = None
    for choice in (choice for chunk in chunks[:-1] for choice in chunk["choices"] if choice["index"] == index):
        delta = choice["delta"]
        if delta.get("content") is not None:
            message["content"] = (message["content"] or "") + delta["content"]
        for part in delta.get("tool_calls", []):
            if part["index"] == len(message["tool_calls"]):
                assert set(part) == {"index", "id", "type", "function"}
                assert part["function"]["arguments"] == ""
                message["tool_calls"].append([part["function"]["name"], ""])
            else:
                assert set(part) == {"index", "function"}
                message["tool_calls"][part["index"]][1] += part["function"]["arguments"]
        reason = choice["finish_reason"] or reason
    return message | {"finish_reason": reason}


# --- responses ------------------------------------------------------------------------------------------------


async def test_calls_are_apart_from_the_text(served: Served) -> None:
    choice = (await chat(served)).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    message = choice["message"]
    assert message["content"] == 'Let me "see".'
    first, second = message["tool_calls"]
    assert first["id"].startswith("call_")
    assert first["id"] != second["id"]
    assert first["type"] == "function"
    assert first["function"] == {"name": "get_weather", "arguments": '{"city": "R{ö}m\\"e", "days": 2}'}
    assert second["function"] == {"name": "now", "arguments": "{}"}
    assert served.engine.requests[-1].sampling.grammar is None


async def test_a_stream_says_the_same_as_the_whole_answer(served: Served) -> None:
    message = (await chat(served)).json()["choices"][0]["message"]
    chunks = events(await chat(served, stream=True, n=2))
    for index in range(2):
        assert assembled(chunks, index) == {
            "content": message["content"],
            "tool_calls": [[call["function"]["name"], call["function"]["arguments"]] for call in message["tool_calls"]],
            "finish_reason": "tool_calls",
        }
    deltas = [c["delta"] for chunk in chunks[:-1] for c in chunk["choices"] if c["index"] == 0]
    assert deltas[0]["role"] == "assistant"
    assert all("role" not in delta for delta in deltas[1:])
    assert sum("tool_calls" in delta for delta in deltas) > 8  # arguments come in pieces


@pytest.mark.parametrize("text", ["", "No call at all.", "  <tool_call> nor here\n"])
async def test_text_stays_text(served: Served, text: str) -> None:
    served.engine.reply = lambda request: [*encode(text), EOS]
    choice = (await chat(served)).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")
    assert "tool_calls" not in choice["message"]
    assert assembled(events(await chat(served, stream=True))) == {
        "content": text,
        "tool_calls": [],
        "finish_reason": "stop",
    }


async def test_calls_alone_have_null_beside_them(served: Served) -> None:
    served.engine.reply = lambda request: [*encode('<tool_call>{"name": "now"}</tool_call>'), EOS]
    message = (await chat(served)).json()["choices"][0]["message"]
    assert (message["content"], message["tool_calls"][0]["function"]["arguments"]) == (None, "{}")
    assert events(await chat(served, stream=True))[0]["choices"][0]["delta"] == {"role": "assistant", "content": None}


async def test_a_call_that_is_cut_short(served: Served) -> None:
    short = len(encode(CALLS[: CALLS.index("days")]))
    choice = (await chat(served, max_tokens=short)).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    [call] = choice["message"]["tool_calls"]
    assert call["function"]["arguments"].startswith('{"city": ')


@pytest.mark.parametrize("shown", ["<tool_call>", '<tool_call>\n{"na'])
async def test_an_answer_cut_short_before_the_name_of_its_call_has_no_text(served: Served, shown: str) -> None:
    served.engine.reply = lambda request: encode(shown + 'me": "now"}')
    body = {"max_tokens": len(encode(shown))}
    choice = (await chat(served, **body)).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("", "length")
    assert assembled(events(await chat(served, stream=True, **body)))["content"] in ("", None)


async def test_logprobs_and_token_ids_spell_the_whole_text(served: Served) -> None:
    options = {"logprobs": True, "return_token_ids": True}
    whole = (await chat(served, **options)).json()["choices"][0]
    tokens = whole["logprobs"]["content"]
    assert bytes(byte for token in tokens for byte in token["bytes"]).decode() == CALLS
    choices = [c for chunk in events(await chat(served, stream=True, **options))[:-1] for c in chunk["choices"]]
    assert [token for choice in choices for token in choice["logprobs"]["content"]] == tokens
    assert [id_ for choice in choices for id_ in choice["token_ids"]] == whole["token_ids"]


async def test_a_marker_that_is_a_special_token_is_seen(served: Served) -> None:
    """Mistral's markers are special tokens; other special tokens stay out of the text."""
    template = "{% for t in tools or [] %}[AVAILABLE_TOOLS]{% endfor %}" + CHAT_TEMPLATE
    tokenizer = Tokenizer.from_str(served.services.text.tokenizer.to_str())
    tokenizer.add_special_tokens(["[TOOL_CALLS]"])
    served.services.text.tokenizer = tokenizer
    use_template(served, template)
    reply = '<|im_start|>One.[TOOL_CALLS] [{"name": "now", "arguments": {"a": 1}}]'
    served.engine.reply = lambda request: [*tokenizer.encode(reply, add_special_tokens=False).ids, EOS]
    message = (await chat(served)).json()["choices"][0]["message"]
    assert message["content"] == "One."
    assert message["tool_calls"][0]["function"] == {"name": "now", "arguments": '{"a": 1}'}
    assert assembled(events(await chat(served, stream=True)))["tool_calls"] == [["now", '{"a": 1}']]


async def test_marks_of_several_special_tokens_are_seen(served: Served) -> None:
    """gpt-oss marks a thought and the call after it with several special tokens."""
    tokenizer = Tokenizer.from_str(served.services.text.tokenizer.to_str())
    parts = ["start", "channel", "message", "constrain", "call", "end", "return"]
    tokenizer.add_special_tokens([f"<|{part}|>" for part in parts])
    served.services.text.tokenizer = tokenizer
    use_template(served, TOOL_TEMPLATES["gpt_oss"] + "{# <|channel|>analysis #}")
    reply = (
        "<|channel|>analysis<|message|>Now.<|end|><|start|>assistant"
        '<|channel|>commentary to=functions.now <|constrain|>json<|message|>{"a": 1}<|call|>'
    )
    served.engine.reply = lambda request: [*tokenizer.encode(reply, add_special_tokens=False).ids, EOS]
    answer = (await chat(served)).json()
    assert "choices" in answer, answer
    message = answer["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == ("Now.", None)
    assert message["tool_calls"][0]["function"] == {"name": "now", "arguments": '{"a": 1}'}
    assert assembled(events(await chat(served, stream=True)))["tool_calls"] == [["now", '{"a": 1}']]


# --- requests -----------------------------------------------------------------------------------------------


async def test_the_model_is_told_unless_it_may_not_call(served: Served) -> None:
    await chat(served)
    assert '"name": "get_weather", "description": "The weather."' in sent_prompt(served)
    choice = (await chat(served, tool_choice="none")).json()["choices"][0]
    assert "get_weather" not in sent_prompt(served)
    assert choice["message"]["content"] == CALLS
    await chat(served, tools=[])
    assert "Tools" not in sent_prompt(served)


async def test_an_answer_and_its_results_can_be_sent_back(served: Served) -> None:
    message = (await chat(served)).json()["choices"][0]["message"]
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "sunny"} for call in message["tool_calls"]]
    response = await chat(served, messages=[*HELLO, message, *results])
    assert response.status_code == 200, response.text
    assert '"arguments": {"city": "R{ö}m\\"e", "days": 2}}' in sent_prompt(served)
    assert sent_prompt(served).count("<tool_response>\nsunny\n</tool_response>") == 2
    tokens = await served.client.post("/tokenize", json={"messages": HELLO, "tools": [WEATHER]})
    bare = await served.client.post("/tokenize", json={"messages": HELLO})
    assert tokens.json()["count"] > bare.json()["count"]


@pytest.mark.parametrize(("cut", "told"), [("", "{}"), ('{"city": "Ro', "{}"), ('{"days": 2, "city"', '{"days": 2}')])
async def test_a_call_that_was_cut_short_can_be_sent_back(served: Served, cut: str, told: str) -> None:
    response = await chat(served, messages=called(function={"name": "now", "arguments": cut}))
    assert response.status_code == 200, response.text
    assert f'{{"name": "now", "arguments": {told}}}' in sent_prompt(served)


@pytest.mark.parametrize(
    "given", ['{"days": x}', "{'days': 2}", '{"days": 2,}', '{"a": NaN}', "[]", "null", " ", '"x"']
)
@pytest.mark.parametrize("template", ["", "qwen2.5", "qwen3_coder", "deepseek_v3.1", "glm4.5"])
async def test_arguments_that_are_no_json_can_be_sent_back(served: Served, template: str, given: str) -> None:
    """Otherwise a conversation would end with the first bad call."""
    if template:
        use_template(served, TOOL_TEMPLATES[template])
    result = {"role": "tool", "tool_call_id": "call_1", "content": "No JSON."}
    messages = [*called(function={"name": "now", "arguments": given}), result]
    assert (response := await chat(served, messages=messages)).status_code == 200, response.text
    assert ("INVALID_JSON" in sent_prompt(served)) == bool(given.strip() not in ("", "null"))


@pytest.mark.parametrize("name", ["get weather", "wëtter", "f;", "x" * 129, "a\\nb"])
async def test_a_call_of_what_is_no_name_is_text(served: Served, name: str) -> None:
    """The client could not send such a call back."""
    text = f'<tool_call>{{"name": "{name}", "arguments": {{}}}}</tool_call>'
    served.engine.reply = lambda request: [*encode(text), EOS]
    message = (await chat(served)).json()["choices"][0]["message"]
    assert message["content"] == text
    assert "tool_calls" not in message


async def test_of_some_allowed_tools_the_model_is_told_alone(served: Served) -> None:
    named = {"type": "function", "function": {"name": "now"}}
    for mode, enforced in (("auto", False), ("required", True)):
        choice = {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [named]}}
        response = await chat(served, tools=[STRICT, NOW], tool_choice=choice)
        assert response.status_code == 200, response.text
        assert '"name": "now"' in sent_prompt(served)
        assert "get_weather" not in sent_prompt(served)
        grammar = served.engine.requests[-1].sampling.grammar
        assert (grammar is not None) == enforced
        assert grammar is None or "get_weather" not in grammar.text
    bad = {
        "type": "function",
        "function": {"name": "bad", "parameters": {"properties": {"a": {"not": {"type": "string"}}}}},
    }
    choice = {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "required", "tools": [bad | {"function": {"name": "bad"}}]},
    }
    error = (await chat(served, tools=[NOW, bad], tool_choice=choice)).json()["error"]
    assert error["param"] == "tools.1.function.parameters.properties.a.not"


def function(**fields: Any) -> list[Any]:
    return [{"type": "function", "function": {"name": "f"} | fields}]


CALL: dict[str, Any] = {"id": "call_1", "type": "function", "function": {"name": "now", "arguments": "{}"}}


def called(**fields: Any) -> list[Any]:
    return [*HELLO, {"role": "assistant", "content": None, "tool_calls": [CALL | fields]}]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no function": ({"tools": [{"type": "function"}]}, "tools.0.function"),
    "type": ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
    "name": ({"tools": function(name="a b")}, "tools.0.function.name"),
    "same name": ({"tools": [NOW, NOW]}, "tools.1.function.name"),
    "parameters": ({"tools": function(parameters=[])}, "tools.0.function.parameters"),
    "no object": ({"tools": function(parameters={"type": "string"})}, "tools.0.function.parameters"),
    "strict": ({"tools": function(strict="yes")}, "tools.0.function.strict"),
    "field": ({"tools": function(returns={})}, "tools.0.function.returns"),
    "required": ({"tools": [], "tool_choice": "required"}, "tool_choice"),
    "unknown choice": (
        {"tool_choice": {"type": "function", "function": {"name": "x"}}},
        "tool_choice.function.name",
    ),
    "parallel": ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
    "arguments": (
        {"messages": called(function={"name": "now", "arguments": [1]})},
        "messages.1.tool_calls.0.function.arguments",
    ),
    "called name": (
        {"messages": called(function={"name": "a b", "arguments": "{}"})},
        "messages.1.tool_calls.0.function.name",
    ),
    "allowed": (
        {
            "tool_choice": {
                "type": "allowed_tools",
                "allowed_tools": {"mode": "auto", "tools": [NOW, *function(name="x")]},
            }
        },
        "tool_choice.allowed_tools.tools.1.function.name",
    ),
    "choice of another kind": ({"tool_choice": {"type": "custom", "custom": {"name": "x"}}}, "tool_choice"),
    "no id": ({"messages": called(id=None)}, "messages.1.tool_calls.0.id"),
    "whose calls": ({"messages": [{"role": "user", "content": "a", "tool_calls": [CALL]}]}, "messages.0.tool_calls"),
    "schema": (
        {
            "tools": [NOW, *function(parameters={"properties": {"a": {"type": "array", "uniqueItems": True}}})],
            "tool_choice": "required",
        },
        "tools.1.function.parameters.properties.a.uniqueItems",
    ),
    "beside a regex": ({"guided_regex": "a+"}, "guided_regex"),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_refusals_name_the_field(served: Served, name: str) -> None:
    body, param = REFUSED[name]
    response = await chat(served, **body)
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param), error
    assert served.engine.requests == []


@pytest.mark.parametrize("depth", [90, 900, 20_000])
@pytest.mark.parametrize("choice", ["auto", "required"])
async def test_schemas_and_arguments_nested_deep_are_no_fault(served: Served, depth: int, choice: str) -> None:
    deep = '{"a": ' * depth + "1" + "}" * depth
    asked = {"model": BASE, "messages": HELLO, "tools": function(parameters="DEEP"), "tool_choice": choice}
    headers = {"Content-Type": "application/json"}
    for body in (asked, {"model": BASE, "messages": called(function={"name": "now", "arguments": deep})}):
        content = json.dumps(body).replace('"DEEP"', deep)
        response = await served.client.post("/v1/chat/completions", content=content, headers=headers)
        assert response.status_code in (200, 400), response.text


async def test_the_format_in_force_is_told(served: Served, tmp_path: Path) -> None:
    await served.add_adapter(tmp_path, "mine")
    for path in (f"/v1/models/{BASE}", "/v1/models/mine", "/v1/adapters/mine"):
        assert (await served.client.get(path)).json()["tool_format"] == "hermes"


# --- enforced -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(model_dir: Path, cache_dir: Path) -> Engine:
    return load_engine(model_dir, cache_dir, max_model_len=256)


@pytest.fixture
async def following(tmp_path: Path, engine: Engine) -> AsyncIterator[Served]:
    kind = type("Following", (FollowingEngine,), {"engine": engine, "arrived": {}})
    async with serving(tmp_path, engine=kind) as served:
        use_template(served, "{% if tools %}Call! {% endif %}" + CHAT_TEMPLATE)
        yield served


@pytest.fixture(scope="module")
def roomy_engine(model_dir: Path, cache_dir: Path) -> Engine:
    return load_engine(model_dir, cache_dir, max_model_len=512)


@pytest.fixture
async def roomy(tmp_path: Path, roomy_engine: Engine) -> AsyncIterator[Served]:
    kind = type("Following", (FollowingEngine,), {"engine": roomy_engine, "arrived": {}})
    async with serving(tmp_path, engine=kind, context=512) as served:
        yield served


@pytest.fixture
def client(following: Served) -> openai.AsyncOpenAI:
    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(following.app))
    return openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", max_retries=0, http_client=http)


def check(call: Any) -> None:
    arguments = json.loads(call["function"]["arguments"])
    assert call["function"]["name"] in ("get_weather", "now")
    assert jsonschema_rs.is_valid(WEATHER_SCHEMA, arguments) if arguments else call["function"]["name"] == "now"


async def test_required_calls_parse_and_validate(following: Served) -> None:
    names = set()
    for seed in range(2):
        body = {"n": 25, "seed": 100 * seed, "temperature": 1.5, "max_tokens": 120, "parallel_tool_calls": False}
        choices = (await chat(following, tool_choice="required", **body)).json()["choices"]
        for choice in choices:
            assert choice["finish_reason"] == "tool_calls", choice
            assert choice["message"]["content"] is None
            [call] = choice["message"]["tool_calls"]
            check(call)
            names.add(call["function"]["name"])
    assert names == {"get_weather", "now"}


@pytest.mark.parametrize("template", TOOL_TEMPLATES)
async def test_required_calls_of_every_format_parse_and_validate(roomy: Served, template: str) -> None:
    use_template(roomy, TOOL_TEMPLATES[template].replace("tojson(indent=4)", "tojson"))
    body: dict[str, Any] = {"n": 4, "seed": 5, "temperature": 1.3, "max_tokens": 160, "tool_choice": "required"}
    body |= {"messages": [{"role": "user", "content": "?"}], "tools": [{"type": "function", "function": NAMELESS}]}
    choices = (await chat(roomy, **body)).json()["choices"]
    chunks = events(await chat(roomy, stream=True, **body))
    for choice in choices:
        calls = [[call["function"]["name"], call["function"]["arguments"]] for call in choice["message"]["tool_calls"]]
        streamed = assembled(chunks, choice["index"])
        assert (streamed["tool_calls"], streamed["content"]) == (calls, choice["message"]["content"])
        assert streamed["finish_reason"] == choice["finish_reason"]
        assert choice["message"]["content"] is None
        for name, arguments in calls if choice["finish_reason"] == "tool_calls" else calls[:-1]:
            assert name == "go"
            assert jsonschema_rs.is_valid(NAMELESS["parameters"], json.loads(arguments))
    assert any(choice["message"]["tool_calls"] for choice in choices)


@pytest.mark.slow
async def test_of_500_required_calls_none_is_malformed_and_streams_say_the_same(following: Served) -> None:
    finished = 0
    for seed in range(21):
        body: dict[str, Any] = {
            "n": 25,
            "seed": 1000 * seed,
            "temperature": 1.5,
            "max_tokens": 160,
            "parallel_tool_calls": False,
        }
        body |= {"tool_choice": "required"}
        choices = (await chat(following, **body)).json()["choices"]
        chunks = events(await chat(following, stream=True, **body))
        for choice in choices:
            [call] = choice["message"]["tool_calls"]
            streamed = assembled(chunks, choice["index"])
            assert streamed["tool_calls"] == [[call["function"]["name"], call["function"]["arguments"]]]
            assert streamed["finish_reason"] == choice["finish_reason"]
            if choice["finish_reason"] == "tool_calls":  # the others ended at max_tokens
                check(call)
                finished += 1
    assert finished >= 500


async def test_several_calls_a_named_one_and_a_strict_one(following: Served) -> None:
    free = {"n": 8, "seed": 3, "temperature": 1.5, "max_tokens": 200}
    choices = (await chat(following, tool_choice="required", **free)).json()["choices"]
    finished = [c["message"]["tool_calls"] for c in choices if c["finish_reason"] == "tool_calls"]
    assert max(map(len, finished)) > 1
    for call in (call for calls in finished for call in calls):
        check(call)
    named = {"type": "function", "function": {"name": "get_weather"}}
    for choice in (await chat(following, tool_choice=named, **free)).json()["choices"]:
        [call] = choice["message"]["tool_calls"]
        assert call["function"]["name"] == "get_weather"
        check(call)
    begun = {"messages": [*HELLO, {"role": "assistant", "content": "<tool"}], "add_generation_prompt": False}
    assert (await chat(following, tools=[STRICT], **free, **begun)).status_code == 200
    grammar = following.engine.requests[-1].sampling.grammar
    assert grammar is not None
    assert "opening" in grammar.text


async def test_arguments_are_those_that_the_function_names(following: Served) -> None:
    schema = {"type": "object", "properties": {"day": {"enum": [1, 2]}}}
    tools = [{"type": "function", "function": {"name": "now", "parameters": schema}}]
    body = {"n": 20, "seed": 7, "temperature": 1.5, "max_tokens": 60, "parallel_tool_calls": False}
    choices = (await chat(following, tools=tools, tool_choice="required", **body)).json()["choices"]
    calls = [choice["message"]["tool_calls"][0]["function"]["arguments"] for choice in choices]
    assert '{"day": 1}' in calls
    assert set(calls) <= {"{}", '{"day": 1}', '{"day": 2}'}


async def test_the_openai_client_reads_calls_whole_and_streaming(client: openai.AsyncOpenAI) -> None:
    asked: dict[str, Any] = {
        "model": BASE,
        "messages": HELLO,
        "tools": [STRICT],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "seed": 5,
        "temperature": 1.5,
        "max_tokens": 150,
    }
    whole = await client.chat.completions.create(**asked)
    assert whole.choices[0].finish_reason == "tool_calls"
    [call] = whole.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert jsonschema_rs.is_valid(WEATHER_SCHEMA, json.loads(call.function.arguments))
    async with client.chat.completions.stream(**asked) as stream:
        async for _ in stream:
            pass
        final = await stream.get_final_completion()
    assert final.choices[0].finish_reason == "tool_calls"
    assert final.choices[0].message.content == whole.choices[0].message.content
    [streamed] = final.choices[0].message.tool_calls or []
    assert streamed.function.name == call.function.name
    assert streamed.function.arguments == call.function.arguments


async def test_an_answer_of_a_schema_or_a_call(following: Served) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    format_ = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema | {"additionalProperties": False}}}
    body = {"n": 12, "seed": 1, "temperature": 1.5, "max_tokens": 150, "parallel_tool_calls": False}
    for choice in (await chat(following, response_format=format_, tools=[STRICT, NOW], **body)).json()["choices"]:
        if choice["finish_reason"] == "tool_calls":
            check(choice["message"]["tool_calls"][0])
        elif choice["finish_reason"] == "stop":
            assert jsonschema_rs.is_valid(schema, json.loads(choice["message"]["content"]))


async def test_what_openais_parse_adds_to_an_answer_may_come_back(served: Served) -> None:
    function = {"name": "weather", "arguments": '{"city": "Paris"}'}

    def history(**more: Any) -> list[dict[str, Any]]:
        added = {key: {"city": "Paris"} for key in more}
        call = {"id": "c1", "type": "function", "function": function | added}
        return [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "so", "tool_calls": [call]}]

    plain, parsed = history(), history(parsed_arguments=True)
    parsed[1]["parsed"] = {"a": 1}
    for messages in (plain, parsed):
        response = await served.client.post(
            "/v1/chat/completions", json={"model": BASE, "messages": messages, "max_tokens": 2}
        )
        assert response.status_code == 200, response.text
    first, second = served.engine.requests[-2:]
    assert first.prompt == second.prompt
