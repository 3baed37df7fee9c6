"""The Triton kernels under the names and signatures of `reference`."""

from adapters.kernels.reference import linear_backward
from adapters.kernels.triton.attention import paged_attention, write_kv
from adapters.kernels.triton.elementwise import add_rms_norm_, rms_norm, rope_, silu_mul
from adapters.kernels.triton.experts import grouped_forward
from adapters.kernels.triton.linear import linear_forward
from adapters.kernels.triton.lora import lora_add_, lora_add_several_
from adapters.kernels.triton.recurrence import convolve, recur

__all__ = [
    "add_rms_norm_",
    "convolve",
    "grouped_forward",
    "linear_backward",
    "linear_forward",
    "lora_add_",
    "lora_add_several_",
    "paged_attention",
    "recur",
    "rms_norm",
    "rope_",
    "silu_mul",
    "write_kv",
]
