"""The numerical kernels: quantised linears, grouped LoRA, paged attention, and the rest of a step.

Each function has up to three implementations of one contract: `reference`, plain torch on any device; `native`, C++
for fp32 on a CPU; and `triton`, for NVIDIA GPUs. The latter two are preferred where they support the inputs; they have
gradients only in `base_linear` and `grouped_linear`. The docstrings are those of `reference`. `plan_decoder` runs all
decoder layers of a step.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from adapters.kernels import build, native, reference, triton
from adapters.kernels.experts import ExpertWeights
from adapters.kernels.native import Truncation
from adapters.kernels.plan import DecoderPlan
from adapters.kernels.recurrence import Recurrence, convolve, convolve_sequence, recur
from adapters.kernels.reference import BF16, FP16, FP32, SCALE_BYTES, GroupedFunction, LinearFunction, row_multiple
from adapters.kernels.weight import QuantizedWeight

__all__ = [
    "BF16",
    "FP16",
    "FP32",
    "SCALE_BYTES",
    "Decoder",
    "DecoderPlan",
    "ExpertWeights",
    "QuantizedWeight",
    "Recurrence",
    "Truncation",
    "argmax",
    "base_linear",
    "convolve",
    "convolve_sequence",
    "cpu_kernels",
    "grouped_linear",
    "implementation",
    "is_deterministic",
    "lora_add_",
    "one_torch_thread",
    "output_argmax",
    "paged_attention",
    "plan_argmax",
    "plan_decoder",
    "prepare",
    "recur",
    "rms_norm",
    "rope_",
    "runs_natively",
    "set_deterministic",
    "set_threads",
    "silu_mul",
    "write_kv",
]


def set_threads(threads: int) -> None:
    """Set the number of threads of the native kernels (by default torch's). Results do not depend on it."""
    if kernels := native.load():
        kernels.set_threads(threads)


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Run torch on one thread: for its small work between native kernels, waking threads costs more than it saves."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def set_deterministic(fixed: bool) -> None:
    """Make a row's bits on a GPU independent of other rows, at some cost in speed. On a CPU they always are."""
    triton.fix_tiles(fixed)


def is_deterministic() -> bool:
    """Return the setting of `set_deterministic`."""
    return triton.is_deterministic()


def runs_natively(
    device: torch.device, dtype: torch.dtype, weights: Iterable[QuantizedWeight | ExpertWeights] = ()
) -> bool:
    """Whether native kernels are available for this device and dtype, and support these weights."""
    available = device.type == "cpu" and dtype == torch.float32 and native.load() is not None
    return available and all(map(native.supports_weight, weights))


def implementation(device: torch.device, dtype: torch.dtype) -> str:
    """Return the name of the implementation for this device and dtype: native (avx512), triton or torch."""
    if runs_natively(device, dtype):
        return f"native ({build.best_instruction_set()})"
    return "triton" if device.type == "cuda" and triton.load() is not None else "torch"


def prepare(weights: Iterable[QuantizedWeight], dtype: torch.dtype) -> None:
    """Probe, once per base, the row multiples for CPU weights that torch's products multiply."""
    ours = runs_natively(torch.device("cpu"), dtype)
    rest = {
        weight.shape
        for weight in weights
        if weight.device.type == "cpu" and not (ours and native.supports_weight(weight))
    }
    for out_features, in_features in sorted(rest):
        row_multiple(out_features, in_features, dtype, torch.get_num_threads())


def _compiled_kernels(*tensors: Tensor) -> Any:
    """Return the compiled kernels for these tensors' device and dtype; None without any, or if a gradient is needed."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return None
    if triton.supports(*tensors) and (kernels := triton.load()):
        return kernels
    return native.load() if all(tensor.is_cpu and tensor.dtype == torch.float32 for tensor in tensors) else None


def _all_contiguous(*tensors: Tensor) -> bool:
    return all(tensor.is_contiguous() for tensor in tensors)


def _linear(x: Tensor, weight: QuantizedWeight | ExpertWeights) -> Any:
    kernels = _compiled_kernels(x.detach())
    return kernels if not isinstance(kernels, native.Kernels) or native.supports_weight(weight) else None


def linear_forward(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    return (_linear(x, weight) or reference).linear_forward(x, weight, bias)


def linear_backward(dy: Tensor, weight: QuantizedWeight) -> Tensor:
    return (_linear(dy, weight) or reference).linear_backward(dy, weight)


def base_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    if not (torch.is_grad_enabled() and x.requires_grad):
        return linear_forward(x, weight, bias)
    y: Tensor = LinearFunction.apply(x, weight, bias, linear_forward, linear_backward)
    return y


def grouped_forward(x: Tensor, weights: ExpertWeights, counts: Tensor) -> Tensor:
    return (_linear(x, weights) or reference).grouped_forward(x, weights, counts)


def grouped_linear(x: Tensor, weights: ExpertWeights, counts: Tensor) -> Tensor:
    if not (torch.is_grad_enabled() and x.requires_grad):
        return grouped_forward(x, weights, counts)
    y: Tensor = GroupedFunction.apply(x, weights, counts, grouped_forward, linear_backward)
    return y


def lora_add_(y: Tensor, x: Tensor, a: Tensor, b: Tensor, table: Tensor, scale: Tensor, ranks: int = 0) -> None:
    kernels = _compiled_kernels(y, x) if _all_contiguous(y, a, b) else None
    (kernels or reference).lora_add_(y, x, a, b, table, scale, ranks)


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    kernels = _compiled_kernels(k, v) if _all_contiguous(k_cache, v_cache) else None
    (kernels or reference).write_kv(k, v, k_cache, v_cache, slots)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    seqs: Tensor,
    block_tables: Tensor,
    scaling: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    kernels = _compiled_kernels(q) if _all_contiguous(k_cache, v_cache) else None
    return (kernels or reference).paged_attention(
        q, k_cache, v_cache, seqs, block_tables, scaling, window, softcap, sinks
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return (_compiled_kernels(x, weight) or reference).rms_norm(x, weight, eps)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    return (_compiled_kernels(gate, up) or reference).silu_mul(gate, up)


def rope_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    kernels = _compiled_kernels(q, k, cos, sin) if _all_contiguous(q, k) else None
    (kernels or reference).rope_(q, k, cos, sin)


def argmax(scores: Tensor, *, masked: bool = False) -> Tensor:
    return (cpu_kernels(scores) or reference).argmax(scores, masked=masked)


def output_argmax(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    kernels = _linear(x, weight)
    if isinstance(kernels, native.Kernels):
        return kernels.output_argmax(x, weight, bias)
    return argmax(linear_forward(x, weight, bias))


def plan_argmax(weight: QuantizedWeight, bias: Tensor | None) -> Callable[[Tensor], Tensor] | None:
    """Return `output_argmax` as a function of contiguous fp32 rows; None without a usable sketch."""
    kernels = native.load()
    if kernels is None or weight.sketch is None or bias is not None or not native.supports_weight(weight):
        return None
    return kernels.plan_output_argmax(weight)


def cpu_kernels(scores: Tensor) -> native.Kernels | None:
    """Return the C++ kernels if they support these scores, for `draw` and `logprobs`; else None."""
    return native.load() if scores.is_cpu and scores.dtype == torch.float32 else None


class Decoder(Protocol):
    """All decoder layers and the last norm of a model, over its KV caches and adapter pools."""

    def run(
        self,
        hidden: Tensor,
        positions: Tensor,
        slots: Tensor,
        seqs: Tensor,
        block_tables: Tensor,
        table: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        """See `plan.DecoderPlan.run`."""


def plan_decoder(
    decoder: nn.Module,
    pool_a: Sequence[Tensor],
    pool_b: Sequence[Tensor],
    k_caches: Sequence[Tensor],
    v_caches: Sequence[Tensor],
    windows: Sequence[int],
) -> Decoder | None:
    """Return a planned decoder, which runs without Python modules, or None. Arguments: see `plan.DecoderPlan.build`."""
    numbers = [tensor for tensor in decoder.parameters() if tensor.is_floating_point()][:1]  # its dtype is the model's
    if triton.supports(*numbers) and triton.load():
        from adapters.kernels.triton.decoder import TritonDecoder

        return TritonDecoder.build(decoder, pool_a, pool_b, k_caches, v_caches, windows)
    return DecoderPlan.build(decoder, pool_a, pool_b, k_caches, v_caches, windows)


for _function in (
    base_linear,
    grouped_linear,
    lora_add_,
    write_kv,
    paged_attention,
    rms_norm,
    silu_mul,
    rope_,
    argmax,
    output_argmax,
):
    _function.__doc__ = getattr(reference, _function.__name__).__doc__
