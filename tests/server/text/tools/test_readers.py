"""Readers of tool calls: each format's own text, wherever it is cut."""

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.text.tools.source import Arguments, Begin, Event, Parser, Text
from server.text.tools.table import FORMATS

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "tags": {"type": "array"}},
    "required": ["city"],
}
PARAMETERS: dict[str, dict[str, Any]] = {"get_weather": WEATHER, "now": {"type": "object", "properties": {}}}
DEEPSEEK = (
    "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>{}<｜tool▁call▁end｜>\n"
    "<｜tool▁call▁begin｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
)

# How models of each family write get_weather(city="Rome", days=2) and then now().
WRITTEN: list[tuple[str, str]] = [
    (
        "hermes",
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome", "days": 2}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    ),
    (
        "hermes",
        '<tool_call>{"arguments": {"city": "Rome", "days": 2}, "name": "get_weather"}</tool_call>'
        '<tool_call>{"name": "now"}</tool_call>',
    ),
    (
        "hermes",
        '<tool_call>{"type": "function", "function": {"name": "get_weather", "arguments": '
        '"{\\"city\\": \\"Rome\\", \\"days\\": 2}"}}</tool_call><tool_call>{"name": "now", "parameters": null}',
    ),
    (
        "llama3_json",
        '{"name": "get_weather", "parameters": {"city": "Rome", "days": 2}}; {"name": "now", "parameters": {}}',
    ),
    (
        "llama3_json",
        '<|python_tag|>{"type": "function", "name": "get_weather", "parameters": {"city": "Rome", "days": 2}};'
        '{"name": "now"}',
    ),
    ("pythonic", "[get_weather(city='Rome', days=2), now()]"),
    ("lfm", '<|tool_call_start|>[get_weather(city="Rome", days=2), now()]<|tool_call_end|>'),
    (
        "mistral",
        '[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Rome", "days": 2}}, '
        '{"name": "now", "arguments": {}}]',
    ),
    ("mistral_args", '[TOOL_CALLS]get_weather[ARGS]{"city": "Rome", "days": 2}[TOOL_CALLS]now[ARGS]{}'),
    (
        "mistral_args",
        '[TOOL_CALLS]get_weather[CALL_ID]a1b2c3d4e[ARGS]{"city": "Rome", "days": 2}[TOOL_CALLS]now{}',
    ),
    (
        "qwen3_coder",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nRome\n</parameter>\n<parameter=days>\n2\n</parameter>\n"
        "</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
    ),
    (
        "granite",
        '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Rome", "days": 2}}, '
        '{"name": "now", "arguments": {}}]',
    ),
    (
        "phi4",
        'functools[{"name": "get_weather", "arguments": {"city": "Rome", "days": 2}}, {"name": "now"}]',
    ),
    (
        "phi4",
        '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Rome", "days": 2}},{"name":"now"}]<|/tool_call|>',
    ),
    (
        "glm",
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n<arg_key>days</arg_key>\n"
        "<arg_value>2</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>",
    ),
    (
        "deepseek",
        DEEPSEEK.format(
            'function<｜tool▁sep｜>get_weather\n```json\n{"city": "Rome", "days": 2}\n```',
            "function<｜tool▁sep｜>now\n```json\n{}\n```",
        ),
    ),
    (
        "deepseek",
        DEEPSEEK.format('get_weather<｜tool▁sep｜>{"city": "Rome", "days": 2}', "now<｜tool▁sep｜>{}"),
    ),
    (
        "gemma",
        "<start_function_call>call:get_weather{city:<escape>Rome<escape>,days:2}<end_function_call>"
        "<start_function_call>call:now{}<end_function_call>",
    ),
    (
        "gemma4",
        '<|tool_call>call:get_weather{city:<|"|>Rome<|"|>,days:2}<tool_call|><|tool_call>call:now{}<tool_call|>',
    ),
    (
        "harmony",
        '<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{"city": "Rome", "days": 2}<|call|>'
        "<|start|>assistant<|channel|>commentary to=functions.now<|message|>{}<|call|>",
    ),
    (
        "harmony",
        ' to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Rome", "days": 2}<|call|>'
        "<|start|>assistant to=functions.now<|channel|>commentary json<|message|>{}",
    ),
    (
        "deepseek_dsml",
        '<｜DSML｜function_calls>\n<｜DSML｜invoke name="get_weather">\n'
        '<｜DSML｜parameter name="city" string="true">Rome</｜DSML｜parameter>\n'
        '<｜DSML｜parameter name="days" string="false">2</｜DSML｜parameter>\n</｜DSML｜invoke>\n'
        '<｜DSML｜invoke name="now">\n</｜DSML｜invoke>\n</｜DSML｜function_calls>',
    ),
    (
        "kimi",
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
        '{"city": "Rome", "days": 2}<|tool_call_end|><|tool_call_begin|>functions.now:1<|tool_call_argument_begin|>'
        "{}<|tool_call_end|><|tool_calls_section_end|>",
    ),
    (
        "kimi",
        "<|tool_calls_section_begin|>\n<|tool_call_begin|> get_weather:12 <|tool_call_argument_begin|>"
        ' {"city": "Rome", "days": 2} <|tool_call_end|>\n<|tool_call_begin|>now<|tool_call_argument_begin|>{}',
    ),
    (
        "minimax",
        '<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Rome</parameter>\n'
        '<parameter name="days">2</parameter>\n</invoke>\n<invoke name="now">\n</invoke>\n</minimax:tool_call>',
    ),
    (
        "minimax",
        '<minimax:tool_call><invoke name="get_weather">{"city": "Rome", "days": 2}</invoke></minimax:tool_call>'
        '<minimax:tool_call><invoke name="now">{}</invoke></minimax:tool_call>',
    ),
    (
        "minimax_m3",
        ']<]minimax[>[<tool_call>\n]<]minimax[>[<invoke name="get_weather">]<]minimax[>[<city>Rome]<]minimax[>[</city>'
        "]<]minimax[>[<days>2]<]minimax[>[</days>]<]minimax[>[</invoke>\n"
        ']<]minimax[>[<invoke name="now">]<]minimax[>[</invoke>\n]<]minimax[>[</tool_call>',
    ),
    (
        "tool_calls",
        '<tool_calls>[{"name": "get_weather", "arguments": {"city": "Rome", "days": 2}, "id": "0"}, '
        '{"name": "now", "arguments": {}}]</tool_calls>',
    ),
    (
        "tool_calls",
        '<tool_calls>\n{"name": "get_weather", "arguments": {"city": "Rome", "days": 2}}\n'
        '{"name": "now", "arguments": {}}\n</tool_calls>',
    ),
    (
        "nemotron",
        '<TOOLCALL>[{"name": "get_weather", "arguments": {"city": "Rome", "days": 2}}, {"name": "now"}]</TOOLCALL>',
    ),
    (
        "cohere",
        '<|START_ACTION|>[\n    {"tool_call_id": "0", "tool_name": "get_weather", "parameters": {"city": "Rome", '
        '"days": 2}},\n    {"tool_call_id": "1", "tool_name": "now", "parameters": {}}\n]<|END_ACTION|>',
    ),
    (
        "xlam",
        '[{"name": "get_weather", "arguments": {"city": "Rome", "days": 2}}, {"name": "now", "arguments": {}}]',
    ),
    (
        "seed",
        "<seed:tool_call>\n<function=get_weather>\n<parameter=city>Rome</parameter>\n<parameter=days>2</parameter>\n"
        "</function>\n</seed:tool_call>\n<seed:tool_call>\n<function=now>\n</function>\n</seed:tool_call>",
    ),
    (
        "minicpm",
        '<|tool_call_start|>\n```python\nget_weather(city="Rome",days=2)\nnow()\n```\n<|tool_call_end|>\n',
    ),
    (
        "olmo3",
        "<function_calls>\nget_weather(city='Rome', days=2)\nnow()\n</function_calls>",
    ),
    (
        "deepseek_dsml",
        '<｜DSML｜tool_calls>\n<｜DSML｜invoke name="get_weather">\n{"city": "Rome", "days": 2}\n</｜DSML｜invoke>\n'
        '<｜DSML｜invoke name="now">\n{}\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>',
    ),
]


def read(name: str, *pieces: str, ends: bool = True, calls_only: bool = False) -> list[Event]:
    """All events, text and arguments that follow each other joined; of an answer that `ends`, or is cut short."""
    parser = Parser(FORMATS[name].reader, PARAMETERS, calls_only=calls_only)
    events = [event for piece in pieces for event in parser.feed(piece)]
    joined: list[Event] = []
    for event in [*events, *parser.feed("", last=True, cut=not ends)]:
        match joined[-1] if joined else None, event:
            case Text(before), Text(text):
                joined[-1] = Text(before + text)
            case Arguments(before), Arguments(text):
                joined[-1] = Arguments(before + text)
            case _:
                joined.append(event)
    return joined


def calls(events: list[Event]) -> list[tuple[str, Any]]:
    """Names and arguments."""
    found: list[tuple[str, Any]] = []
    for event in events:
        if isinstance(event, Begin):
            found.append((event.name, None))
        elif isinstance(event, Arguments):
            found[-1] = (found[-1][0], json.loads(event.text))
    return found


def cut(text: str, at: list[int]) -> list[str]:
    """The text, cut at these places."""
    bounds = [0, *sorted(place % (len(text) + 1) for place in at), len(text)]
    return [text[a:b] for a, b in pairwise(bounds)]


def test_every_format_is_tested() -> None:
    assert {name for name, _ in WRITTEN} == set(FORMATS)


@pytest.mark.parametrize(("name", "text"), WRITTEN)
def test_calls_are_read_as_models_write_them(name: str, text: str) -> None:
    events = read(name, text)
    assert calls(events) == [("get_weather", {"city": "Rome", "days": 2}), ("now", {})]
    assert not any(isinstance(event, Text) for event in events)


@pytest.mark.parametrize(("name", "text"), WRITTEN)
@settings(max_examples=25, deadline=None)
@given(at=st.lists(st.integers(0, 10_000), max_size=12), before=st.sampled_from(["", "Let me see.\n\n", " <too"]))
def test_a_cut_changes_nothing(name: str, text: str, at: list[int], before: str) -> None:
    whole = before + text
    assert read(name, *cut(whole, at)) == read(name, whole) == read(name, *whole)
    if FORMATS[name].frame.marker:
        shown = [event.text for event in read(name, whole) if isinstance(event, Text)]
        assert "".join(shown) == before.rstrip()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=60, deadline=None)
