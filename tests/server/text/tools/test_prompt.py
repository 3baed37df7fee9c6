"""Tools, calls and results in prompts: through templates that know tools, each its own way, and through others."""

import json
from typing import Any

import pytest
from tokenizers import Tokenizer

from server.text.chat_template import ChatTemplate
from server.text.processor import TextProcessor
from server.text.tools.prompt import for_template
from server.text.tools.table import FORMATS, format_of, knows_tools
from tests.support.templates import TOOL_TEMPLATES
from tests.support.tiny import CHAT_TEMPLATE, _tokenizer

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {
    "id": "call_0123456789",
    "type": "function",
    "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'},
}
HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": "How is Rome?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "sunny", "tool_call_id": "call_0123456789"},
]


async def rendered(template: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]]) -> str:
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = Tokenizer.from_str(_tokenizer().backend_tokenizer.to_str())
    text = TextProcessor(tokenizer, ChatTemplate(template, tokens), tokens)
    return await text.render_chat(
        messages,
        add_generation_prompt=True,
        continue_final_message=False,
        arguments={},
        max_tokens=10**6,
        tools=tools,
    )


@pytest.mark.parametrize(
    ("name", "tool_format"),
    [
        ("qwen2.5", "hermes"),
        ("llama3.1", "llama3_json"),
        ("llama3.2_pythonic", "pythonic"),
        ("mistral", "mistral"),
        ("qwen3_coder", "qwen3_coder"),
        ("deepseek_v3.1", "deepseek"),
        ("phi4_mini", "phi4"),
        ("granite3", "granite"),
        ("gemma4", "gemma4"),
        ("gpt_oss", "harmony"),
        ("deepseek_v3.2", "deepseek_dsml"),
        ("kimi_k2", "kimi"),
        ("olmo3", "olmo3"),
        ("hunyuan", "tool_calls"),
        ("nemotron_nano", "nemotron"),
        ("command_r7b", "cohere"),
        ("xlam", "xlam"),
        ("seed_oss", "seed"),
        ("minimax_m2", "minimax"),
        ("minimax_m3", "minimax_m3"),
        ("minicpm3", "minicpm"),
    ],
)
def test_a_format_is_recognised_from_the_template(name: str, tool_format: str) -> None:
    assert format_of(TOOL_TEMPLATES[name]).name == tool_format
    assert format_of(TOOL_TEMPLATES[name], "lfm").name == "lfm"


@pytest.mark.parametrize(
    ("sign", "tool_format"),
    [
        ("<|tool_list_start|>[<|tool_list_end|>", "lfm"),
        ("<tool_call><arg_key>", "glm"),
        ("<start_function_declaration><start_function_call>", "gemma"),
        ("<|start_of_role|>available_tools <|tool_call|>", "granite"),
        ("<|start_of_role|> <tool_call>", "hermes"),
        ("[AVAILABLE_TOOLS] [TOOL_CALLS] [ARGS]", "mistral_args"),
        ("something else", "hermes"),
    ],
)
def test_marks_of_other_families(sign: str, tool_format: str) -> None:
    assert format_of(f"{{% for t in tools %}}{sign}{{% endfor %}}").name == tool_format


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen2.5", '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'),
        ("llama3.1", '{"name": "get_weather", "parameters": {"city": "Rome"}}<|eot_id|>'),
        ("llama3.2_pythonic", '[get_weather(city="Rome")]<|eot_id|>'),
        ("mistral", '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Rome"}, "id": "'),
        ("qwen3_coder", "<tool_call>\n<function=get_weather>\n<parameter=city>\nRome\n</parameter>\n</function>"),
        ("deepseek_v3.1", 'get_weather<｜tool▁sep｜>{"city": "Rome"}<｜tool▁call▁end｜>'),
        ("phi4_mini", '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Rome"}}]<|/tool_call|><|end|>'),
        ("granite3", '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Rome"}}]<|end_of_text|>'),
        ("gemma4", '<|tool_call>call:get_weather{city:<|"|>Rome<|"|>}<tool_call|>'),
        ("gpt_oss", ' to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Rome"}<|call|>'),
        ("deepseek_v3.2", '<｜DSML｜parameter name="city" string="true">Rome</｜DSML｜parameter>'),
        ("hunyuan", '<tool_calls>[{"name": "get_weather", "arguments": {"city": "Rome"}}]</tool_calls>'),
        ("nemotron_nano", '<TOOLCALL>[{"name": "get_weather", "arguments": {"city": "Rome"}}]</TOOLCALL>'),
        ("command_r7b", '{"tool_call_id": "0", "tool_name": "get_weather", "parameters": {"city": "Rome"}}'),
        ("xlam", '[{"name": "get_weather", "arguments": {"city": "Rome"}}]'),
        ("seed_oss", "<seed:tool_call>\n<function=get_weather>\n<parameter=city>Rome</parameter>\n</function>\n"),
        ("olmo3", '<function_calls>\nget_weather(city="Rome")\n</function_calls>'),
        ("kimi_k2", '<|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{"city": "Rome"}<|'),
        ("minimax_m2", '<invoke name="get_weather">\n<parameter name="city">Rome</parameter>\n</invoke>'),
        ("minimax_m3", "]<]minimax[>[<city>Rome]<]minimax[>[</city>]<]minimax[>[</invoke>"),
        ("minicpm3", '<|tool_call_start|>\n```python\nget_weather(city="Rome")\n```\n<|tool_call_end|>\n'),
    ],
)
async def test_history_and_tools_in_the_template_s_own_way(name: str, expected: str) -> None:
    prompt = await rendered(TOOL_TEMPLATES[name], HISTORY, [WEATHER])
    assert expected in prompt
    assert "sunny" in prompt
    assert "The weather." in prompt
    assert "The weather." not in await rendered(TOOL_TEMPLATES[name], HISTORY, [])


