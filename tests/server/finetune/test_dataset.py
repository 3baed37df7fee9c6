"""Data sets: the tokens trained on in each kind of line, and lines refused with line number and field."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from server.finetune import dataset
from server.finetune.dataset import load_dataset
from server.finetune.rows import DatasetError
from server.messages.dataset import Dataset
from server.openai.conversation import Message
from tests.support.tiny import _tokenizer


class TinyTokenizer:
    """The tiny model's real tokenizer with the interface that data sets use."""

    def __init__(self, template: str | None = None) -> None:
        self.hf: transformers.PreTrainedTokenizerFast = _tokenizer()
        self.template = template or self.hf.chat_template
        self.eos_token_ids = [int(self.hf.eos_token_id)]
        self.markers = ()
        self.formats = (None, None)
        self.special_tokens = {id_: token.content for id_, token in self.hf.added_tokens_decoder.items()}

    def render_chat(
        self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool, tools: Sequence[dict[str, Any]] = ()
    ) -> str:
        text = self.hf.apply_chat_template(
            list(messages),
            chat_template=self.template,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
        )
        assert isinstance(text, str)
        return text

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return self.hf.encode(text, add_special_tokens=add_special_tokens)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        encoded = self.hf(text, add_special_tokens=False, return_offsets_mapping=True)
        return encoded["input_ids"], encoded["offset_mapping"]

    def trained_text(self, dataset: Dataset, index: int = 0) -> str:
        tokens, trained = dataset.sequence(index)
        return str(self.hf.decode(tokens[trained]))


TOKENIZER = TinyTokenizer()
GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


def read(*lines: Any, tokenizer: TinyTokenizer = TOKENIZER, max_length: int = 256, **options: Any) -> Dataset:
    text = b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines)
    return load_dataset(io.BytesIO(text), tokenizer, max_length=max_length, **options)


def chat(*turns: tuple[str, str] | tuple[str, str, int]) -> dict[str, Any]:
    return {
        "messages": [
            {"role": role, "content": content} | ({"weight": rest[0]} if rest else {}) for role, content, *rest in turns
        ]
    }


# --- trained tokens --------------------------------------------------------------------------------


def test_chat_trains_on_assistant_turns_and_their_end() -> None:
    data = read(
        chat(("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye"), ("assistant", "Ciao"))
    )
    assert TOKENIZER.trained_text(data) == "Hello<|im_end|>Ciao<|im_end|>"
    tokens, _ = data.sequence(0)
    assert str(TOKENIZER.hf.decode(tokens)).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi")


def test_text_before_a_trained_turn_equals_the_serving_prompt() -> None:
    data = read(GOOD)
    tokens, trained = data.sequence(0)
    prompt = TOKENIZER.render_chat(GOOD["messages"][:1], add_generation_prompt=True)
    assert tokens[: int(np.argmax(trained))].tolist() == TOKENIZER.encode(prompt, add_special_tokens=False)


def test_weight_zero_keeps_a_turn_out() -> None:
    data = read(chat(("user", "a"), ("assistant", "no", 0), ("user", "b"), ("assistant", "yes", 1)))
    assert TOKENIZER.trained_text(data) == "yes<|im_end|>"


def test_prompt_and_completion() -> None:
    data = read({"prompt": "2+2=", "completion": " 4"})
    assert TOKENIZER.trained_text(data) == " 4<|im_end|>"


def test_text_trains_on_everything_but_its_first_token() -> None:
    data = read({"text": "The quick brown fox"})
    tokens, trained = data.sequence(0)
    assert TOKENIZER.hf.decode(tokens) == "The quick brown fox<|im_end|>"
    assert trained.tolist() == [False] + [True] * (len(tokens) - 1)


@pytest.mark.parametrize("line", [GOOD, {"prompt": "2+2=", "completion": " 4"}])
def test_prompts_are_trained_on_when_asked(line: dict[str, Any]) -> None:
    data = read(line, completions_only=False)
    assert data.trained.sum() == len(data.tokens) - 1


def test_text_parts_are_joined_as_requests_have_it() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    joined = Message.model_validate({"role": "assistant", "content": parts}).content
    one, other = (
        read({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content}]})
        for content in (parts, joined)
    )
    assert one.tokens.tolist() == other.tokens.tolist()