@given(
    arguments=st.dictionaries(st.sampled_from(["city", "days", "tags"]), VALUES),
    at=st.lists(st.integers(0, 10_000), max_size=8),
)
def test_any_arguments_in_the_format_s_frame(name: str, arguments: dict[str, Any], at: list[int]) -> None:
    """Braces, quotes, markers, any characters: as a grammar has them written."""
    frame = FORMATS[name].frame
    written = json.dumps(arguments, ensure_ascii=False)
    call = frame.head + "get_weather" + frame.middle + written + frame.tail
    text = frame.begin + call + frame.separator + call + frame.end
    assert calls(read(name, *cut(text, at))) == [("get_weather", arguments)] * 2


@settings(max_examples=150, deadline=None)
@given(
    city=st.text(max_size=20),
    tags=st.lists(st.text(max_size=6), max_size=3),
    at=st.lists(st.integers(0, 999), max_size=6),
)
def test_python_s_literals_of_any_text(city: str, tags: list[str], at: list[int]) -> None:
    text = f"[get_weather(city={city!r}, tags={tags!r}, days=None)]"
    assert calls(read("pythonic", *cut(text, at))) == [("get_weather", {"city": city, "tags": tags, "days": None})]


@pytest.mark.parametrize("name", ["qwen3_coder", "glm", "minimax"])
@settings(max_examples=80, deadline=None)
@given(city=st.text(max_size=20).filter(lambda text: "</" not in text), at=st.lists(st.integers(0, 999), max_size=6))
def test_bare_text_stays_text_where_the_schema_says_so(name: str, city: str, at: list[int]) -> None:
    pair = {
        "qwen3_coder": "<function=get_weather><parameter=city>\n{}\n</parameter>"
        "<parameter=tags>[1, {{}}]</parameter></function>",
        "glm": "get_weather<arg_key>city</arg_key><arg_value>{}</arg_value><arg_key>tags</arg_key>"
        "<arg_value>[1, {{}}]</arg_value>",
        "minimax": '<invoke name="get_weather"><parameter name="city">{}</parameter>'
        '<parameter name="tags">[1, {{}}]</parameter></invoke>',
    }
    block = "minimax:tool_call" if name == "minimax" else "tool_call"
    text = f"<{block}>{pair[name].format(city)}</{block}>"
    assert calls(read(name, *cut(text, at))) == [("get_weather", {"city": city, "tags": [1, {}]})]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "text",
    ["", "Hello.", "  two words \n", '{"a": 1}', "[1, 2]", "< tool", '{"name": "Bob", "age": 3}', "[f(x)", "x = {"],
)
def test_what_is_no_call_is_text_as_it_is(name: str, text: str) -> None:
    assert read(name, *text) == ([Text(text)] if text else [])


