"""The example data sets: the files equal the scripts' output, and no held-out part is in the training part."""

import importlib.util
import io
import json
from pathlib import Path

import pytest

from server.finetune.dataset import load_dataset
from server.finetune.tokenizer import TrainingTokenizer
from tests.support.tiny import tiny_text

DEMO = Path(__file__).parents[3] / "docs/demo"
FILES = ("train.jsonl", "held_out.jsonl")


@pytest.mark.parametrize("name", ["orders", "calls"])
def test_the_files_are_what_the_script_makes(name: str) -> None:
    spec = importlib.util.spec_from_file_location(f"make_{name}", DEMO / name / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for file, content in module.make().items():
        assert (DEMO / name / file).read_text() == content


@pytest.mark.parametrize("name", ["orders", "calls"])
def test_held_out_answers_are_disjoint_from_training(name: str) -> None:
    train, held_out = ((DEMO / name / file).read_text().splitlines() for file in FILES)
    assert len(held_out) >= 50
    assert len(train) >= 200
    answers = [{json.dumps(json.loads(line)["messages"][-1]) for line in lines} for lines in (train, held_out)]
    assert not answers[0] & answers[1]
    assert len(answers[1]) == len(held_out)


@pytest.mark.parametrize("name", ["orders", "calls"])
def test_every_line_is_good(name: str) -> None:
    text = tiny_text()
    for file in FILES:
        lines = io.BytesIO((DEMO / name / file).read_bytes())
        report = load_dataset(lines, TrainingTokenizer(text, [2]), max_length=1024).report
        assert (report.duplicates, report.empty, report.over_long) == (0, 0, 0)
    text.close()
