"""The engine against PEFT on the same quantised base: prompt log-probabilities within 1e-3 in fp32."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from server.engine.engine import Engine
from tests.support.offline import load_engine, publish, request, run
from tests.support.tiny import tiny_adapter, tiny_model

PROMPT = torch.randint(3, 500, (90,), generator=torch.Generator().manual_seed(1)).tolist()

ADAPTERS: dict[str, dict[str, Any]] = {
    "rank 3": {"r": 3, "lora_alpha": 5},
    "rank 8, attention": {"r": 8, "target_modules": ["q_proj", "v_proj"]},
    "rank 17, mlp": {"r": 17, "target_modules": ["gate_proj", "down_proj"]},
    "rank 64": {"r": 64, "lora_alpha": 32},
    "rank 16, bf16": {"r": 16, "dtype": torch.bfloat16},
    "rank 16, fp16": {"r": 16, "dtype": torch.float16},
    "rsLoRA": {"r": 16, "lora_alpha": 8, "use_rslora": True},
    "rank pattern": {"r": 4, "rank_pattern": {"q_proj": 12, "layers.1.mlp.up_proj": 2}},
    "alpha pattern": {"r": 4, "alpha_pattern": {"down_proj": 32, "layers.0.self_attn.k_proj": 1}},
    "layers": {"layers_to_transform": [0, 2], "layers_pattern": "layers"},
    "expression": {"target_modules": r".*\.(q|o)_proj"},
}


def quantisation(name: str) -> transformers.BitsAndBytesConfig | None:
    if name == "none":
        return None
    if name == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=name,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )


def dequantised(module: Any) -> torch.nn.Linear:
    """The int8 weights dequantised, without LLM.int8's rounding of activations, which depends on the batch."""
    linear = torch.nn.Linear(module.in_features, module.out_features, bias=False)
    linear.weight.data = module.weight.CB.float() * module.weight.SCB[:, None] / 127
    return linear


def peft_logprobs(model: Path, adapter: Path | None, name: str, prompt: list[int], device: str = "cpu") -> torch.Tensor:
    """Log-probability of each prompt token but the first, by transformers, bitsandbytes and PEFT.

    On the engine's own device: another device may round a weight halfway between two codes differently.
    """
    base: Any = transformers.AutoModelForCausalLM.from_pretrained(
        model, quantization_config=quantisation(name), dtype=torch.float32, device_map={"": device}
    )
    for path, module in list(base.named_modules()):
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # otherwise it repacks the weight
        if name == "int8" and hasattr(module.weight if hasattr(module, "weight") else None, "SCB"):
            base.set_submodule(path, dequantised(module))
    if adapter is not None:
        base = peft.PeftModel.from_pretrained(base, adapter, torch_device=device)
    with torch.no_grad():
        logits = base(torch.tensor([prompt], device=device)).logits[0].cpu()
    return logits[:-1].log_softmax(-1).gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]


def our_logprobs(engine: Engine, adapter: Path | None, prompt: list[int]) -> torch.Tensor:
    reference = None if adapter is None else publish(engine, adapter)
    answer = run(engine, [request("a", prompt, reference, max_tokens=0, prompt_logprobs=0)])["a"]
    assert answer.error is None
    assert answer.prompt_logprobs[0] is None
    return torch.tensor([entry.logprob for entry in answer.prompt_logprobs if entry is not None])


@pytest.fixture(scope="module")
def engine(model_dir: Path, cache_dir: Path) -> Engine:
    return load_engine(model_dir, cache_dir)


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters_equal_peft(name: str, engine: Engine, model_dir: Path, tmp_path: Path) -> None:
    adapter = tiny_adapter(tmp_path / "adapter", model_dir, seed=len(name), **ADAPTERS[name])
    expected = peft_logprobs(model_dir, adapter, "nf4", PROMPT)
    ours = our_logprobs(engine, adapter, PROMPT)
    torch.testing.assert_close(ours, expected, atol=1e-3, rtol=0)
    plain = our_logprobs(engine, None, PROMPT)
    assert (ours - plain).abs().max() > 0.01, "the adapter must have an effect, or this test shows nothing"


@pytest.mark.parametrize("name", ["nf4", "fp4", "int8", "none"])
def test_every_quantisation_equals_peft(name: str, model_dir: Path, cache_dir: Path, tmp_path: Path) -> None:
    adapter = tiny_adapter(tmp_path / "adapter", model_dir)
    engine = load_engine(model_dir, cache_dir, quantization=name)
    for directory in (None, adapter):
        expected = peft_logprobs(model_dir, directory, name, PROMPT)
        torch.testing.assert_close(our_logprobs(engine, directory, PROMPT), expected, atol=1e-3, rtol=0)


FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2, biases": {
        "config_class": transformers.Qwen2Config,
        "model_class": transformers.Qwen2ForCausalLM,
    },
    "qwen3, norms on q and k": {
        "config_class": transformers.Qwen3Config,
        "model_class": transformers.Qwen3ForCausalLM,
        "head_dim": 32,
        "tie_word_embeddings": False,
    },
    "mistral, sliding window": {
        "config_class": transformers.MistralConfig,
        "model_class": transformers.MistralForCausalLM,
        "sliding_window": 24,
    },
    "llama, odd widths": {
        "hidden_size": 80,
        "intermediate_size": 112,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
    },
}


@pytest.mark.parametrize("name", FAMILIES)
def test_families_equal_peft(name: str, cache_dir: Path, tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "model", **FAMILIES[name])
    adapter = tiny_adapter(tmp_path / "adapter", model)
    engine = load_engine(model, cache_dir)
    for directory in (None, adapter):
        expected = peft_logprobs(model, directory, "nf4", PROMPT)
        torch.testing.assert_close(our_logprobs(engine, directory, PROMPT), expected, atol=1e-3, rtol=0)
