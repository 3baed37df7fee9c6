"""PEFT's own log-probabilities of a prompt: transformers, bitsandbytes and PEFT on a separate base, on the CPU in
float32.

For a process of its own, where PEFT is installed. It is slow, takes the memory of a second base, and serves no
requests.
"""

from collections.abc import Mapping
from typing import Any

import peft
import torch
import transformers


def logprobs(model: str, quantization: str, adapter: str, prompt: list[int]) -> list[float]:
    """Log-probability of every token of `prompt` but the first.

    Args:
        model: directory of the base.
        quantization: "nf4", "fp4" or "none".
        adapter: directory of the adapter.
    """
    quantized = None
    if quantization != "none":
        quantized = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quantization,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    base = transformers.AutoModelForCausalLM.from_pretrained(
        model, quantization_config=quantized, dtype=torch.float32, device_map={"": "cpu"}
    )
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - no attribute of every module; it rounds
    wrapped = peft.PeftModel.from_pretrained(base, adapter, torch_device="cpu")
    ids = torch.tensor(prompt)
    with torch.no_grad():
        logits = wrapped(ids[None]).logits[0, :-1]  # [tokens - 1, vocabulary]
    scores: list[float] = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0].tolist()
    return scores


def carry_out(order: Mapping[str, Any]) -> list[float]:
    """`logprobs` with the order's fields."""
    return logprobs(**order)
