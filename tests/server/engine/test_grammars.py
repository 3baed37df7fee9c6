"""Grammars: outputs are valid with all other options, and unconstrained requests in the batch are unaffected."""

import json
import random
import threading
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from llguidance import LLParserLimits
from tokenizers import Tokenizer

from adapters.peft_format.directory import AdapterSpec
from adapters.peft_format.text import AdapterText, NewToken
from server.engine import grammar as grammars
from server.engine.batch import InFlightStep
from server.engine.engine import Engine
from server.engine.sequence import Sequence, Step
from server.messages.protocol import INVALID_GRAMMAR, AdapterRef, Generate, Grammar, Sampling, ThoughtBudget
from tests.support import interpreter
from tests.support.offline import Answer, load_engine, make_resident, publish, request, run, solo, tight_engine
from tests.support.tiny import VOCAB, tiny_adapter

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 9},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "likes": {"type": "array", "items": {"enum": ["seeds", "fruit", 7, None]}, "maxItems": 3},
    },
    "required": ["name", "age", "likes"],
    "additionalProperties": False,
}
SCHEMAS: list[dict[str, Any]] = [
    PERSON,
    {"anyOf": [{"type": "number", "multipleOf": 0.5, "minimum": -9, "maximum": 9}, {"type": "null"}]},
    {"type": "string", "pattern": "^[a-f]{2,5}-[0-9]+x$", "maxLength": 12},
    {"$defs": {"tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}, "maxItems": 2}}, "$ref": "#/$defs/tree"},
    {"type": "string", "format": "date"},
    {"type": "array", "prefixItems": [{"const": "a"}, {"type": "boolean"}], "items": False, "minItems": 2},
    {"allOf": [{"type": "object", "properties": {"k": {"enum": ["x", "y"]}}, "required": ["k"]}, {"maxProperties": 1}]},
]
TAGS = {"triggers": ["<f="], "structures": [{"begin": "<f=one>", "schema": PERSON, "end": "</f>"}]}
CALLS = Grammar("structural_tag", json.dumps(TAGS))  # like those of tools: free text until a call begins
ASKED: list[dict[str, Any]] = [
    {},
    {"logprobs": 2},
    {"repetition_penalty": 1.2, "presence_penalty": 0.3},
    {"speculative_tokens": 4},
    {"logit_bias": {7: 5.0, 8: -5.0}, "top_k": 40},
    {"min_tokens": 6, "top_p": 0.9},
    {"speculative_tokens": 3, "logprobs": 0, "frequency_penalty": 0.2},
    {"temperature": 0.0},
]


@pytest.fixture(scope="module")
def engine(shallow_dir: Path, cache_dir: Path) -> Engine:
    return load_engine(shallow_dir, cache_dir)


@pytest.fixture(scope="module")
def tokenizer(shallow_dir: Path) -> Tokenizer:
    return Tokenizer.from_file(str(shallow_dir / "tokenizer.json"))


@pytest.fixture(scope="module")
def adapters(engine: Engine, shallow_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[AdapterRef]:
    root = tmp_path_factory.mktemp("adapters")
    return [publish(engine, tiny_adapter(root / str(i), shallow_dir, seed=i, r=4 * (i + 1))) for i in range(2)]


def constrained(id: str, grammar: Grammar, adapter: AdapterRef | None = None, **sampling: Any) -> Generate:  # noqa: A002
    settings: dict[str, Any] = {"temperature": 1.5, "max_tokens": 150, "ignore_eos": False, "logprobs": None}
    return request(id, [5, 6, 7, 8, 7, 6], adapter, **(settings | {"grammar": grammar} | sampling))


def of_schema(schema: dict[str, Any]) -> Grammar:
    return Grammar("json", json.dumps(schema))


def workload(adapters: list[AdapterRef], rounds: int) -> list[Generate]:
    return [
        constrained(
            f"c{i}", of_schema(SCHEMAS[i % len(SCHEMAS)]), [None, *adapters][i % 3], seed=i, **ASKED[i % len(ASKED)]
        )
        for i in range(rounds)
    ]


def check(answer: Answer, schema: dict[str, Any], tokenizer: Tokenizer) -> None:
    assert answer.error is None
    if answer.finish_reason == "stop":
        value = json.loads(tokenizer.decode(answer.tokens))
        assert jsonschema_rs.is_valid(schema, value, validate_formats=True), (schema, value)


@pytest.mark.parametrize("depth", [0, 1])
def test_a_finished_answer_is_valid_and_free_neighbours_never_notice(
    depth: Any, shallow_dir: Path, cache_dir: Path, tokenizer: Tokenizer, adapters: list[AdapterRef]
) -> None:
    engine = load_engine(shallow_dir, cache_dir, depth=depth)
    rounds = 6 if interpreter.whole_suite() else len(SCHEMAS) * len(ASKED)
    constrained_ones = workload(adapters, rounds)
    to_call = {tokenizer.token_to_id(token): 60.0 for token in "<f="}
    free = [
        request(f"f{i}", [9, 8, 7, i], [None, *adapters][i % 3], max_tokens=25, temperature=i % 2, seed=i, logprobs=1)
        for i in range(6)
    ]
    calls = [constrained(f"t{i}", CALLS, seed=i, temperature=8.0, logit_bias=to_call) for i in range(6)]
    alone = solo(engine, free)
    mixed = [one for pair in zip(constrained_ones, free, strict=False) for one in pair]
    answers = run(engine, calls + mixed + constrained_ones[len(free) :], every=1)
    assert any("<f=" in tokenizer.decode(answers[call.id].tokens) for call in calls), "no constraint took effect"
    for i in range(rounds):
        check(answers[f"c{i}"], SCHEMAS[i % len(SCHEMAS)], tokenizer)
    finished = sum(answers[f"c{i}"].finish_reason == "stop" for i in range(rounds))
    assert finished > 0.9 * rounds
    assert {name: answers[name] for name in alone} == alone
    for one, answer in solo(
        engine, constrained_ones[: len(SCHEMAS)]
    ).items():  # nor are constrained requests affected by others
        assert answer.tokens == answers[one].tokens


def test_speculation_logprobs_and_preemption_change_no_token(
    engine: Engine,
    shallow_dir: Path,
    cache_dir: Path,
    adapters: list[AdapterRef],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def all_with(**sampling: Any) -> list[Generate]:
        return [
            constrained(f"{i}", of_schema(SCHEMAS[i % 4]), [None, *adapters][i % 3], seed=i, **sampling)
            for i in range(4 if interpreter.whole_suite() else 12)
        ]

    plain = run(engine, all_with())
    tight = tight_engine(engine, shallow_dir, cache_dir, blocks=9, longest=100)
    make_resident(tight, adapters)
    preempted: list[str] = []
    preempt = tight.scheduler._preempt

    def watched(sequence: Sequence) -> None:
        preempted.append(sequence.id)
        preempt(sequence)

    monkeypatch.setattr(tight.scheduler, "_preempt", watched)
    variants = {
        "speculation": run(engine, all_with(speculative_tokens=5)),
        "logprobs": run(engine, all_with(logprobs=1)),
        "preemption": run(tight, all_with(max_tokens=90)),
    }
    assert preempted
    for name, answers in variants.items():
        for one, answer in answers.items():
            length = min(len(answer.tokens), len(plain[one].tokens))
            assert answer.tokens[:length] == plain[one].tokens[:length], name
            assert len(answer.logprobs) == (len(answer.tokens) if name == "logprobs" else 0)


def test_logprobs_are_the_raw_models(engine: Engine) -> None:
    answer = run(engine, [constrained("a", of_schema(PERSON), logprobs=0)])["a"]
    prompt = [5, 6, 7, 8, 7, 6]
    scored = run(engine, [request("b", [*prompt, *answer.tokens], max_tokens=0, prompt_logprobs=0)])["b"]
    assert [one.logprob for one in answer.logprobs] == [
        one.logprob for one in scored.prompt_logprobs[len(prompt) :] if one is not None
    ]
    assert answer.finish_reason == "stop"


def test_forced_tokens_take_one_pass_and_no_draw(
    engine: Engine, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = {f"a_long_name_{i}": {"type": "boolean"} for i in range(4)}
    schema = {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}
    steps: list[Step] = []
    submit = engine.runner.submit

    def watched(step: Step, before: InFlightStep | None) -> InFlightStep:
        steps.append(step)
        return submit(step, before)

    monkeypatch.setattr(engine.runner, "submit", watched)
    answer = run(engine, [constrained("a", of_schema(schema))])["a"]
    assert json.loads(tokenizer.decode(answer.tokens)).keys() == properties.keys()
    assert len(answer.tokens) > 30
    # One pass for each choice between true and false, or for each token of "true" if tokens leave a choice.
    assert len(steps) <= 9


@pytest.mark.parametrize(
    ("grammar", "texts"),
    [
        (Grammar("choice", '["yes", "no \\u00fc\\n", "maybe \\"so\\""]'), {"yes", "no ü\n", 'maybe "so"'}),
        (Grammar("regex", "(?i)ab|cd"), {"ab", "AB", "aB", "Ab", "cd", "CD", "cD", "Cd"}),
        (Grammar("lark", 'start: "a" b\nb: "x" | "y"'), {"ax", "ay"}),
        (Grammar("lark", 'root ::= "a" b\nb ::= "x" | "y"'), {"ax", "ay"}),
    ],
)
def test_other_kinds(grammar: Grammar, texts: set[str], engine: Engine, tokenizer: Tokenizer) -> None:
    answers = run(
        engine, [constrained(f"{i}", grammar, seed=i, temperature=30.0, min_tokens=9 * (i % 2)) for i in range(12)]
    )
    found = {tokenizer.decode(answer.tokens) for answer in answers.values()}
    assert found <= texts
    assert len(found) > 1
    assert {answer.finish_reason for answer in answers.values()} == {"stop"}


def test_any_json_object(engine: Engine, tokenizer: Tokenizer) -> None:
    answers = run(engine, [constrained(f"{i}", Grammar("json_object", ""), seed=i) for i in range(8)])
    finished = [answer for answer in answers.values() if answer.finish_reason == "stop"]
    assert finished
    for answer in finished:
        assert isinstance(json.loads(tokenizer.decode(answer.tokens)), dict)


def test_text_is_free_until_a_trigger(engine: Engine, tokenizer: Tokenizer) -> None:
    bias = {tokenizer.token_to_id(token): 60.0 for token in "<f="}
    answers = run(engine, [constrained(f"{i}", CALLS, seed=i, logit_bias=bias, temperature=8.0) for i in range(12)])
    calls = 0
    for answer in answers.values():
        text = tokenizer.decode(answer.tokens)
        *parts, rest = text.split("</f>")
        for part in parts:
            _, trigger, body = part.partition("<f=")
            if trigger:
                assert jsonschema_rs.is_valid(PERSON, json.loads(body.removeprefix("one>")))
                calls += 1
        if "<f=" in rest:
            assert answer.finish_reason == "length"
    assert calls


def test_max_tokens_ends_an_object_in_its_middle(engine: Engine, tokenizer: Tokenizer) -> None:
    for most in (1, 2, 3, 8):
        for logprobs in (None, 0):
            answer = run(engine, [constrained("a", of_schema(PERSON), max_tokens=most, logprobs=logprobs)])["a"]
            assert (len(answer.tokens), answer.finish_reason) == (most, "length")
            assert '{"name":"'.startswith(tokenizer.decode(answer.tokens)[:9])


def test_a_stop_token_ends_only_where_the_grammar_may_end(engine: Engine, tokenizer: Tokenizer) -> None:
    letter = tokenizer.token_to_id("q")
    grammar = Grammar("regex", "[0-9]{3,60}")
    answers = run(
        engine,
        [constrained(f"{i}", grammar, seed=i, stop_token_ids=[letter], logit_bias={letter: 50.0}) for i in range(6)],
    )
    for answer in answers.values():
        assert (answer.tokens[-1], answer.finish_reason) == (letter, "stop")
        assert len(tokenizer.decode(answer.tokens[:-1])) >= 3


def test_a_request_whose_grammar_is_being_compiled_waits_alone(engine: Engine) -> None:
    go_on = threading.Event()
    engine.grammars._compiler.submit(go_on.wait)
    engine.add(constrained("slow", Grammar("regex", "slow|late")))
    engine.add(constrained("given up", Grammar("regex", "slow|late")))
    engine.add(request("free", [1, 2, 3], max_tokens=5))
    outputs = [output for _ in range(8) for output in engine.step()[0]]
    assert {output.id for output in outputs} == {"free"}
    assert outputs[-1].finish_reason == "length"
    assert engine.loading
    engine.abort("given up")
    go_on.set()
    late: list[Any] = []
    while not engine.idle:
        late += engine.step()[0]
    assert {output.id for output in late} == {"slow"}
    assert late[-1].finish_reason == "stop"


@pytest.mark.parametrize(
    "grammar",
    [of_schema({"uniqueItems": True}), Grammar("regex", "(?=a)b"), Grammar("lark", "start: <|nobody|>")],
)
def test_a_grammar_that_cannot_be_ends_its_request_alone(grammar: Grammar, engine: Engine) -> None:
    answers = run(engine, [constrained("bad", grammar), request("free", [1, 2, 3], max_tokens=5)])
    assert answers["bad"].code == INVALID_GRAMMAR
    assert answers["free"].finish_reason == "length"


def test_one_that_grows_beyond_its_limits_ends_its_request_alone(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammars, "LIMITS", LLParserLimits(step_lexer_fuel=300, max_lexer_states=60))
    wild = Grammar("regex", "(a|b|ab|ba)*a(a|b){90}(c|d)*")
    answers = run(engine, [constrained("wild", wild), request("free", [1, 2, 3], max_tokens=40)])
    assert answers["wild"].code == INVALID_GRAMMAR
    assert answers["wild"].error is not None
    assert "grammar" in answers["wild"].error
    assert answers["free"].finish_reason == "length"


@pytest.mark.parametrize("at_once", [1, 6])
def test_answers_that_fit_one_by_one_never_fill_a_grammar_for_those_after_them(
    at_once: int, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammars, "LIMITS", LLParserLimits(max_lexer_states=200))
    grammar = Grammar("regex", f"(a|b|ab|ba)*a(a|b){{90}}(c|d){{{at_once}}}")  # almost every text has states of its own
    begun = engine.grammars.compile(grammar, []).result()
    for first in range(0, 6, at_once):
        seeds = range(first, first + at_once)
        asked = [constrained(f"{at_once}/{seed}", grammar, seed=seed, max_tokens=40) for seed in seeds]
        for answer in run(engine, asked).values():
            assert answer.error is None
            assert answer.finish_reason == "length"
    assert begun.spent
    assert engine.grammars.compile(grammar, []).result() is not begun


def test_compiled_grammars_are_kept_within_their_budget(shallow_dir: Path) -> None:
    kept = grammars.Grammars(shallow_dir, VOCAB, [2], budget=3 << 20, priority="normal")
    one = kept.compile(Grammar("regex", "a"), [])
    assert kept.compile(Grammar("regex", "a"), [AdapterRef("sha256:1", "/nowhere")]) is one, (
        "one tokenizer, one grammar"
    )
    for letter in "bc":
        kept.compile(Grammar("regex", letter), [])
    assert kept.compile(Grammar("regex", "a"), []) is one
    kept.compile(Grammar("regex", "d", size=2 << 20), [])
    assert kept.compile(Grammar("regex", "a"), []) is one
    assert kept.compile(Grammar("regex", "b"), []) is not one
    assert len(kept._compiled) <= 3
    large = kept.compile(Grammar("regex", "large", size=1 << 40), [])
    assert large.result().matcher is not None
    assert len(kept._compiled) == 1


def test_adapters_with_tokens_of_their_own_may_say_them(
    shallow_dir: Path, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tokenizer.get_vocab_size()  # new tokens are numbered from here
    text = AdapterText(tokens=(NewToken(first, "<polly>", special=True), NewToken(first + 1, "squawk")))
    monkeypatch.setattr(AdapterSpec, "read", lambda path: type("Spec", (), {"text": text}))
    kept = grammars.Grammars(shallow_dir, VOCAB, [2], budget=1 << 30, priority="normal")
    adapter = AdapterRef("sha256:1", str(tmp_path), tokens=True)
    compiled = kept.compile(Grammar("lark", 'start: <polly> "squawk"'), [adapter]).result()
    constraint = compiled.constraint(Sampling())
    assert constraint.forced == [first, first + 1]
    with pytest.raises(grammars.InvalidGrammar, match="polly"):
        kept.compile(Grammar("lark", 'start: <polly> "squawk"'), []).result()


@pytest.mark.parametrize("content", [None, "{}", '{"model": {"type": "WordLevel"}}'])
def test_without_a_usable_tokenizer_grammars_are_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    kept = grammars.Grammars(tmp_path, VOCAB, [2], budget=1 << 30, priority="normal")
    with pytest.raises(grammars.InvalidGrammar, match="tokenizer"):
        kept.compile(Grammar("regex", "a"), []).result()


def test_drafts_are_walked_as_single_tokens_would_be(engine: Engine) -> None:
    """The masks after drafts equal those of a constraint that consumed these tokens one by one."""
    compiled = engine.grammars.compile(of_schema(PERSON), []).result()
    draw = random.Random(0)
    walked = compiled.constraint(Sampling())
    for _ in range(30):
        if walked.forced:
            walked.consume(walked.forced[0])
            continue
        if walked.stopped:
            break
        walked._make_masks([], 0)
        [(mask, _)] = walked._rows
        allowed = [token for token in range(VOCAB) if mask[token // 32] >> token % 32 & 1]
        drafts = walked.valid_prefix([draw.choice(allowed), *(draw.randrange(VOCAB) for _ in range(2))])
        walked._make_masks(drafts, 0)
        rows = list(walked._rows)
        assert len(rows) == len(drafts) + 1
        for index, draft in enumerate(drafts):
            assert rows[index][0][draft // 32] >> draft % 32 & 1
        again = list(rows)
        walked._make_masks(drafts, 0)
        assert all((a[0] == b[0]).all() for a, b in zip(again, walked._rows, strict=True))
        walked.consume(drafts[0] if drafts else allowed[0])


THOUGHT = (
    '%llguidance {}\nstart: begin thought SPACE @answer | @answer\nbegin[lazy]: "<a>"\n'
    "thought[lazy]: /(.|\\n)*<\\/a>/\nSPACE: /[ \\n]{0,4}/\n"
)


@pytest.mark.parametrize("asked", [{}, {"speculative_tokens": 4}, {"logprobs": 1}, {"temperature": 0.0}])
@pytest.mark.parametrize("most", [0, 1, 9, 30])
def test_a_thought_ends_with_its_budget(most: int, asked: dict[str, Any], engine: Engine, tokenizer: Tokenizer) -> None:
    """Whether the thought begins in the prompt or in the output; the grammar applies after it."""
    close = tokenizer.encode("\n</a>\n", add_special_tokens=False).ids
    begun = THOUGHT.replace("begin thought SPACE @answer | @answer", "thought SPACE @answer")
    for begin, lark in (("", begun), ("<a>", THOUGHT.replace(" | @answer", ""))):
        grammar = Grammar("json", json.dumps(PERSON), lark)
        budget = ThoughtBudget(most, begin, "</a>", close)
        answer = run(engine, [constrained("t", grammar, thought=budget, **asked)])["t"]
        assert answer.error is None
        text = tokenizer.decode(answer.tokens, skip_special_tokens=False)
        thought, end, rest = text.partition("\n</a>\n")
        assert end
        assert thought.startswith(begin)
        opened = len(tokenizer.encode(begin).ids)
        spent = len(tokenizer.encode(thought + end).ids)
        assert spent <= max(most, opened + len(close)) + 3, "a partial character is completed first"
        if answer.finish_reason == "stop":
            jsonschema_rs.validator_for(PERSON).validate(json.loads(rest.removesuffix("<|im_end|>")))


def test_a_budget_never_ends_what_is_no_thought(engine: Engine, tokenizer: Tokenizer) -> None:
    free = Grammar("lark", "%llguidance {}\nstart: <[*]>*\n")
    budget = ThoughtBudget(3, "<a>", "</a>", tokenizer.encode("</a>").ids)
    plain = run(engine, [constrained("p", free, seed=5, max_tokens=40)])["p"]
    limited = run(engine, [constrained("l", free, seed=5, max_tokens=40, thought=budget)])["l"]
    assert plain.tokens == limited.tokens
    alone = request("f", [5, 6, 7, 8, 7, 6], seed=5, temperature=1.5, max_tokens=40, ignore_eos=False, logprobs=None)
    assert run(engine, [alone])["f"].tokens == plain.tokens, "a grammar that allows any text changes nothing"