def test_a_template_that_rewrites_history_gives_one_sequence_a_turn() -> None:
    """The templates of thinking models drop the thoughts of all turns but the last."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = TinyTokenizer(template)
    data = read(chat(("user", "a"), ("assistant", "one"), ("user", "b"), ("assistant", "two")), tokenizer=tokenizer)
    trained = [tokenizer.trained_text(data, i) for i in range(len(data))]
    assert trained == ["<think></think>one<|im_end|>", "<think></think>two<|im_end|>"]
    assert data.report.examples == 1


def test_a_template_that_hides_the_turn_is_refused() -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    with pytest.raises(DatasetError, match=r"line 1, field `messages\[1\]`: .*template"):
        read(GOOD, tokenizer=TinyTokenizer(template))


@pytest.mark.parametrize(
    "fields",
    [
        {"refusal": None},
        {"refusal": "", "annotations": [], "audio": None, "function_call": None, "tool_calls": None},
        {"tool_calls": [], "function_call": {}, "reasoning_content": ""},
        {"weight": 1.0},
        {"weight": None, "name": None},
    ],
)
def test_fields_that_say_nothing_change_nothing(fields: dict[str, Any]) -> None:
    """Responses of a chat endpoint and rows of a table with a column for every field train like other rows."""
    row = {"messages": [GOOD["messages"][0] | {"weight": None}, GOOD["messages"][1] | fields]}
    others = {"tools": None, "prompt": None, "completion": None, "text": None, "id": ""}
    data = read(row | others, chat(("user", "a"), ("assistant", "b", 0)) | {"tools": []})
    assert data.tokens.tolist() == read(GOOD).tokens.tolist()
    assert read(_turn(content="a", weight=0.0), GOOD).report.empty == 1


class BosTokenizer(TinyTokenizer):
    """Begins every text with a special token."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        begin = self.hf.encode("<|im_start|>", add_special_tokens=False) if add_special_tokens else []
        return begin + super().encode(text, add_special_tokens=False)


@pytest.mark.parametrize(
    ("plain", "marked"),
    [
        ({"text": "The fox"}, {"text": "The fox<|im_end|>"}),
        ({"text": "The fox"}, {"text": "<|im_start|>The fox<|im_end|>"}),
        ({"prompt": "The", "completion": " fox"}, {"prompt": "The", "completion": " fox<|im_end|>"}),
        ({"prompt": "The", "completion": " fox"}, {"prompt": "<|im_start|>The", "completion": " fox"}),
    ],
)
def test_markers_that_a_row_carries_are_not_written_twice(plain: dict[str, str], marked: dict[str, str]) -> None:
    expected, found = (read(line, tokenizer=BosTokenizer()) for line in (plain, marked))
    assert found.tokens.tolist() == expected.tokens.tolist()
    assert found.trained.tolist() == expected.trained.tolist()
    assert BosTokenizer().hf.decode(expected.tokens) == "<|im_start|>The fox<|im_end|>"


