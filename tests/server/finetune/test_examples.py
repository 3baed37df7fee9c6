"""The example data set: what its script makes, and nothing of the held-out part in the training part."""

import importlib.util
import io
import json
from pathlib import Path

from server.finetune.dataset import load_dataset
from tests.server.finetune.test_dataset import TOKENIZER

ORDERS = Path(__file__).parents[3] / "docs/demo/orders"


def test_the_files_are_what_the_script_makes() -> None:
    spec = importlib.util.spec_from_file_location("make_orders", ORDERS / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, content in module.make().items():
        assert (ORDERS / name).read_text() == content


def test_held_out_orders_are_disjoint_from_training() -> None:
    train, held_out = ((ORDERS / name).read_text().splitlines() for name in ("train.jsonl", "held_out.jsonl"))
    assert len(held_out) >= 50
    answers = [{json.loads(line)["messages"][-1]["content"] for line in lines} for lines in (train, held_out)]
    assert not answers[0] & answers[1]
    assert len(answers[1]) == len(held_out)


def test_every_line_is_good() -> None:
    for name in ("train.jsonl", "held_out.jsonl"):
        report = load_dataset(io.BytesIO((ORDERS / name).read_bytes()), TOKENIZER, max_length=512).report
        assert (report.duplicates, report.empty, report.over_long) == (0, 0, 0)
