"""The tokens that end an answer: every one that the model's files name, and the template's end of a turn."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from server.text.processor import TextProcessor
from tests.support.tiny import _tokenizer

END, START, IM_END = 0, 1, 2


def load(directory: Path, template: str | None = None, **files: dict[str, Any]) -> TextProcessor:
    tokenizer = copy.deepcopy(_tokenizer())  # it is shared
    if template is not None:
        tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)
    for name, content in files.items():
        path = directory / f"{name}.json"
        before = json.loads(path.read_bytes()) if path.exists() else {}
        path.write_text(json.dumps(before | content))
    return TextProcessor.load(directory)


def test_config_tokenizer_and_template_each_name_their_own(tmp_path: Path) -> None:
    """A chat fine-tune on a base whose config still has the base's end of text."""
    text = load(tmp_path, config={"eos_token_id": END}, generation_config={"eos_token_id": [END, START]})
    assert text.stop_tokens == {
        END: ("generation_config.json", "config.json"),
        START: ("generation_config.json",),
        IM_END: ("tokenizer", "chat template"),
    }
    assert text.stops_as_json()[2] == {"id": 2, "token": "<|im_end|>", "named_by": ["tokenizer", "chat template"]}


def test_the_text_part_of_a_wrapper_names_its_own(tmp_path: Path) -> None:
    assert load(tmp_path, config={"text_config": {"eos_token_id": END}}).stop_tokens[END] == ("config.json",)


@pytest.mark.parametrize(
    ("template", "named"),
    [
        ("{% for m in messages %}{{ m.content }} <|endoftext|>\n{% endfor %}", True),  # Llama 2's space
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}<|endoftext|>", True),
        ("{% for m in messages %}{{ m.content }} and so on <|endoftext|>{% endfor %}", False),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", False),
        ("{{ raise_exception('never') }}", False),
        ("{% for m in messages %}{{ m.content | upper }}<|endoftext|>{% endfor %}", False),
    ],
)
def test_a_turn_ends_with_the_special_token_behind_the_answer(tmp_path: Path, template: str, named: bool) -> None:
    text = load(tmp_path, template)
    assert ("chat template" in text.stop_tokens.get(END, ())) is named
    assert text.stop_tokens[IM_END] == ("tokenizer",)