@pytest.mark.parametrize("template", [*TOOL_TEMPLATES, None])
async def test_results_come_in_the_order_of_their_calls(template: str | None) -> None:
    source = CHAT_TEMPLATE if template is None else TOOL_TEMPLATES[template]
    calls = {"role": "assistant", "content": "", "tool_calls": [CALL | {"id": id_} for id_ in ("call_a", "call_b")]}
    of_a, of_b = ({"role": "tool", "content": f"<{x}>", "tool_call_id": f"call_{x}"} for x in "ab")
    in_order = await rendered(source, [HISTORY[0], calls, of_a, of_b], [WEATHER])
    assert in_order.index("<a>") < in_order.index("<b>")
    assert await rendered(source, [HISTORY[0], calls, of_b, of_a], [WEATHER]) == in_order


async def test_ids_that_tell_the_model_the_function_are_made_of_it() -> None:
    """Kimi's template writes a call as its id and its arguments."""
    calls = [CALL, CALL | {"id": "b", "function": {"name": "now", "arguments": "{}"}}]
    results = [HISTORY[2], {"role": "tool", "content": "noon", "tool_call_id": "b"}]
    chat = [HISTORY[0], HISTORY[1] | {"tool_calls": calls}, *results, *HISTORY]
    prompt = await rendered(TOOL_TEMPLATES["kimi_k2"], chat, [WEATHER])
    begun = [part.partition("<|tool_call_argument_begin|>")[0] for part in prompt.split("<|tool_call_begin|>")[1:]]
    assert begun == ["functions.get_weather:0", "functions.now:1", "functions.get_weather:2"]
    returned = [part.partition("<")[0] for part in prompt.split("## Return of ")[1:]]
    assert returned == [f"{id_}\n{text}" for id_, text in zip(begun, ["sunny", "noon", "sunny"], strict=True)]


async def test_results_have_the_name_of_their_function() -> None:
    """Hermes's and FunctionGemma's templates refuse them without; OpenAI's clients leave it out."""
    source = (
        "{% for m in messages %}{% for call in m.tool_calls or [] %}{{ call.function.name }}{% endfor %}"
        "{% if m.role == 'tool' %}{% if m.name is not defined %}{{ raise_exception('name') }}{% endif %}"
        "<{{ m.name }}: {{ m.content }}>{% endif %}{% endfor %}{{ tools | length }}"
    )
    assert await rendered(source, HISTORY, [WEATHER]) == "get_weather<get_weather: sunny>1"
    given = [*HISTORY[:2], HISTORY[2] | {"name": "mine"}]
    assert await rendered(source, given, [WEATHER]) == "get_weather<mine: sunny>1"
    again = json.loads(json.dumps(HISTORY[1:3]).replace("get_weather", "get_time"))  # of the same id
    named = "get_weather<get_weather: sunny>get_time<get_time: sunny>1"
    assert await rendered(source, [*HISTORY, *again], [WEATHER]) == named