@pytest.mark.parametrize("completions_only", [True, False])
def test_a_generation_prompt_that_opens_a_thought_hides_no_turn(completions_only: bool) -> None:
    """R1's template ends the prompt in `<think>` and renders finished turns without it."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    tokenizer = TinyTokenizer(template)
    row = chat(("user", "a"), ("assistant", "one"), ("user", "b"), ("assistant", "two"))
    data = read(row, tokenizer=tokenizer, completions_only=completions_only)
    if completions_only:
        assert tokenizer.trained_text(data) == "one<|im_end|>two<|im_end|>"
    else:
        assert data.trained.sum() == len(data.tokens) - 1


def test_oddities_are_counted() -> None:
    data = read(
        GOOD,
        b"",
        GOOD,
        {"prompt": "nothing", "completion": ""},
        {"text": ""},
        {"text": "0123456789 " * 40},
        chat(("user", "a"), ("assistant", "b", 0)),
        max_length=32,
    )
    report = data.report
    assert (report.examples, report.duplicates, report.empty, report.over_long) == (3, 1, 4, 1)
    assert max(data.lengths) == 32
    assert report.tokens == len(data.tokens) == data.bounds[-1]
    assert report.trained_tokens == data.trained.sum()
    assert "1 duplicate" in str(report)


def test_an_example_whose_answer_lies_beyond_the_limit_is_left_out() -> None:
    data = read(GOOD, {"prompt": "0123456789 " * 40, "completion": "4"}, max_length=32)
    assert (data.report.examples, data.report.empty, data.report.over_long) == (1, 1, 1)


def test_line_endings_and_byte_order_mark() -> None:
    plain = json.dumps(GOOD).encode()
    data = load_dataset(io.BytesIO(b"\xef\xbb\xbf" + plain + b"\r\n" + plain + b"\r\n"), TOKENIZER, max_length=99)
    assert (data.report.examples, data.report.empty) == (2, 0)


def test_save_and_load(tmp_path: Path) -> None:
    data = read(GOOD, {"text": "The quick brown fox"})
    data.save(tmp_path / "data.safetensors")
    loaded = Dataset.load(tmp_path / "data.safetensors")
    for index in range(2):
        for left, right in zip(data.sequence(index), loaded.sequence(index), strict=True):
            assert np.array_equal(left, right)
            assert left.dtype == right.dtype


@given(st.lists(st.tuples(st.text(max_size=30), st.text(min_size=1, max_size=30)), min_size=1, max_size=4))
def test_any_conversation_trains_on_just_its_answers(turns: list[tuple[str, str]]) -> None:
    messages = [m for ask, answer in turns for m in (("user", ask), ("assistant", answer))]
    data = read(chat(*messages), max_length=10_000)
    text = TOKENIZER.trained_text(data)
    marked = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    if not any(mark in ask + answer for ask, answer in turns for mark in marked):
        assert text == "".join(f"{answer}<|im_end|>" for _, answer in turns)
    assert not data.trained[data.bounds[:-1]].any()


# --- long chats -------------------------------------------------------------------------------------

BODY = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
LOCAL_TEMPLATES = {
    "plain": f"{{% for m in messages %}}{BODY}{{% endfor %}}{PROMPT}",
    "with a default system message": (
        "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
        f"{{% for m in messages %}}{BODY}{{% endfor %}}{PROMPT}"
    ),
    "with roles that alternate": (
        "{% for m in messages if m.role != 'system' %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        f"{{{{ raise_exception('roles must alternate') }}}}{{% endif %}}{BODY}{{% endfor %}}{PROMPT}"
    ),
    "with a thought opened": f"{{% for m in messages %}}{BODY}{{% endfor %}}{PROMPT.replace('nt', 'nt<think>', 1)}",
}


class CountingTokenizer(TinyTokenizer):
    """Counts the messages that it renders."""

    rendered = 0

    def render_chat(
        self, messages: Sequence[dict[str, Any]], *, add_generation_prompt: bool, tools: Sequence[dict[str, Any]] = ()
    ) -> str:
        self.rendered += len(messages)
        return super().render_chat(messages, add_generation_prompt=add_generation_prompt)


def long_chat(exchanges: int, *, opening: str = "system") -> dict[str, Any]:
    turns: list[Any] = [(opening, "Be brief.") if opening == "system" else (opening, "Hello!", 0)]
    for i in range(exchanges):
        turns += [("user", f"q{i}"), ("assistant", f"a{i}", int(i % 5 != 0))]
    return chat(*turns)


@pytest.mark.parametrize("opening", ["system", "assistant"])
@pytest.mark.parametrize("kind", LOCAL_TEMPLATES)
def test_a_long_chat_is_masked_as_a_short_one(kind: str, opening: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, example = CountingTokenizer(LOCAL_TEMPLATES[kind]), long_chat(40, opening=opening)
    if "alternate" in kind and opening == "assistant":
        return
    quick = read(example, tokenizer=tokenizer, max_length=10_000)
    assert tokenizer.rendered < 10 * len(example["messages"])
    monkeypatch.setattr(dataset, "FEW_TURNS", 1000)
    slow = read(example, tokenizer=tokenizer, max_length=10_000)
    assert tokenizer.rendered > 30 * len(example["messages"])
    assert (quick.tokens.tolist(), quick.trained.tolist()) == (slow.tokens.tolist(), slow.trained.tolist())
    assert len(quick) == 1


def test_checking_a_chat_takes_time_that_grows_with_its_length() -> None:
    tokenizer, example = CountingTokenizer(), long_chat(2000)
    data = read(example, tokenizer=tokenizer, max_length=1 << 20)
    assert tokenizer.rendered < 10 * len(example["messages"])
    assert tokenizer.trained_text(data).count("<|im_end|>") == 1600


def test_a_template_that_rewrites_history_bounds_the_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    thought = "{% if m.role == 'assistant' and loop.last %}<think>{% endif %}"
    body = BODY.replace("{{ m.content", thought + "{{ m.content")
    template = f"{{% for m in messages %}}{body}{{% endfor %}}{PROMPT}"
    tokenizer = TinyTokenizer(template)
    assert len(read(long_chat(25), tokenizer=tokenizer, max_length=10_000)) == 20
    monkeypatch.setattr(dataset, "MAX_TURNS", 19)
    with pytest.raises(DatasetError, match="20 assistant turns; this chat template allows 19") as refusal:
        read(long_chat(25), tokenizer=tokenizer)
    assert refusal.value.field == "messages"


@pytest.mark.parametrize("role", ["assistant", "tool"])
def test_answers_without_questions_bound_the_turns(role: str) -> None:
    turns = [("user", "q"), *[(role, "a"), ("assistant", "b")] * 300]
    with pytest.raises(DatasetError, match="assistant turns; this chat template allows 256"):
        read(chat(*turns))


# --- refused lines --------------------------------------------------------------------------------


def _calling(arguments: Any) -> dict[str, Any]:
    """A chat whose second message calls a function with these arguments."""
    return _turn(tool_calls=[{"function": {"name": "f", "arguments": arguments}}])


def _turn(**fields: Any) -> dict[str, Any]:
    """A chat whose second message has these fields and its role."""
    return {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", **fields}]}


BAD: list[tuple[Any, str | None]] = [
    # not a JSON object at all
    (b"{", None),
    (b"not json", None),
    (b'{"text": "a"} {"text": "b"}', None),
    (b'{"text": "a",}', None),
    (b"{'text': 'a'}", None),
    (b'{"text": "a\x01b"}', None),
    (b'{"text": "\xff\xfe"}', None),
    (b'{"text": NaN}', None),
    (b'{"text": Infinity}', None),
    (b'{"text": "a", "text": "b"}', "text"),
    (b'{"messages": [{"role": "user", "role": "user", "content": "x"}]}', "role"),
    (b"[" * 100_000 + b"]" * 100_000, None),
    ([1, 2], None),
    ("text", None),
    (5, None),
    (None, None),
    (True, None),
    # the wrong kind of object
    ({}, None),
    ({"Text": "a"}, None),
    ({"conversations": [{"from": "human", "value": "x"}]}, None),
    ({"instruction": "a", "output": "b"}, None),
    ({"text": "a", "prompt": "b"}, "prompt"),
    ({"messages": GOOD["messages"], "text": "b"}, "text"),
    ({"text": "a", "id": 1}, "id"),
    ({**GOOD, "tools": [{"type": "function"}]}, "tools[0].function"),
    ({**GOOD, "tools": [{"type": "search", "function": {"name": "f"}}]}, "tools[0].type"),
    ({**GOOD, "tools": [{"function": {"name": "f", "body": "x"}}]}, "tools[0].function.body"),
    ({**GOOD, "tools": [{"function": {"name": "f"}}, {"function": {"name": "f"}}]}, "tools"),
    ({**GOOD, "parallel_tool_calls": "yes"}, "parallel_tool_calls"),
    ({"text": "a", "tools": [{"function": {"name": "f"}}]}, "tools"),
    # text, prompt, completion
    ({"text": None}, "text"),
    ({"text": 5}, "text"),
    ({"text": ["a"]}, "text"),
    ({"text": True}, "text"),
    ({"text": "\ud800"}, "text"),
    ({"prompt": "a"}, "completion"),
    ({"completion": "a"}, "prompt"),
    ({"prompt": None, "completion": "a"}, "prompt"),
    ({"prompt": ["a"], "completion": "a"}, "prompt"),
    ({"prompt": "a", "completion": 4}, "completion"),
    ({"prompt": "a", "completion": {"text": "b"}}, "completion"),
    ({"prompt": "a", "completion": "b", "weight": 1}, "weight"),
    # messages
    ({"messages": []}, "messages"),
    ({"messages": None}, "messages"),
    ({"messages": "Hi"}, "messages"),
    ({"messages": {"role": "user"}}, "messages"),
    ({"messages": ["Hi"]}, "messages[0]"),
    ({"messages": [None]}, "messages[0]"),
    ({"messages": [[]]}, "messages[0]"),
    ({"messages": [{"content": "Hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "human", "content": "Hi"}]}, "messages[0].role"),
    ({"messages": [{"role": 1, "content": "Hi"}]}, "messages[0].role"),
    ({"messages": [{"role": None, "content": "Hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": "Hi"}]}, "messages"),
    ({"messages": [{"role": "user", "content": "Hi", "weight": 1}, *GOOD["messages"]]}, "messages[0].weight"),
    ({"messages": [*GOOD["messages"], {"role": "system", "content": "late"}]}, "messages[2].role"),
    (_turn(content=None), "messages[1].content"),
    (_turn(content=5), "messages[1].content"),
    (_turn(content={"text": "a"}), "messages[1].content"),
    (_turn(content=["a"]), "messages[1].content[0]"),
    (_turn(content=[{"type": "image_url", "image_url": "x"}]), "messages[1].content[0].type"),
    (_turn(content=[{"type": "text"}]), "messages[1].content[0].text"),
    (_turn(content=[{"type": "text", "text": 1}]), "messages[1].content[0].text"),
    (_turn(content="\udfff"), "messages[1].content"),
    (_turn(content="a", weight=2), "messages[1].weight"),
    (_turn(content="a", weight=0.5), "messages[1].weight"),
    (_turn(content="a", weight=True), "messages[1].weight"),
    (_turn(content="a", weight="1"), "messages[1].weight"),
    (_turn(content="a", tool_calls=[{"id": "1"}]), "messages[1].tool_calls[0].function"),
    (_calling("{"), "messages[1].tool_calls[0].function.arguments"),
    (
        _turn(tool_calls=[{"function": {"name": "f", "arguments": "[]"}}]),
        "messages[1].tool_calls[0].function.arguments",
    ),
    (_calling(5), "messages[1].tool_calls[0].function.arguments"),
    (_turn(tool_calls=[{"function": {}}]), "messages[1].tool_calls[0].function.name"),
    (_turn(tool_calls=[]), "messages[1].content"),
    (
        {**_turn(tool_calls=[{"function": {"name": "f"}}] * 2), "parallel_tool_calls": False},
        "messages[1].tool_calls",
    ),
    (_turn(content="a", reasoning=["so"]), "messages[1].reasoning"),
    (_turn(content="a", reasoning_details=[{"text": "so"}]), "messages[1].reasoning_details"),
    ({"messages": [{"role": "user", "content": "a", "thinking": "b"}, *GOOD["messages"]]}, "messages[0]"),
    (_turn(content="a", function_call={"name": "f"}), "messages[1].function_call"),
    (_turn(content="a", name=5), "messages[1].name"),
    (_turn(content="a", Role="user"), "messages[1].Role"),
]


@pytest.mark.parametrize(("line", "field"), BAD, ids=range(len(BAD)))
def test_bad_line_is_refused_with_line_and_field(line: Any, field: str | None) -> None:
    with pytest.raises(DatasetError) as caught:
        read(GOOD, line, GOOD)
    assert caught.value.line == 2
    assert caught.value.field == field
    assert str(caught.value).startswith("line 2")
    assert field is None or f"`{field}`" in str(caught.value)


def test_a_line_too_long_is_refused_unread() -> None:
    with pytest.raises(DatasetError, match="line 2: longer than"):
        read(GOOD, b'{"text": "' + b"a" * (5 << 20) + b'"}')


@pytest.mark.parametrize("lines", [[], [b""], [b"", b"  "], [{"text": ""}], [{"prompt": "a", "completion": ""}]])
def test_a_file_with_nothing_to_learn_is_refused(lines: list[Any]) -> None:
    with pytest.raises(DatasetError, match="no line"):
        read(*lines)


def test_a_file_whose_answers_lie_beyond_the_limit_is_told_so() -> None:
    with pytest.raises(DatasetError, match=r"to train on; 2 cut at 32 tokens"):
        read(*[{"prompt": "0123456789 " * 40, "completion": str(i)} for i in range(2)], max_length=32)
    with pytest.raises(DatasetError, match=r"to train on$"):
        read({"prompt": "a", "completion": ""}, max_length=32)
