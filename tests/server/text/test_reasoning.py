"""Thoughts in answers: each format's own text, wherever it is cut; recognised from templates; given back to these."""

import json
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken, Tokenizer

from server.messages.grammar_definition import definition
from server.messages.protocol import Grammar
from server.text.chat_template import ChatTemplate
from server.text.processor import TextProcessor
from server.text.reasoning import (
    REASONING_FORMATS,
    ThoughtTokens,
    any_text,
    ends_in_thought,
    reasoning_of,
    thought_grammar,
    thought_reader,
    with_thoughts,
)
from server.text.tools.grammar import calls_grammar
from server.text.tools.source import Arguments, Begin, Event, Parser, Text, Thought
from server.text.tools.table import FORMATS
from tests.support.templates import REASONING_TEMPLATES, TOOL_TEMPLATES
from tests.support.tiny import CHAT_TEMPLATE, _tokenizer

# How models of each family think "Rome\n or Paris?" and answer "It is\n Rome."
WRITTEN = [
    ("think", "<think>\nRome\n or Paris?\n</think>\n\nIt is\n Rome."),
    ("think", "\n<think>Rome\n or Paris?</think>It is\n Rome."),
    ("minimax_m3", "<mm:think>Rome\n or Paris?</mm:think>It is\n Rome."),
    ("minicpm", "<|thought_start|>\nRome\n or Paris?\n<|thought_end|>\nIt is\n Rome."),
    ("seed", "<seed:think>Rome\n or Paris?</seed:think>\nIt is\n Rome."),
    ("mistral", "[THINK]Rome\n or Paris?[/THINK]It is\n Rome."),
    ("gemma", "<|channel>thought\nRome\n or Paris?\n<channel|>It is\n Rome."),
    (
        "gpt_oss",
        "<|channel|>analysis<|message|>Rome\n or Paris?<|end|>"
        "<|start|>assistant<|channel|>final<|message|>It is\n Rome.",
    ),
    (
        "cohere",
        "<|START_THINKING|>Rome\n or Paris?<|END_THINKING|><|START_RESPONSE|>It is\n Rome.<|END_RESPONSE|>",
    ),
    ("granite", "Here is my thought process: Rome\n or Paris?\n\nHere is my response:\n\nIt is\n Rome."),
    ("granite_response", "<think>Rome\n or Paris?</think><response>It is\n Rome.</response>"),
    ("hunyuan", "<think>\nRome\n or Paris?\n</think>\n<answer>\nIt is\n Rome.\n</answer>"),
]


def read(name: str, *pieces: str, inside: bool | None = None, tools: str | None = None) -> list[Event]:
    """All events, thoughts, text and arguments that follow each other joined."""
    then = any_text if tools is None else FORMATS[tools].reader
    parser = Parser(thought_reader(REASONING_FORMATS[name], inside, then), {})
    found: list[Event] = []
    for i, piece in enumerate(pieces):
        for event in parser.feed(piece, last=i == len(pieces) - 1):
            match found[-1] if found else None, event:
                case (Text(a), Text(b)):
                    found[-1] = Text(a + b)
                case (Thought(a), Thought(b)):
                    found[-1] = Thought(a + b)
                case (Arguments(a), Arguments(b)):
                    found[-1] = Arguments(a + b)
                case _:
                    found.append(event)
    return found


ANSWER: list[Event] = [Thought("Rome\n or Paris?"), Text("It is\n Rome.")]


def test_every_format_is_written_here() -> None:
    assert {name for name, _ in WRITTEN} == set(REASONING_FORMATS)


@pytest.mark.parametrize(("name", "text"), WRITTEN)
def test_a_thought_is_apart_from_its_answer(name: str, text: str) -> None:
    assert read(name, text) == ANSWER
    assert read(name, *text) == ANSWER
    assert read(name, text.partition(REASONING_FORMATS[name].begin)[2], inside=True) == ANSWER


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(WRITTEN), st.sets(st.integers(1, 90), max_size=6))
def test_cuts_do_not_matter(written: tuple[str, str], cuts: set[int]) -> None:
    name, text = written
    places = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    assert read(name, *(text[a:b] for a, b in pairwise(places))) == ANSWER


@pytest.mark.parametrize("name", REASONING_FORMATS)
@pytest.mark.parametrize("text", ["", "It is Rome.", " \n It is ", "< <t [TH Here is my < end", "{}\n"])
def test_an_answer_without_a_thought_stays_as_it_is(name: str, text: str) -> None:
    expected: list[Event] = [Text(text)] if text else []
    assert read(name, text) == read(name, *text) == read(name, *text, inside=False) == expected


@pytest.mark.parametrize("name", REASONING_FORMATS)
def test_a_thought_that_is_cut_short(name: str) -> None:
    reasoning = REASONING_FORMATS[name]
    assert read(name, f"{reasoning.begin} so{reasoning.end[:-1]}") == [Thought(f"so{reasoning.end[:-1]}")]
    assert read(name, reasoning.begin, " \n") == []