@pytest.mark.parametrize("name", [name for name in FORMATS if FORMATS[name].frame.marker and name != "deepseek"])
def test_a_marker_without_a_call_is_text(name: str) -> None:
    text = f"See {FORMATS[name].frame.marker} ! and so on"
    assert read(name, *text) == [Text(text)]


@pytest.mark.parametrize(("name", "text"), WRITTEN)
def test_an_answer_cut_short_is_no_fault(name: str, text: str) -> None:
    """The arguments are what there was of them, as OpenAI has it."""
    for length in range(len(text)):
        names = [event.name for event in read(name, text[:length]) if isinstance(event, Begin)]
        assert names == ["get_weather", "now"][: len(names)]


@pytest.mark.parametrize(("name", "text"), WRITTEN)
def test_no_part_of_a_call_that_is_cut_short_is_text(name: str, text: str) -> None:
    marker = FORMATS[name].frame.marker
    for length in range(len(text)):
        events = read(name, text[:length], ends=False)
        shown = [event.text for event in events if isinstance(event, Text)]
        if marker or any(isinstance(event, Begin) for event in events):
            assert all(text.startswith(part) or marker.startswith(part) for part in shown)  # before it is whole
            assert not any(marker in part for part in shown if marker)
        else:
            assert shown == [text[:length]] or not text[:length]


