"""Training targets equal the output parsed in serving: each format of calls and of thoughts, read back."""

import io
import json
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer

from server.finetune.dataset import load_dataset
from server.finetune.rows import DatasetError
from server.finetune.tokenizer import TrainingTokenizer
from server.messages.dataset import Dataset
from server.text.chat_template import ChatTemplate
from server.text.processor import TextProcessor
from server.text.reasoning import REASONING_FORMATS, any_text, ends_in_thought, thought_reader
from server.text.tools.source import Arguments, Begin, Event, Parser, Text, Thought
from server.text.tools.table import FORMATS
from tests.support.templates import REASONING_TEMPLATES, TOOL_TEMPLATES
from tests.support.tiny import CHAT_TEMPLATE, _tokenizer

IM_END = 2
PARAMETERS = {
    "get_weather": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "near": {"type": "boolean"}},
    },
    "now": {"type": "object", "properties": {}},
}
TOOLS = [
    {"type": "function", "function": {"name": name, "description": f"Tells {name}.", "parameters": parameters}}
    for name, parameters in PARAMETERS.items()
]
ARGUMENTS = {"city": "Rome", "days": 2, "near": True}
CALL: dict[str, Any] = {"function": {"name": "get_weather", "arguments": ARGUMENTS}}
NOW: dict[str, Any] = {"id": "n", "type": "function", "function": {"name": "now", "arguments": "{}"}}
ASKED: list[dict[str, Any]] = [{"role": "user", "content": "How is Rome?"}]
RESULT = {"role": "tool", "content": "Dry."}


def processor(template: str, markers: tuple[str, ...] = ()) -> TextProcessor:
    tokenizer = Tokenizer.from_str(_tokenizer().backend_tokenizer.to_str())
    tokenizer.add_tokens([AddedToken(marker, special=True) for marker in markers if marker.startswith(("<", "["))])
    special = {"eos_token": "<|im_end|>", "bos_token": "<s>"}
    text = TextProcessor(tokenizer, ChatTemplate(template, special), special)
    text.close()
    return text


def encoded(text: TextProcessor, *rows: Any) -> Dataset:
    lines = b"\n".join(json.dumps(row).encode() for row in rows)
    return load_dataset(io.BytesIO(lines), TrainingTokenizer(text, [IM_END]), max_length=100_000)


def trained(text: TextProcessor, data: Dataset, index: int = -1) -> tuple[str, str]:
    """The text before a sequence's last trained turn, and that turn."""
    tokens, mask = data.sequence(index % len(data))
    last = int(np.flatnonzero(mask)[-1])
    first = last
    while mask[first - 1]:
        first -= 1
    return (
        text.decode(tokens[:first].tolist(), skip_special_tokens=False),
        text.decode(tokens[first : last + 1].tolist(), skip_special_tokens=False),
    )


def served_prompt(text: TextProcessor, messages: list[dict[str, Any]], tools: list[Any]) -> str:
    """The prompt of a request with these messages."""
    known = TrainingTokenizer(text, [IM_END])
    return known.render_chat(messages, add_generation_prompt=True, tools=tools)


def read(parser: Parser, said: str) -> list[Event]:
    """The parser's events, with consecutive events of one kind joined."""
    found: list[Event] = []
    for event in parser.feed(said, last=True):
        match found[-1] if found else None, event:
            case (Arguments(a), Arguments(b)):
                found[-1] = Arguments(a + b)
            case _:
                found.append(event)
    return found


ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "</s>",
    "<|end|>",
    "<｜tool▁calls▁end｜>",
    "<end_of_turn>",
    "<|end_of_text|>",
    "<turn|>",
    "[e~[",
    "<seed:eos>",
)


def without_end(said: str) -> str:
    said = said.rstrip()
    for end in ENDS:
        said = said.removesuffix(end).rstrip()
    return said


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("name", ["default", *TOOL_TEMPLATES])
def test_trained_calls_are_the_calls_that_serving_reads(name: str, special: bool) -> None:
    template = TOOL_TEMPLATES.get(name, CHAT_TEMPLATE)
    text = processor(template)
    tool_format = text.tool_format
    assert tool_format is not None
    if special:
        text = processor(template, tool_format.markers)
    row = {"messages": [*ASKED, {"role": "assistant", "tool_calls": [CALL]}], "tools": TOOLS}
    data = encoded(
        text, row, row | {"messages": [*row["messages"], RESULT, {"role": "assistant", "content": "It is."}]}
    )
    assert data.tool_format == tool_format.name
    assert data.reasoning_format is None
    before, said = trained(text, data, 0)
    parser = Parser(tool_format.reader, PARAMETERS)
    assert read(parser, without_end(said)) == [Begin("get_weather"), Arguments(json.dumps(ARGUMENTS))]
    assert before.rstrip() == served_prompt(text, ASKED, TOOLS).rstrip()
    whole = TrainingTokenizer(text, [IM_END]).render_chat(
        [*ASKED, {"role": "assistant", "content": "", "tool_calls": [with_text(CALL, "call_0")]}],
        add_generation_prompt=False,
        tools=TOOLS,
    )
    assert (before + said).rstrip() == whole.rstrip()
    assert "It is." in trained(text, data, -1)[1]


