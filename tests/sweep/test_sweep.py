"""A slice of the sweep: types served like transformers and PEFT, and types refused in one line by name."""

from pathlib import Path

import pytest

from tests.sweep.__main__ import table
from tests.sweep.verdict import judge

TYPES = [
    *("llama", "qwen3", "gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "granite_swa", "phi3", "cohere2"),
    *("hunyuan_v1_dense", "nemotron", "mistral3", "qwen3_moe", "qwen3_5_text", "lfm2", "falcon_h1"),
]
# Wrappers with different names or positions, and variants of a type.
MORE = [
    "granitemoehybrid",
    "nemotron_h",
    "qwen3_5_moe_text",
    "ernie4_5_moe",
    "qwen3_vl",
    "smolvlm",
    "deepseek_vl",
    "hunyuan_vl",
    "granitemoehybrid, dense",
    "phi3, longrope",
]
pytestmark = pytest.mark.filterwarnings("ignore")  # warnings of transformers and PEFT about families


@pytest.mark.parametrize("family", [*TYPES, *(pytest.param(family, marks=pytest.mark.slow) for family in MORE)])
def test_served_types_answer_and_train_as_transformers_and_peft(family: str, tmp_path: Path) -> None:
    verdict = judge(family, tmp_path)
    assert verdict.word == "served", verdict.reason


@pytest.mark.parametrize(
    ("family", "named"),
    [
        ("jetmoe", "mixture-of-experts"),
        ("minimax", "linear_attention"),
        ("bloom", "ALiBi"),
        ("mpt", "ALiBi"),
        ("bart", "encoder"),
        ("vision-encoder-decoder", "encoder"),
        ("gptj", "attention cannot be replaced"),
        ("falcon", "attention cannot be replaced"),
        ("dbrx", "moe_num_experts"),
        ("gemma4_assistant", "drafts for another model"),
        ("diffusion_gemma", "denoises a whole text"),
    ],
)
def test_refused_types_are_refused_by_name(family: str, named: str, tmp_path: Path) -> None:
    verdict = judge(family, tmp_path)
    assert verdict.word == "refused", verdict.reason
    assert named in verdict.reason


def test_the_table_tells_served_from_refused() -> None:
    text = table({"b": ("refused", "for a|b"), "a": ("served", "answers 1.0e-06, losses 1.0e-06")}, "transformers 5")
    served, refused = text.split("## Refused (1)")
    assert "## Served (1)" in served
    assert "| `a` | answers" in served
    assert "| `b` | for a/b |" in refused
