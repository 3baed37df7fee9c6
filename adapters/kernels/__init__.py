"""The numerical kernels that earn the product its name: NF4 linears, grouped LoRA, paged attention.

`reference` holds them in plain torch, for any device.
"""

from adapters.kernels.reference import (
    BF16,
    FP16,
    FP32,
    base_linear,
    lora_add_,
    paged_attention,
    probe_row_multiple,
    rms_norm,
    rope_,
    silu_mul,
    write_kv,
)
from adapters.kernels.weight import QuantizedWeight

__all__ = [
    "BF16",
    "FP16",
    "FP32",
    "QuantizedWeight",
    "base_linear",
    "lora_add_",
    "paged_attention",
    "probe_row_multiple",
    "rms_norm",
    "rope_",
    "silu_mul",
    "write_kv",
]