def with_text(call: dict[str, Any], id_: str) -> dict[str, Any]:
    """The call in the form of a request."""
    arguments = json.dumps(call["function"]["arguments"])
    return {"id": id_, "type": "function", "function": call["function"] | {"arguments": arguments}}


def test_every_tool_format_has_a_template_here() -> None:
    assert {processor(template).tool_format for template in [CHAT_TEMPLATE, *TOOL_TEMPLATES.values()]} == set(
        FORMATS.values()
    )


def test_several_calls_are_trained_on_or_refused() -> None:
    row = {"messages": [*ASKED, {"role": "assistant", "content": "So:", "tool_calls": [CALL, NOW]}], "tools": TOOLS}
    text = processor(TOOL_TEMPLATES["qwen2.5"])
    _, said = trained(text, encoded(text, row))
    events = read(Parser(FORMATS["hermes"].reader, PARAMETERS), without_end(said))
    expected = [Text("So:"), Begin("get_weather"), Arguments(json.dumps(ARGUMENTS)), Begin("now"), Arguments("{}")]
    assert events == expected
    with pytest.raises(DatasetError, match="leaves this call out") as refused:
        encoded(processor(TOOL_TEMPLATES["llama3.1"]), row)
    assert refused.value.field == "messages[1].tool_calls[1]"


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content", "thinking"])
@pytest.mark.parametrize("name", ["default", *(name for name in REASONING_TEMPLATES if name != "deepseek_r1")])
def test_trained_thoughts_are_the_thoughts_that_serving_reads(name: str, field: str) -> None:
    text = processor(REASONING_TEMPLATES.get(name, CHAT_TEMPLATE))
    reasoning = text.reasoning_format or REASONING_FORMATS["think"]
    data = encoded(text, {"messages": [*ASKED, {"role": "assistant", "content": "Warm.", field: "In the\n south."}]})
    assert (data.reasoning_format, data.tool_format) == (reasoning.name, None)
    before, said = trained(text, data)
    inside = True if before.rstrip().endswith(reasoning.begin) else None
    events = read(Parser(thought_reader(reasoning, inside, any_text), {}), without_end(said).removesuffix("<turn|>"))
    ends = ("<|return|>", "<seed:eos>", "<|end_of_text|>")
    assert [type(event) for event in events] == [Thought, Text]
    assert events[0] == Thought("In the\n south.")
    assert isinstance(events[1], Text)
    assert events[1].text.removesuffix(ends[0]).removesuffix(ends[1]).removesuffix(ends[2]) == "Warm."
    prompt = served_prompt(text, ASKED, [])
    if ends_in_thought(reasoning, prompt) is not False:  # else the answer begins earlier
        assert before.rstrip() == prompt.rstrip()
    whole = TrainingTokenizer(text, [IM_END]).render_chat(
        [*ASKED, {"role": "assistant", "content": "Warm.", "reasoning": "In the\n south."}], add_generation_prompt=False
    )
    assert whole.startswith(before + said)


def test_a_thought_and_a_call() -> None:
    turn = {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning": "It may rain."}
    for template in (REASONING_TEMPLATES["qwen3"], CHAT_TEMPLATE):
        text = processor(template)
        data = encoded(text, {"messages": [*ASKED, turn], "tools": TOOLS})
        assert (data.tool_format, data.reasoning_format) == ("hermes", "think")
        assert data.stop_tokens == (IM_END,)
        _, said = trained(text, data)
        parser = Parser(thought_reader(REASONING_FORMATS["think"], None, FORMATS["hermes"].reader), PARAMETERS)
        expected = [Thought("It may rain."), Begin("get_weather"), Arguments(json.dumps(ARGUMENTS))]
        assert read(parser, without_end(said)) == expected


def test_a_template_that_leaves_thoughts_out_is_refused() -> None:
    row = {"messages": [*ASKED, {"role": "assistant", "content": "Warm.", "reasoning": "South."}]}
    with pytest.raises(DatasetError, match=r"line 1, field `messages\[1\].reasoning`: .*leaves this thought out"):
        encoded(processor(REASONING_TEMPLATES["deepseek_r1"]), row)


def test_only_what_the_assistant_says_is_trained_on() -> None:
    text = processor(CHAT_TEMPLATE)
    turns = [
        *ASKED,
        {"role": "assistant", "tool_calls": [CALL], "weight": 0},
        RESULT,
        {"role": "assistant", "content": "It is dry.", "reasoning": "Dry, then."},
    ]
    data = encoded(text, {"messages": turns, "tools": TOOLS, "parallel_tool_calls": True})
    tokens, mask = data.sequence(0)
    said = text.decode(tokens[mask].tolist(), skip_special_tokens=False)
    assert said == "<think>\nDry, then.\n</think>\n\nIt is dry.<|im_end|>"
    shown = text.decode(tokens.tolist(), skip_special_tokens=False)
    assert json.dumps(TOOLS[0]) in shown
    assert "<tool_response>\nDry.\n</tool_response>" in shown
