"""Thoughts in `/v1/chat/completions`: with a scripted engine, and with a limited length in a real one."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import httpx2
import jsonschema_rs
import openai
import pytest
from tokenizers import AddedToken, Tokenizer

from server.engine.engine import Engine
from server.text.chat_template import ChatTemplate
from server.text.processor import TextProcessor
from tests.server.http.test_structured_output import FollowingEngine
from tests.server.http.test_tools import CALLS, NOW, STRICT, WEATHER, use_template
from tests.support.chats import sent_prompt
from tests.support.completions import events
from tests.support.offline import load_engine
from tests.support.scripted import BASE, EOS, Served, encode, serving
from tests.support.templates import REASONING_TEMPLATES
from tests.support.tiny import CHAT_TEMPLATE

QWEN3 = REASONING_TEMPLATES["qwen3"]
HELLO: list[Any] = [{"role": "user", "content": "How is Rome?"}]
THOUGHT = "Rome is {far}.\n<tool_call> is a way."
ANSWER = f"<think>\n{THOUGHT}\n</think>\n\nIt is\nwarm. "


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    async with serving(tmp_path, ANSWER, context=4096) as served:
        use_template(served, QWEN3)
        yield served


async def chat(served: Served, **body: Any) -> httpx.Response:
    return await served.client.post("/v1/chat/completions", json={"model": BASE, "messages": HELLO} | body)


def streamed(chunks: list[Any], index: int = 0) -> tuple[str, str, list[str]]:
    """A stream's thought, its content, and the kinds of its deltas in order."""
    thought, content, kinds = "", "", []
    for choice in (choice for chunk in chunks[:-1] for choice in chunk["choices"] if choice["index"] == index):
        delta = choice["delta"]
        assert delta.get("reasoning") == delta.get("reasoning_content")
        thought += delta.get("reasoning") or ""
        content += delta.get("content") or ""
        kinds += [key for key in ("reasoning", "content", "tool_calls") if delta.get(key)]
    return thought, content, kinds


async def test_a_thought_is_apart_from_the_answer(served: Served) -> None:
    body = (await chat(served)).json()
    message = body["choices"][0]["message"]
    assert message["reasoning"] == message["reasoning_content"] == THOUGHT
    assert message["content"] == "It is\nwarm. "
    thought = len(encode(ANSWER.partition("</think>")[0] + "</think>"))
    details = body["usage"]["completion_tokens_details"]
    assert thought <= details["reasoning_tokens"] <= thought + 2, "the mark's last token may extend beyond it"
    assert body["choices"][0]["finish_reason"] == "stop"


async def test_a_stream_says_the_same_as_the_whole_answer(served: Served) -> None:
    chunks = events(await chat(served, stream=True, n=2, stream_options={"include_usage": True}))
    for index in range(2):
        thought, content, kinds = streamed(chunks, index)
        assert (thought, content) == (THOUGHT, "It is\nwarm. ")
        assert kinds == sorted(kinds, reverse=True), "the thought comes before the content"
        assert kinds.count("reasoning") > 3
    assert chunks[-2]["usage"]["completion_tokens_details"]["reasoning_tokens"] > 20


async def test_a_thought_can_be_hidden(served: Served) -> None:
    body = (await chat(served, include_reasoning=False)).json()
    assert set(body["choices"][0]["message"]) == {"role", "content", "refusal"}
    assert body["usage"]["completion_tokens_details"]["reasoning_tokens"] > 20
    chunks = events(await chat(served, include_reasoning=False, stream=True))
    assert streamed(chunks)[:2] == ("", "It is\nwarm. ")


@pytest.mark.parametrize(
    ("stop", "content", "reason"),
    [
        (["{far}", "\n\n", "think>", "<", "\nIt"], "It is\nwarm. ", None),
        (["\n", "{far}"], "It is", "\n"),
        (["It is"], "", "It is"),
    ],
)
@pytest.mark.parametrize("begun", [False, True])
async def test_stop_strings_count_in_the_answer_alone(
    served: Served, begun: bool, stop: list[str], content: str, reason: str | None
) -> None:
    if begun:
        use_template(served, REASONING_TEMPLATES["qwen3_thinking"])
        served.engine.reply = lambda request: [*encode(ANSWER.removeprefix("<think>\n")), EOS]
    choice = (await chat(served, stop=stop, logprobs=True)).json()["choices"][0]
    assert (choice["message"]["reasoning"], choice["message"]["content"]) == (THOUGHT, content)
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", reason)
    spelt = "".join(token["token"] for token in choice["logprobs"]["content"])
    assert spelt.endswith(content)
    assert streamed(events(await chat(served, stop=stop, stream=True)))[:2] == (THOUGHT, content)


