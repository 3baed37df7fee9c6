"""Unservable models are refused at once in one line with the reason; a model directory with an adapter is served."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from server.model.base import UnservableModel
from tests.server.engine.test_parity import PROMPT, our_logprobs, peft_logprobs
from tests.support.offline import load_engine
from tests.support.tiny import tiny_adapter, tiny_model
from tests.sweep.families import tiny_family

pytestmark = pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning", "ignore::UserWarning:peft")


def altered(model: Path, target: Path, **settings: object) -> Path:
    """A copy of a model with other settings in its config.json."""
    shutil.copytree(model, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | settings))
    return target


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"model_type": "nonsense"}, "nonsense"),
        ({"model_type": "bert"}, "cannot be served|not served|no list"),
        ({"max_position_embeddings": None}, "max_position_embeddings"),
        ({"hidden_size": "wide"}, "cannot be served"),
        ({"num_attention_heads": 7}, "cannot be served"),
    ],
    ids=str,
)
def test_an_unservable_model_is_one_line(
    settings: dict[str, object], reason: str, model_dir: Path, cache_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnservableModel, match=reason) as refusal:
        load_engine(altered(model_dir, tmp_path / "m", **settings), cache_dir)
    assert "\n" not in str(refusal.value)


def test_a_directory_without_weights_is_one_line(model_dir: Path, cache_dir: Path, tmp_path: Path) -> None:
    model = altered(model_dir, tmp_path / "m")
    (model / "model.safetensors").unlink()
    with pytest.raises(UnservableModel, match=r"LlamaForCausalLM cannot be served: .*safetensors") as refusal:
        load_engine(model, cache_dir)
    assert "\n" not in str(refusal.value)


def test_a_device_that_is_not_there_is_named(model_dir: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UnservableModel, match="--device cuda: this machine has no CUDA device"):
        load_engine(model_dir, cache_dir, device="cuda")


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_model_beside_an_adapter_is_served_without_it(
    quantization: str, model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mixed = altered(model_dir, tmp_path / "mixed")
    adapter = tiny_adapter(tmp_path / "adapter", model_dir)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, mixed / name)
    with caplog.at_level(logging.WARNING, "lorakeet.engine"):
        engine = load_engine(mixed, tmp_path / "cache", quantization=quantization)
    assert "holds an adapter beside the model" in caplog.text
    expected = peft_logprobs(model_dir, None, quantization, PROMPT)
    assert (our_logprobs(engine, None, PROMPT) - expected).abs().max() < 1e-3


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_linears_with_one_output_are_served(quantization: str, tmp_path: Path) -> None:
    """Such as gates of shared experts. In an MLP of width one, linears have one output or one input."""
    model = tiny_model(tmp_path / "m", intermediate_size=1)
    engine = load_engine(model, tmp_path / "cache", quantization=quantization)
    assert 1 in {linear.out_features for linear in engine.base.linears}
    adapter = tiny_adapter(tmp_path / "adapter", model)
    expected = peft_logprobs(model, adapter, quantization, PROMPT)
    assert (our_logprobs(engine, adapter, PROMPT) - expected).abs().max() < 1e-3


@pytest.mark.parametrize("family", ["granitemoehybrid, dense", "qwen3_moe"])
@pytest.mark.filterwarnings("ignore")  # warnings of transformers about families
def test_router_logits_that_a_config_asks_for_change_nothing(family: str, tmp_path: Path) -> None:
    """They are for a training loss; Granite 4's dense models request them though they have no router."""
    tiny_family(family, tmp_path / "plain")
    asking = altered(tmp_path / "plain", tmp_path / "asking", output_router_logits=True)
    answers = [
        our_logprobs(load_engine(model, tmp_path / "cache"), None, PROMPT) for model in (tmp_path / "plain", asking)
    ]
    assert answers[0].equal(answers[1])


# --- tied weights --------------------------------------------------------------------------------------


def with_head(model: Path, target: Path, change: float) -> Path:
    """A copy of a tied model whose checkpoint also holds the head, with one row changed by `change`."""
    altered(model, target)
    tensors = load_file(target / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    head[5] += change
    save_file(tensors | {"lm_head.weight": head}, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    "config",
    [
        {"trainable_token_indices": [3, 7, 60]},
        {"trainable_token_indices": [3, 7], "ensure_weight_tying": True},
    ],
    ids=str,
)
def test_an_equal_head_in_the_checkpoint_of_a_tied_base(
    config: dict[str, Any], model_dir: Path, cache_dir: Path, tmp_path: Path
) -> None:
    model = with_head(model_dir, tmp_path / "m", 0.0)
    engine = load_engine(model, cache_dir, quantization="none")
    assert engine.ready().tied
    adapter = tiny_adapter(tmp_path / "adapter", model, **config)
    prompt = [*PROMPT[:40], 3, 7, 60, *PROMPT[40:60], 7, 3]
    difference = our_logprobs(engine, adapter, prompt) - peft_logprobs(model, adapter, "none", prompt)
    assert difference.abs().max() < 1e-3


def test_a_head_that_differs_is_not_tied(model_dir: Path, cache_dir: Path, tmp_path: Path) -> None:
    engine = load_engine(with_head(model_dir, tmp_path / "m", 1.0), cache_dir, quantization="none")
    assert not engine.ready().tied
