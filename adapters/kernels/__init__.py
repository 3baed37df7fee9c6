"""The numerical kernels that earn the product its name: quantised linears, grouped LoRA, paged attention.

Each function has two implementations of one contract: `reference`, plain torch on any device, and `native`, C++ for
fp32 on a CPU. The second is taken where it can be; it has no gradients except in `base_linear`. The docstrings are
`reference`'s. `DecoderPlan` runs all decoder layers of a step in one native call.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from adapters.kernels import native, reference
from adapters.kernels.plan import DecoderPlan
from adapters.kernels.reference import BF16, FP16, FP32, LinearFunction, probe_row_multiple
from adapters.kernels.weight import QuantizedWeight

__all__ = [
    "BF16",
    "FP16",
    "FP32",
    "DecoderPlan",
    "QuantizedWeight",
    "base_linear",
    "lora_add_",
    "paged_attention",
    "prepare",
    "probe_row_multiple",
    "rms_norm",
    "rope_",
    "set_threads",
    "silu_mul",
    "write_kv",
]


def set_threads(threads: int) -> None:
    """Threads that the native kernels run on (by default as many as torch's). No result depends on it."""
    if kernels := native.load():
        kernels.set_threads(threads)


def prepare(weights: Iterable[QuantizedWeight], dtype: torch.dtype) -> None:
    """Once per base: make the library's products batch-invariant for CPU weights that are not the native kernels'."""
    ours = dtype == torch.float32 and native.load() is not None
    rest = {
        weight.shape for weight in weights if weight.device.type == "cpu" and not (ours and native.takes_weight(weight))
    }
    if rest:
        probe_row_multiple(sorted(rest), dtype)


def _native(*tensors: Tensor) -> native.Kernels | None:
    """The native kernels if they can take these tensors: fp32 on the CPU, no gradient wanted."""
    grad = torch.is_grad_enabled()
    for tensor in tensors:
        if not tensor.is_cpu or tensor.dtype != torch.float32 or (grad and tensor.requires_grad):
            return None
    return native.load()


def _in_place(*tensors: Tensor) -> bool:
    return all(tensor.is_contiguous() for tensor in tensors)


def linear_forward(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    kernels = _native(x.detach()) if native.takes_weight(weight) else None
    return (kernels or reference).linear_forward(x, weight, bias)


def linear_backward(dy: Tensor, weight: QuantizedWeight) -> Tensor:
    kernels = _native(dy.detach()) if native.takes_weight(weight) else None
    return (kernels or reference).linear_backward(dy, weight)


def base_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    if not (torch.is_grad_enabled() and x.requires_grad):
        return linear_forward(x, weight, bias)
    y: Tensor = LinearFunction.apply(x, weight, bias, linear_forward, linear_backward)
    return y


def lora_add_(y: Tensor, x: Tensor, a: Tensor, b: Tensor, table: Tensor, scale: Tensor) -> None:
    kernels = _native(y, x) if _in_place(y, a, b) else None
    (kernels or reference).lora_add_(y, x, a, b, table, scale)


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    kernels = _native(k, v, k_cache, v_cache) if _in_place(k_cache, v_cache) else None
    (kernels or reference).write_kv(k, v, k_cache, v_cache, slots)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seqs: Tensor,
    block_tables: Tensor,
    scaling: float,
    window: int = 0,
) -> Tensor:
    kernels = _native(q, k_cache, v_cache) if _in_place(k_cache, v_cache) else None
    return (kernels or reference).paged_attention(q, k_cache, v_cache, seqs, block_tables, scaling, window)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (_native(x, weight) or reference).rms_norm(x, weight, eps)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return (_native(gate, up) or reference).silu_mul(gate, up)


def rope_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    kernels = _native(q, k, cos, sin) if _in_place(q, k) else None
    (kernels or reference).rope_(q, k, cos, sin)


for _function in (base_linear, lora_add_, write_kv, paged_attention, rms_norm, silu_mul, rope_):
    _function.__doc__ = getattr(reference, _function.__name__).__doc__
