"""Random adapters load in PEFT, and their GGUF form has the same meaning in llama.cpp's layout."""

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.torch import load_file

from loadtest import synthetic
from loadtest.peers.gguf_adapter import permuted, split_name, write_gguf_adapter

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 64,
}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def test_adapters_fit_the_model_and_differ(model: Path) -> None:
    first, second = synthetic.make_adapters(model / "a", model, 2, rank=4, dtype="float32")
    [half] = synthetic.make_adapters(model / "a", model, 1, rank=4, dtype="bfloat16")
    tensors, others = (load_file(path / "adapter_model.safetensors") for path in (first, second))
    assert len(tensors) == 2 * 7 * 2
    name = "base_model.model.model.layers.1.self_attn.k_proj"
    assert tensors[f"{name}.lora_A.weight"].shape == (4, 32)
    assert tensors[f"{name}.lora_B.weight"].shape == (16, 4)
    assert not tensors[f"{name}.lora_A.weight"].equal(others[f"{name}.lora_A.weight"])
    deviation = float(tensors[f"{name.replace('self_attn.k_proj', 'mlp.up_proj')}.lora_B.weight"].std())
    assert deviation == pytest.approx(synthetic.B_DEVIATION, rel=0.3)
    rounded = load_file(half / "adapter_model.safetensors")
    assert all(rounded[key].equal(value.bfloat16()) for key, value in tensors.items())


def test_peft_takes_them(model: Path) -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    [path] = synthetic.make_adapters(model / "a", model, 1, rank=4, dtype="float32")
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG))
    loaded = peft.PeftModel.from_pretrained(base, path)
    weights = load_file(path / "adapter_model.safetensors")
    module = loaded.base_model.model.model.layers[0].self_attn.q_proj
    assert module.lora_B["default"].weight.equal(
        weights["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    )
    assert module.scaling["default"] == 1.0


def test_gguf_adapter(model: Path) -> None:
    [path] = synthetic.make_adapters(model / "a", model, 1, rank=4, dtype="float32")
    write_gguf_adapter(path, model, model / "a.gguf", half=True)
    reader = gguf.GGUFReader(model / "a.gguf")
    expected = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 4.0}
    for name, value in expected.items():
        field = reader.get_field(name)
        assert field is not None
        assert field.contents() == value
    tensors = {tensor.name: tensor.data for tensor in reader.tensors}
    assert len(tensors) == 2 * 7 * 2
    peft = load_file(path / "adapter_model.safetensors")
    layer = "base_model.model.model.layers.1"
    down = peft[f"{layer}.mlp.down_proj.lora_B.weight"].half().numpy()
    np.testing.assert_array_equal(tensors["blk.1.ffn_down.weight.lora_b"], down)
    # Head size 8: transformers' rows 0..7 of a head are (x0..x3, y0..y3), llama.cpp's are (x0, y0, x1, y1, ...).
    queries = peft[f"{layer}.self_attn.q_proj.lora_B.weight"].half().numpy()
    order = [head * 8 + half * 4 + pair for head in range(4) for pair in range(4) for half in range(2)]
    np.testing.assert_array_equal(tensors["blk.1.attn_q.weight.lora_b"], queries[order])


def test_names() -> None:
    name = "base_model.model.model.layers.12.mlp.up_proj.lora_A.weight"
    assert split_name(name) == (12, "mlp.up_proj", "lora_a")


def test_other_rows_keep_their_order() -> None:
    rows = np.arange(32, dtype=np.float32).reshape(16, 2)
    assert permuted(rows, "self_attn.v_proj", CONFIG) is rows


def test_prompts_share_nothing() -> None:
    prompts = synthetic.random_prompts(4, 8, seed=3)
    assert prompts == synthetic.random_prompts(4, 8, seed=3)
    assert len({prompt[0] for prompt in prompts}) == 4
