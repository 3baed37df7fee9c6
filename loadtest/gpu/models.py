"""Models for measurements: shapes of real ones with random weights in Hugging Face layout, and their sizes in bytes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loadtest.synthetic import linear_shapes

LLAMA_8B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
QWEN_8B: dict[str, Any] = LLAMA_8B | {
    "model_type": "qwen3",
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "vocab_size": 151936,
    "rope_theta": 1000000.0,
}
# Small enough for a CPU, for --smoke.
_TINY = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 1024,
    "max_position_embeddings": 512,
}


@dataclass(frozen=True)
class Size:
    """The sizes of all measurements."""

    device: str
    models: dict[str, dict[str, Any]]
    counts: tuple[int, ...]  # of requests and of their adapters, for the LoRA tax
    prompt: int
    tokens: int
    rounds: int
    cold: int  # cold adapters, in each of two passes
    spacing: float  # seconds between them
    sequences: tuple[int, int]  # of a training step: number, length
    narrow: int  # tokens of a micro-batch in joint training
    steps: int
    window: float  # seconds of standing load

    @property
    def full(self) -> bool:
        """Whether the figures are meaningful."""
        return self.device == "cuda"


FULL = Size(
    device="cuda",
    models={"Llama-3.1-8B": LLAMA_8B, "Qwen3-8B": QWEN_8B},
    counts=(1, 8, 32, 64),
    prompt=64,
    tokens=128,
    rounds=3,
    cold=12,
    spacing=0.25,
    sequences=(4, 512),
    narrow=128,
    steps=3,
    window=45.0,
)
SMOKE = Size(
    device="cpu",
    models={"Llama-3.1-8B": LLAMA_8B | _TINY},
    counts=(1, 2),
    prompt=8,
    tokens=6,
    rounds=1,
    cold=2,
    spacing=0.05,
    sequences=(2, 16),
    narrow=16,
    steps=1,
    window=1.0,
)


def make_model(folder: Path, shape: dict[str, Any], device: str) -> Path:
    """Write a model of this shape with random weights, in bf16; return its folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(**(shape | special))
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config)
    finally:
        torch.set_default_dtype(default)
    model.save_pretrained(folder)
    del model
    if device == "cuda":
        torch.cuda.empty_cache()
    return folder


def bytes_per_token(shape: dict[str, Any]) -> float:
    """Return the bytes read to decode one token: NF4 weights with their scales, and the bf16 head."""
    weights = sum(ins * outs for ins, outs in linear_shapes(shape).values())
    return weights * (1 / 2 + 1 / 64) + 2 * shape["hidden_size"] * shape["vocab_size"]


def adapter_bytes(shape: dict[str, Any], rank: int) -> int:
    """Return the bytes of a bf16 adapter on all linears."""
    return 2 * rank * sum(ins + outs for ins, outs in linear_shapes(shape).values())
