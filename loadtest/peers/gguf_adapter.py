"""Conversion of a PEFT adapter of a Llama-like model to a GGUF file for llama-server.

llama.cpp stores the rows of q and k in another order than transformers (its rotary embedding turns adjacent pairs, not
halves), so the rows of B get the same permutation as the base's weights.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf_adapter(peft: Path, model: Path, target: Path, *, half: bool) -> None:
    """Convert the PEFT folder `peft`, made for the Hugging Face folder `model`, to the file `target`.

    `half`: store fp16 instead of fp32. Raises KeyError for a module that llama.cpp's Llama does not have.
    """
    import gguf
    from safetensors.torch import load_file

    settings = json.loads((peft / "adapter_config.json").read_text())
    config = json.loads((model / "config.json").read_text())
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", float(settings["lora_alpha"]))
    for name, tensor in load_file(peft / "adapter_model.safetensors").items():
        layer, module, side = split_name(name)
        values = tensor.float().numpy()  # A: [rank, in]; B: [out, rank]
        if side == "lora_b":
            values = permuted(values, module, config)
        values = np.ascontiguousarray(values, dtype=np.float16 if half else np.float32)
        writer.add_tensor(f"blk.{layer}.{_NAMES[module]}.weight.{side}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def split_name(name: str) -> tuple[int, str, str]:
    """Split `base_model.model.model.layers.3.mlp.up_proj.lora_A.weight` into (3, "mlp.up_proj", "lora_a")."""
    path, side = name.removesuffix(".weight").rsplit(".", 1)
    layer, module = path.split(".layers.", 1)[1].split(".", 1)
    return int(layer), module, side.lower()


def permuted(rows: NDArray[np.float32], module: str, config: dict[str, Any]) -> NDArray[np.float32]:
    """Return rows `[out, ...]` in llama.cpp's order: per head of q and k, (halves, pairs) becomes (pairs, halves)."""
    heads = {
        "self_attn.q_proj": config["num_attention_heads"],
        "self_attn.k_proj": config.get("num_key_value_heads") or config["num_attention_heads"],
    }.get(module)
    if heads is None:
        return rows
    out = rows.shape[0]
    return rows.reshape(heads, 2, out // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)