def test_calls_come_after_the_thought_only() -> None:
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    text = f"<think>I could call {call}</think>\n\nSo: {call}"
    expected = [Thought(f"I could call {call}"), Text("So:"), Begin("f"), Arguments("{}")]
    assert read("think", text, tools="hermes") == read("think", *text, tools="hermes") == expected
    text = '<think>f?</think>\n\n{"name": "f", "parameters": {}}'
    json_only = Parser(thought_reader(REASONING_FORMATS["think"], None, FORMATS["llama3_json"].reader), {"f": {}})
    assert json_only.feed(text, last=True) == [Thought("f?"), Begin("f"), Arguments("{}")]


@pytest.mark.parametrize(
    ("text", "inside", "count"),
    [
        ("<think>|a|b|</think>|answer|more", None, 4),
        ("<th|ink>|a|</think>| answer", None, 4),
        ("a|b|</think>|answer", True, 3),
        ("a|b", True, 2),
        ("an|swer|</think>", None, 0),
        ("\n|\n|no", None, 0),
        ("a</think>", False, 0),
        ("\n", None, 0),
    ],
)
def test_the_tokens_of_a_thought_are_counted(text: str, inside: bool | None, count: int) -> None:
    counter = ThoughtTokens(REASONING_FORMATS["think"], inside)
    for token in text.split("|"):
        counter.add(token)
    assert counter.count == count


# --- templates ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("qwen3", "think"),
        ("qwen3_thinking", "think"),
        ("deepseek_r1", "think"),
        ("glm4.5", "think"),
        ("magistral", "mistral"),
        ("seed_oss", "seed"),
        ("gemma4", "gemma"),
        ("gpt_oss", "gpt_oss"),
        ("granite3.3", "granite_response"),
    ],
)
def test_a_format_is_recognised_from_the_template(template: str, name: str) -> None:
    found = reasoning_of(REASONING_TEMPLATES[template])
    assert found is not None
    assert found.name == name


@pytest.mark.parametrize("template", [*TOOL_TEMPLATES.values(), CHAT_TEMPLATE])
def test_others_know_no_thoughts(template: str) -> None:
    assert reasoning_of(template) is None


def processor(template: str, reasoning_parser: str = "auto") -> TextProcessor:
    tokenizer = Tokenizer.from_str(_tokenizer().backend_tokenizer.to_str())
    text = TextProcessor(tokenizer, ChatTemplate(template, {"eos_token": "</s>"}), reasoning_parser=reasoning_parser)
    text.close()
    return text


async def rendered(text: TextProcessor, messages: list[dict[str, Any]], **arguments: Any) -> str:
    return await text.render_chat(
        messages,
        add_generation_prompt=messages[-1]["role"] != "assistant",
        continue_final_message=False,
        arguments=arguments,
        max_tokens=10**6,
    )


USER: dict[str, Any] = {"role": "user", "content": "Where? <think>"}
THOUGHT: dict[str, Any] = {"role": "assistant", "content": "Rome.", "reasoning": "Or Paris?"}


@pytest.mark.parametrize(
    ("template", "arguments", "expected"),
    [
        ("qwen3", {}, None),
        ("qwen3", {"enable_thinking": False}, False),
        ("qwen3_thinking", {}, True),
        ("deepseek_r1", {}, True),
        ("glm4.5", {}, None),
        ("glm4.5", {"enable_thinking": False}, False),
        ("gemma4", {}, False),
        ("gemma4", {"enable_thinking": True}, None),
        ("seed_oss", {}, None),
    ],
)
async def test_a_prompt_may_have_begun_the_thought_or_ended_it(
    template: str, arguments: dict[str, Any], expected: bool | None
) -> None:
    text = processor(REASONING_TEMPLATES[template])
    assert text.reasoning_format is not None
    assert ends_in_thought(text.reasoning_format, await rendered(text, [USER], **arguments)) is expected


@pytest.mark.parametrize(
    ("continued", "expected"), [("<think>so", True), ("<think>so</think> it", False), ("It", False)]
)
def test_an_answer_that_goes_on_may_be_within_a_thought(continued: str, expected: bool) -> None:
    assert ends_in_thought(REASONING_FORMATS["think"], f"{continued}", continued) is expected


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("qwen3", "<think>\nOr Paris?\n</think>\n\nRome."),
        ("glm4.5", "<think>Or Paris?</think>\nRome."),
        ("magistral", "[THINK]Or Paris?[/THINK]Rome.</s>"),
        ("seed_oss", "<seed:think>Or Paris?</seed:think>\nRome."),
        ("gemma4", "<|channel>thought\nOr Paris?<channel|>Rome."),
        ("gpt_oss", "<|channel|>analysis<|message|>Or Paris?<|end|><|start|>assistant<|channel|>final<|message|>Rome."),
        ("granite3.3", "<think>Or Paris?</think><response>Rome."),
    ],
)
async def test_thoughts_in_history_in_the_template_s_own_way(template: str, expected: str) -> None:
    text = processor(REASONING_TEMPLATES[template])
    assert expected in await rendered(text, [USER, THOUGHT])
    # What the template does with them is the template's matter: these leave them out.
    assert "Or Paris?" not in await rendered(processor(REASONING_TEMPLATES["deepseek_r1"]), [USER, THOUGHT])
    assert "Or Paris?" not in await rendered(processor(REASONING_TEMPLATES["qwen3"]), [USER, THOUGHT, USER])


