"""Random adapters in PEFT's file layout, and random prompts.

Speed does not depend on an adapter's values, but they must not be zero: with a deviation of about 0.08 in B, a random
adapter changes greedy tokens, which reveals a server that ignores it. Llama-like decoders only; torch is imported only
for writing files.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np

Dtype = Literal["float32", "bfloat16"]
DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16")

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
B_DEVIATION = 0.08


def linear_shapes(config: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Return module name -> (in, out) of all linears in the decoder, from a model's config.json. Raises KeyError."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    queries, keys = heads * head, (config.get("num_key_value_heads") or heads) * head
    layer = {
        "self_attn.q_proj": (hidden, queries),
        "self_attn.k_proj": (hidden, keys),
        "self_attn.v_proj": (hidden, keys),
        "self_attn.o_proj": (queries, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
    return {
        f"model.layers.{i}.{name}": shape for i in range(config["num_hidden_layers"]) for name, shape in layer.items()
    }


def make_adapters(folder: Path, model: Path, count: int, *, rank: int, dtype: Dtype, seed: int = 0) -> list[Path]:
    """Write `count` different rank-`rank` adapters on all linears of `model` (a Hugging Face folder).

    Returns their folders, `folder/<dtype>-<index>`. The values of adapter i are the same for every dtype, up to
    rounding. Existing files are replaced.
    """
    import torch
    from safetensors.torch import save_file

    shapes = linear_shapes(json.loads((model / "config.json").read_text()))

    def make(index: int) -> Path:
        rng = np.random.default_rng([seed, index])

        def draw(rows: int, columns: int, deviation: float) -> torch.Tensor:
            values = rng.standard_normal((rows, columns), dtype=np.float32) * np.float32(deviation)
            return torch.from_numpy(values).to(getattr(torch, dtype))

        tensors = {}
        for name, (inputs, outputs) in shapes.items():
            prefix = f"base_model.model.{name}"
            tensors[f"{prefix}.lora_A.weight"] = draw(rank, inputs, inputs**-0.5)
            tensors[f"{prefix}.lora_B.weight"] = draw(outputs, rank, B_DEVIATION)
        path = folder / f"{dtype}-{index}"
        path.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
        (path / "adapter_config.json").write_text(json.dumps(peft_config(rank), indent=1))
        return path

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # drawing numbers releases Python's lock
        return list(pool.map(make, range(count)))


def peft_config(rank: int) -> dict[str, Any]:
    """Return adapter_config.json of an adapter on all linears, scaled by alpha / rank = 1."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(TARGETS),
    }


def random_prompts(count: int, tokens: int, seed: int, *, low: int = 100, high: int = 10_000) -> list[list[int]]:
    """Return prompts of random token ids from `[low, high]`, without common prefixes, so that no cache helps."""
    rng = np.random.default_rng(seed)
    ids: list[list[int]] = rng.integers(low, high, size=(count, tokens), endpoint=True).tolist()
    return ids