@pytest.mark.parametrize("name", FORMATS)
def test_calls_and_nothing_else_are_cut_short_without_text(name: str) -> None:
    frame = FORMATS[name].frame
    call = f'{frame.head}get_weather{frame.middle}{{"city": "Rome"}}{frame.tail}'
    text = frame.begin + call + frame.separator + call + frame.end
    for length in range(len(text)):
        events = read(name, text[:length], ends=False, calls_only=True)
        assert not any(isinstance(event, Text) for event in events)
        if length < len(frame.begin):  # in the middle of a character
            half = text[:length] + "\N{REPLACEMENT CHARACTER}"
            assert Parser(FORMATS[name].reader, PARAMETERS, calls_only=True).feed(half, last=True, cut=True) == []


@pytest.mark.parametrize("text", ["I look", "a < b", 'See <tool_call> ! {"a"', "<tool_call>no", "1 <tool"])
def test_text_that_is_cut_short_stays_text(text: str) -> None:
    assert read("hermes", *text, ends=False) == [Text(text)]


def test_nesting_without_end_is_no_call() -> None:
    text = "<tool_call>" + '{"function": ' * 5000
    assert read("hermes", text) == [Text(text)]


def test_arguments_come_in_pieces_before_their_end() -> None:
    parser = Parser(FORMATS["hermes"].reader, PARAMETERS)
    assert parser.feed('<tool_call>{"name": "get_weather", "arguments": {"city": "R') == [
        Begin("get_weather"),
        Arguments('{"city": "R'),
    ]
    assert parser.feed('ome"') == [Arguments('ome"')]
    assert parser.feed("}}") == [Arguments("}")]


def test_lists_and_objects_in_tags() -> None:
    mark = "]<]minimax[>["
    text = f"""{mark}<tool_call>{mark}<invoke name="get_weather">{mark}<tags>{mark}<item>a{mark}</item>\
{mark}<item>{mark}<n>1{mark}</n>{mark}<on>true{mark}</on>{mark}</item>{mark}</tags>{mark}</invoke>{mark}</tool_call>"""
    assert calls(read("minimax_m3", *text)) == [("get_weather", {"tags": ["a", {"n": 1, "on": True}]})]


def test_text_around_calls() -> None:
    text = 'I look. <tool_call>{"name": "now", "arguments": {}}</tool_call>\n Done.\n'
    assert read("hermes", *text) == [Text("I look."), Begin("now"), Arguments("{}"), Text("Done.")]


def test_what_a_model_says_beside_its_calls() -> None:
    said = "<|channel|>commentary<|message|>I look.<|end|>"
    call = "<|start|>assistant<|channel|>commentary to=functions.now <|constrain|>json<|message|>{}<|call|>"
    assert read("harmony", said + call) == [Text("I look."), Begin("now"), Arguments("{}")]
    assert read("harmony", said) == [Text("I look.")]