ONE_CALL = """{% for message in messages %}{% if message.tool_calls %}\
{% if not message.tool_calls|length == 1 %}{{ raise_exception("one call at once") }}{% endif %}\
{% set call = message.tool_calls[0].function %}[{{ message.content }}|{{ call.name }}|{{ call.arguments | tojson }}]\
{% else %}[{{ message.role }}|{{ message.content }}]{% endif %}{% endfor %}{{ tools | length }}"""


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("source", [ONE_CALL, ONE_CALL.replace("message.tool_calls[0]", "message['tool_calls'][0]")])
async def test_templates_of_one_call_get_several_one_by_one(source: str, named: bool) -> None:
    """Llama's refuses others, gpt-oss's passes over them; their models write several all the same."""
    functions = [{"name": name, "arguments": f'{{"city": "{name}"}}'} for name in ("a", "b")]
    calls = [CALL | {"id": f"call_{each['name']}", "function": each} for each in functions]
    ids: list[dict[str, Any]] = [{"tool_call_id": f"call_{name}"} if named else {} for name in "ab"]
    results = [{"role": "tool", "content": f"<{name}>"} | id_ for name, id_ in zip("ab", ids, strict=True)]
    answer = {"role": "assistant", "content": "I look.", "tool_calls": calls}
    history = [HISTORY[0], answer, *(results[::-1] if named else results), {"role": "assistant", "content": "Fine."}]
    assert await rendered(source, history, [WEATHER]) == (
        '[user|How is Rome?][I look.|a|{"city": "a"}][tool|<a>][|b|{"city": "b"}][tool|<b>][assistant|Fine.]1'
    )
    late = [*history[:3], {"role": "tool", "content": "<c>", "tool_call_id": "call_c"}, history[-1]]
    assert "<c>][assistant|Fine.]" in await rendered(source, late, [WEATHER])


async def test_results_of_no_known_call_stay_where_they_are() -> None:
    calls = {"role": "assistant", "content": "", "tool_calls": [CALL | {"id": "call_a"}]}
    for ids in (["call_x", "call_a"], [None, "call_a"]):
        named = [{} if id_ is None else {"tool_call_id": id_} for id_ in ids]
        results = [{"role": "tool", "content": f"<{i}>"} | name for i, name in enumerate(named)]
        prompt = await rendered(CHAT_TEMPLATE, [HISTORY[0], calls, *results], [])
        assert prompt.index("<0>") < prompt.index("<1>")
        assert "<0>" in await rendered(CHAT_TEMPLATE, [HISTORY[0], *results], [])


async def test_mistral_s_ids_have_nine_characters_and_still_belong_together() -> None:
    prompt = await rendered(TOOL_TEMPLATES["mistral"], HISTORY, [])
    [id_] = {part.split('"')[0] for part in prompt.split('"id": "')[1:]}
    assert len(id_) == 9
    assert f'"call_id": "{id_}"' in prompt
    kept = [
        HISTORY[0],
        HISTORY[1] | {"tool_calls": [CALL | {"id": "a1b2c3d4e"}]},
        HISTORY[2] | {"tool_call_id": "a1b2c3d4e"},
    ]
    assert prompt.replace(id_, "a1b2c3d4e") == await rendered(TOOL_TEMPLATES["mistral"], kept, [])


@pytest.mark.parametrize(
    "template", ["{{ '<tools>' }}{{ messages }}", "tools {% if x %}{% endif %} tools", CHAT_TEMPLATE]
)
def test_the_word_in_a_text_is_no_knowledge(template: str) -> None:
    assert not knows_tools(template)


async def test_a_template_that_knows_no_tools_gets_text() -> None:
    assert format_of(CHAT_TEMPLATE, "mistral").name == "hermes"
    history = [*HISTORY, HISTORY[2] | {"content": "and warm"}]
    prompt = await rendered(CHAT_TEMPLATE, history, [WEATHER])
    system, user, assistant, results, _ = prompt.split("<|im_end|>\n")
    assert system.startswith("<|im_start|>system\n# Tools")
    assert json.dumps(WEATHER) in system
    assert user == "<|im_start|>user\nHow is Rome?"
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    assert assistant == f"<|im_start|>assistant\n{call}"
    assert results == (
        "<|im_start|>user\n<tool_response>\nsunny\n</tool_response>\n<tool_response>\nand warm\n</tool_response>"
    )
    own = [{"role": "system", "content": "Be brief."}, HISTORY[0]]
    assert (await rendered(CHAT_TEMPLATE, own, [WEATHER])).startswith("<|im_start|>system\nBe brief.\n\n# Tools")
    assert "Tools" not in await rendered(CHAT_TEMPLATE, own, [])


@pytest.mark.parametrize("name", FORMATS)
def test_what_was_given_stays_as_it_was(name: str) -> None:
    before = json.dumps(HISTORY)
    for template in ("{{ tools }}", ""):
        for_template(HISTORY, [WEATHER], template, FORMATS[name])
    assert json.dumps(HISTORY) == before