async def test_a_template_that_knows_no_thoughts() -> None:
    assert processor(CHAT_TEMPLATE).reasoning_format is None
    assert "Or Paris?" not in await rendered(processor(CHAT_TEMPLATE), [USER, THOUGHT])
    named = processor(CHAT_TEMPLATE, "seed")
    assert "assistant\n<seed:think>Or Paris?</seed:think>\nRome.<|im_end|>" in await rendered(named, [USER, THOUGHT])
    assert processor(REASONING_TEMPLATES["qwen3"], "none").reasoning_format is None
    before = json.dumps(THOUGHT)
    with_thoughts([dict(THOUGHT)], CHAT_TEMPLATE, REASONING_FORMATS["think"])
    assert json.dumps(THOUGHT) == before


# --- grammars ----------------------------------------------------------------------------------------


@cache
def tokenizer_of(name: str, kind: str) -> Tokenizer:
    """The tiny one, with the format's markers as tokens: special, added or none."""
    tokenizer = Tokenizer.from_str(_tokenizer().backend_tokenizer.to_str())
    if kind != "text":
        markers = [each for each in REASONING_FORMATS[name].markers if "Here" not in each]
        tokenizer.add_tokens([AddedToken(marker, special=kind == "special") for marker in markers])
    return tokenizer


CALLS = calls_grammar(
    FORMATS["hermes"].frame, [("now", {"type": "object"})], {}, required=False, several=True, answer=None
)
CALL = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
ASKED = [
    (Grammar("json", '{"type": "integer"}'), "12", "x"),
    (Grammar("regex", "<a>[a-z]{3}"), "<a>abc", "abc"),
    (Grammar("choice", '["yes", "no"]'), "yes", "maybe"),
    (Grammar("lark", CALLS), f"So: {CALL}", "<tool_call>\nnow"),
    (Grammar("json_object", ""), '{"a": 1}', "[1]"),
]


@pytest.mark.parametrize("kind", ["text", "added", "special"])
@pytest.mark.parametrize("name", REASONING_FORMATS)
def test_grammars_hold_after_the_thought_only(name: str, kind: str) -> None:
    tokenizer, reasoning = tokenizer_of(name, kind), REASONING_FORMATS[name]
    tokens = {token.content: id_ for id_, token in tokenizer.get_added_tokens_decoder().items()}
    known = LLTokenizer(tokenizer.to_str(), eos_token=2)
    for inside in (None, True, False):
        lark = thought_grammar(reasoning, inside, tokens, [2])
        assert bool(lark) == (inside is not False)
        thought = reasoning.as_text('maybe\n{"a": <tool_call> x}')
        thoughts = {None: ["", thought], True: [thought.removeprefix(reasoning.begin)], False: [""]}[inside]
        for grammar, good, bad in ASKED:
            whole = Grammar(grammar.kind, grammar.text, lark)
            for before in thoughts:
                for text, allowed in ((good, True), (bad, False)):
                    matcher = LLMatcher(known, definition(whole), log_level=0)
                    assert not matcher.is_error(), matcher.get_error()
                    ids = tokenizer.encode(before + text, add_special_tokens=False).ids
                    taken = matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()
                    assert taken == allowed, (inside, grammar, before + text)


@pytest.mark.parametrize("name", REASONING_FORMATS)
@pytest.mark.parametrize("inside", [True, None])
def test_thought_and_answer_are_told_apart_however_text_is_cut(name: str, inside: bool | None) -> None:
    style = REASONING_FORMATS[name]
    opening = "" if inside else f"\n{style.begin}"
    raw = f"{opening}\nof two\n\n{'lines ' * 8}{style.close}an answer\n\nof two"
    for size in range(1, len(raw) + 1):
        if size > len(opening) and not inside:
            break  # no token is a whole thought
        tokens = ThoughtTokens(style, inside)
        parts = [tokens.add(raw[at : at + size]) for at in range(0, len(raw), size)]
        parts.append(tokens.split("", last=True))
        thought, answer = ("".join(texts) for texts in zip(*parts, strict=True))
        assert (thought + answer, answer) == (raw, "an answer\n\nof two")
