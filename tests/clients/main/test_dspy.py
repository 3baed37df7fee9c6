"""dspy: a typed signature through its adapters for chat and for JSON."""

from typing import Literal

import dspy
import pytest
from dspy.utils.exceptions import AdapterParseError


class Sort(dspy.Signature):
    """Say whether the bird is red or green."""

    bird: str = dspy.InputField()
    colour: Literal["red", "green"] = dspy.OutputField()


@pytest.fixture
def lm(api: str, model: str) -> dspy.LM:
    return dspy.LM(f"openai/{model}", api_base=api, api_key="none", max_tokens=100, cache=False, num_retries=0)


def predict(lm: dspy.LM) -> None:
    """Predict once. dspy sends no grammar for a model that it does not know, so a small model may miss the format."""
    try:
        assert dspy.Predict(Sort)(bird="a macaw").colour in ("red", "green")
    except AdapterParseError as fault:
        assert "failed to parse" in str(fault)
    assert lm.history
    assert all(entry["response"] is not None for entry in lm.history)


def test_json_adapter(lm: dspy.LM) -> None:
    with dspy.context(lm=lm, adapter=dspy.JSONAdapter()):
        predict(lm)


def test_chat_adapter(lm: dspy.LM) -> None:
    """Free text in dspy's own format; if a small model misses the format, dspy retries with JSON."""
    with dspy.context(lm=lm, adapter=dspy.ChatAdapter()):
        predict(lm)