async def test_a_stop_string_with_the_mark_of_a_thoughts_end_ends_it(served: Served) -> None:
    """With it a client gets the thought alone."""
    for stream in (False, True):
        answer = await chat(served, stop=["</think>"], stream=stream)
        if stream:
            assert streamed(events(answer))[:2] == (THOUGHT, "")
        else:
            message = answer.json()["choices"][0]["message"]
            assert (message["reasoning"], message["content"] or "") == (THOUGHT, "")


@pytest.mark.parametrize(
    ("reply", "content"), [("\n\nIt is", ""), ("\n\n", ""), ("It is\n\nwarm", "It is"), ("<th\n\nwarm", "<th")]
)
async def test_stop_strings_count_where_there_is_no_thought(served: Served, reply: str, content: str) -> None:
    served.engine.reply = lambda request: [*encode(reply), EOS]
    choice = (await chat(served, stop=["\n\n"])).json()["choices"][0]
    assert (choice["message"]["content"], choice["stop_reason"]) == (content, "\n\n")


async def test_a_prompt_that_has_begun_the_thought(served: Served) -> None:
    use_template(served, REASONING_TEMPLATES["qwen3_thinking"])
    served.engine.reply = lambda request: [*encode(ANSWER.removeprefix("<think>\n")), EOS]
    assert (await chat(served)).json()["choices"][0]["message"]["reasoning"] == THOUGHT
    assert streamed(events(await chat(served, stream=True)))[:2] == (THOUGHT, "It is\nwarm. ")
    served.engine.reply = lambda request: [*encode("Never an end"), EOS]
    message = (await chat(served)).json()["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == ("Never an end", "")


async def test_no_thought_where_the_template_ended_it(served: Served) -> None:
    served.engine.reply = lambda request: [*encode("<think> is a word"), EOS]
    for asked in ({"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"}):
        body = (await chat(served, **asked)).json()
        assert sent_prompt(served).endswith("<think>\n\n</think>\n\n")
        assert body["choices"][0]["message"]["content"] == "<think> is a word"
        assert "completion_tokens_details" not in body["usage"]


async def test_the_effort_is_the_template_s(served: Served) -> None:
    use_template(served, REASONING_TEMPLATES["gpt_oss"])
    await chat(served, reasoning_effort="high")
    assert sent_prompt(served).startswith("Reasoning: high")
    await chat(served, reasoning_effort="high", chat_template_kwargs={"reasoning_effort": "low"})
    assert sent_prompt(served).startswith("Reasoning: low")


async def test_calls_come_after_the_thought(served: Served) -> None:
    served.engine.reply = lambda request: [*encode(f"<think>\n{THOUGHT}\n</think>\n\n{CALLS}"), EOS]
    choice = (await chat(served, tools=[WEATHER, NOW])).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["reasoning"] == THOUGHT
    assert choice["message"]["content"] == 'Let me "see".'
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["get_weather", "now"]
    kinds = streamed(events(await chat(served, tools=[WEATHER, NOW], stream=True)))[2]
    assert kinds == [*(["reasoning"] * kinds.count("reasoning")), *kinds[kinds.count("reasoning") :]]
    assert kinds[-1] == "tool_calls"


async def test_marks_that_are_special_tokens_are_seen(served: Served) -> None:
    tokenizer = Tokenizer.from_str(served.services.text.tokenizer.to_str())
    tokenizer.add_tokens([AddedToken(mark, special=True) for mark in ("<think>", "</think>", "<|other|>")])
    text = TextProcessor(tokenizer, ChatTemplate(QWEN3, {}), {"eos_token": "<|im_end|>"})
    object.__setattr__(served.services, "text", text)
    ids = tokenizer.encode("<think>so<|other|></think>It is.<|other|>", add_special_tokens=False).ids
    served.engine.reply = lambda request: [*ids, EOS]
    body = (await chat(served)).json()
    message = body["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == ("so", "It is.")
    end = tokenizer.token_to_id("</think>")
    assert end is not None
    assert body["usage"]["completion_tokens_details"]["reasoning_tokens"] == ids.index(end) + 1


async def test_a_thought_can_be_sent_back(served: Served) -> None:
    message = (await chat(served)).json()["choices"][0]["message"]
    for names in ({"reasoning"}, {"reasoning_content"}, {"reasoning", "reasoning_content"}):
        kept = {key: value for key, value in message.items() if not key.startswith("reasoning") or key in names}
        response = await chat(served, messages=[*HELLO, kept], add_generation_prompt=False)
        assert response.status_code == 200, response.text
        assert sent_prompt(served).rstrip().endswith(f"<think>\n{THOUGHT}\n</think>\n\nIt is\nwarm. <|im_end|>")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"max_reasoning_tokens": -1}, "max_reasoning_tokens"),
        ({"max_reasoning_tokens": "many"}, "max_reasoning_tokens"),
        ({"include_reasoning": 3}, "include_reasoning"),
        ({"reasoning_effort": "x" * 65}, "reasoning_effort"),
        ({"messages": [HELLO[0] | {"reasoning": "so"}]}, "messages.0.reasoning"),
        ({"messages": [HELLO[0] | {"reasoning_content": "so"}]}, "messages.0.reasoning_content"),
        ({"messages": [HELLO[0], {"role": "assistant", "content": "a", "reasoning": ["so"]}]}, "messages.1.reasoning"),
    ],
)
async def test_refusals_name_the_field(served: Served, body: dict[str, Any], param: str) -> None:
    response = await chat(served, **body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert not served.engine.requests


async def test_the_format_in_force_is_told(served: Served, tmp_path: Path) -> None:
    await served.add_adapter(tmp_path, "mine")
    for path in (f"/v1/models/{BASE}", "/v1/adapters/mine"):
        assert (await served.client.get(path)).json()["reasoning_format"] == "think"
    use_template(served, CHAT_TEMPLATE)
    assert (await served.client.get(f"/v1/models/{BASE}")).json()["reasoning_format"] is None


async def test_a_budget_and_a_grammar_reach_the_engine_where_there_may_be_a_thought(served: Served) -> None:
    await chat(served)
    assert served.engine.requests[-1].sampling.grammar is None
    await chat(served, max_reasoning_tokens=7)
    sampling = served.engine.requests[-1].sampling
    assert sampling.grammar is not None
    assert sampling.thought is not None
    assert (sampling.thought.most, sampling.thought.begin, sampling.thought.end) == (7, "<think>", "</think>")
    await chat(served, response_format={"type": "json_object"})
    sampling = served.engine.requests[-1].sampling
    assert sampling.grammar is not None
    assert "@answer" in sampling.grammar.thought
    off = {"chat_template_kwargs": {"enable_thinking": False}, "max_reasoning_tokens": 7}
    await chat(served, **off)
    sampling = served.engine.requests[-1].sampling
    assert (sampling.grammar, sampling.thought) == (None, None)
    use_template(served, CHAT_TEMPLATE)
    assert (await chat(served, max_reasoning_tokens=7)).status_code == 200


# --- with a real engine --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(model_dir: Path, cache_dir: Path) -> Engine:
    return load_engine(model_dir, cache_dir, max_model_len=384)


@pytest.fixture
async def following(tmp_path: Path, engine: Engine) -> AsyncIterator[Served]:
    kind = type("Following", (FollowingEngine,), {"engine": engine, "arrived": {}})
    async with serving(tmp_path, engine=kind) as served:
        use_template(served, CHAT_TEMPLATE + "{% if add_generation_prompt %}{{ '<think>\n' }}{% endif %}")
        yield served


@pytest.fixture
def client(following: Served) -> openai.AsyncOpenAI:
    http = httpx2.AsyncClient(transport=httpx2.ASGITransport(following.app))
    return openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", max_retries=0, http_client=http)


@pytest.mark.parametrize("most", [0, 12, 30])
async def test_a_thought_ends_with_its_budget_and_an_answer_follows(following: Served, most: int) -> None:
    schema = {"type": "object", "properties": {"warm": {"type": "boolean"}}, "required": ["warm"]}
    for asked in ({}, {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}}):
        body = {"max_reasoning_tokens": most, "max_tokens": 90, "temperature": 1.5, "seed": 3} | asked
        whole = (await chat(following, **body)).json()
        message, usage = whole["choices"][0]["message"], whole["usage"]
        close = len(encode("\n</think>\n\n"))
        assert usage["completion_tokens_details"]["reasoning_tokens"] <= max(most, close) + 3
        assert message["content"]
        if asked and whole["choices"][0]["finish_reason"] == "stop":
            assert jsonschema_rs.is_valid(schema, json.loads(message["content"]))
        thought, content, _ = streamed(events(await chat(following, stream=True, **body)))
        assert (thought, content) == (message.get("reasoning", ""), message["content"])


async def test_required_calls_after_a_thought(following: Served, client: openai.AsyncOpenAI) -> None:
    use_template(following, "{% if tools %}Call! {% endif %}" + following.services.text.chat_template.source)  # type: ignore[union-attr]
    tools: Any = [STRICT]
    answer = await client.chat.completions.create(
        model=BASE,
        messages=HELLO,
        tools=tools,
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=200,
        temperature=1.5,
        seed=1,
        extra_body={"max_reasoning_tokens": 20},
    )
    message = answer.choices[0].message
    assert message.model_extra is not None
    assert message.model_extra["reasoning"]
    assert message.tool_calls
    for call in message.tool_calls:
        assert call.type == "function"
        assert jsonschema_rs.is_valid(WEATHER["function"]["parameters"], json.loads(call.function.arguments))
