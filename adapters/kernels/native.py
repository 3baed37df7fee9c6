"""The C++ kernels on CPU fp32 tensors, with the same signatures as `reference`.

Binds the compiled library (build.py) through ctypes. The package's `__init__` chooses the implementation of a call.
"""

import ctypes
import logging
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import POINTER, Structure, addressof, byref, c_float, c_int, c_int32, c_int64, c_void_p
from dataclasses import replace
from functools import cache
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from adapters.kernels import build
from adapters.kernels.experts import ExpertWeights
from adapters.kernels.placement import empty_on_huge_pages
from adapters.kernels.weight import Int8Copy, QuantizedWeight, Sketch

log = logging.getLogger(__name__)

_disabled = False

_BLOCK = 64  # the kernels' blocks of inputs, as in linear.cpp
KV_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float8_e4m3fn: 3, torch.int8: 4}
_DENSE_KINDS = {torch.float32: 2, torch.bfloat16: 3, torch.float16: 4}


class Truncation(NamedTuple):
    """Sampling truncation of one row.

    Attributes:
        temperature: more than 0.
        min_p: least weight, as a share of the likeliest token's.
        top_k: number of tokens kept; 0 for all.
        top_p: least share of the total weight that the kept tokens have together.
    """

    temperature: float
    min_p: float = 0.0
    top_k: int = 0
    top_p: float = 1.0


class WeightStruct(Structure):
    """`Weight` of linear.h."""

    _fields_ = [
        ("data", c_void_p),
        ("scales", c_void_p),
        ("code", c_void_p),
        ("bias", c_void_p),
        ("kind", c_int32),
        ("out", c_int32),
        ("in", c_int32),
        ("blocksize", c_int32),
        ("int8", c_void_p),
        ("levels", c_void_p),
    ]


class ExpertsStruct(Structure):
    """`Experts` of experts.h."""

    _fields_ = [
        ("first", WeightStruct),
        *((name, c_int64) for name in ("bytes", "scales")),
        *((name, c_void_p) for name in ("absmax", "nested_absmax", "nested_code", "offset")),
        ("nested_blocksize", c_int64),
    ]


class SketchStruct(Structure):
    """`Sketch` of sketch.cpp."""

    _fields_ = [*((name, c_void_p) for name in ("data", "scale", "norm", "error")), ("greatest_norm", c_float)]


class AdaptersStruct(Structure):
    """`Adapters` of lora.h."""

    _fields_ = [
        ("a", c_void_p),
        ("b", c_void_p),
        ("table", c_void_p),
        ("scale", c_void_p),
        ("segments", c_int32),
        ("in", c_int32),
        ("out", c_int32),
    ]


class KvCacheStruct(Structure):
    """`KvCache` of attention.h."""

    _fields_ = [("k", c_void_p), ("v", c_void_p), ("block_size", c_int32), ("kind", c_int32)]


class AttentionStruct(Structure):
    """`Attention` of attention.h."""

    _fields_ = [
        ("q", c_void_p),
        ("out", c_void_p),
        ("seqs", c_void_p),
        ("block_tables", c_void_p),
        ("tokens", c_int32),
        ("heads", c_int32),
        ("kv_heads", c_int32),
        ("head_dim", c_int32),
        ("requests", c_int32),
        ("max_blocks", c_int32),
        ("scaling", c_float),
        ("window", c_int32),
        ("softcap", c_float),
        ("sinks", c_void_p),
        ("cache", KvCacheStruct),
    ]


_SIGNATURES: dict[str, list[type]] = {
    "lk_set_threads": [c_int],
    "lk_set_vnni": [c_int],
    "lk_linear": [POINTER(WeightStruct), c_void_p, c_void_p, c_int, c_void_p],
    "lk_linear_run": [POINTER(c_void_p), c_int, c_void_p, c_int, c_void_p],
    "lk_grouped_linear": [POINTER(ExpertsStruct), c_void_p, c_void_p, c_int, c_int, c_void_p],
    "lk_int8_copy": [POINTER(WeightStruct), c_float, c_void_p],
    "lk_int8_experts": [POINTER(ExpertsStruct), c_int, c_float, c_void_p],
    "lk_linear_backward": [POINTER(WeightStruct), c_void_p, c_int, c_void_p],
    "lk_dequantize": [POINTER(WeightStruct), c_void_p],
    "lk_lora_add": [POINTER(AdaptersStruct), c_void_p, c_void_p],
    "lk_attention": [POINTER(AttentionStruct)],
    "lk_write_kv": [c_void_p, c_void_p, c_void_p, c_int, c_int, c_int, POINTER(KvCacheStruct)],
    "lk_rms_norm": [c_void_p, c_void_p, c_float, c_int, c_int, c_void_p],
    "lk_silu_mul": [c_void_p, c_void_p, c_int64, c_void_p],
    "lk_rope": [c_void_p, c_void_p, c_void_p, c_void_p, c_int, c_int, c_int, c_int, c_int],
    "lk_argmax": [c_void_p, c_int, c_int64, c_int, c_void_p],
    "lk_mask": [c_void_p, c_int64, c_void_p, c_int64],
    "lk_draw": [c_void_p, c_int, c_int64, *[c_void_p] * 6],
    "lk_logprobs": [c_void_p, c_int, c_int64, c_void_p, c_int, *[c_void_p] * 4],
    "lk_output_argmax": [POINTER(WeightStruct), POINTER(SketchStruct), c_void_p, c_int, c_void_p],
    "lk_decode": [c_void_p, c_void_p],
    "lk_convolve": [c_void_p],
    "lk_recur": [c_void_p],
    "lk_read": [c_void_p, c_int64],
    "lk_multiply_add": [c_int],
}


def load(instruction_set: str | None = None) -> "Kernels | None":
    """Return the compiled kernels, by default for this CPU's best instruction set.

    None if `LORAKEET_NATIVE=0`, within `switched_off`, or if they cannot be compiled, which is logged as a warning.
    """
    if _disabled or os.environ.get("LORAKEET_NATIVE") == "0":
        return None
    return _load(instruction_set or build.best_instruction_set())


@contextmanager
def switched_off() -> Iterator[None]:
    """Make `load` return None within the context, in any thread, so that plain torch runs, for comparison."""
    global _disabled
    _disabled = True
    try:
        yield
    finally:
        _disabled = False


@cache
def _load(instruction_set: str) -> "Kernels | None":
    try:
        return Kernels(ctypes.CDLL(str(build.compiled_library(instruction_set))), instruction_set)
    except (build.BuildError, OSError) as fault:
        log.warning("running without the C++ kernels, several times slower on a CPU: %s", fault)
        return None


def address(tensor: Tensor | None) -> int | None:
    """Return a tensor's address for a C pointer; None is null."""
    return None if tensor is None else tensor.data_ptr()


def _contiguous(tensor: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return tensor.detach().to(dtype).contiguous()


class Kernels:
    """One loaded library. Any thread may call it; while one call uses the thread pool, others use only their own."""

    def __init__(self, library: ctypes.CDLL, instruction_set: str) -> None:
        self.instruction_set = instruction_set
        self._lib = library
        self._weights: WeakKeyDictionary[QuantizedWeight, tuple[WeightStruct, Tensor | None]] = WeakKeyDictionary()
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, None
        self.set_threads(torch.get_num_threads())

    def set_threads(self, threads: int) -> None:
        """Set the number of threads, the caller's included. Results do not depend on it."""
        self._lib.lk_set_threads(threads)

    def set_vnni(self, allowed: bool) -> None:
        """Allow the CPU's 8-bit dot products, if it has them. Results do not depend on it."""
        self._lib.lk_set_vnni(allowed)

    def weight(self, weight: QuantizedWeight) -> WeightStruct:
        """Return the library's view of a weight, which must outlive it; 4-bit scales are kept with it as fp32."""
        held = self._weights.get(weight)
        if held is None:  # setdefault, since another thread may have added one in the meantime and be using it
            held = self._weights.setdefault(weight, _weight_struct(weight))
        return held[0]

    def linear_forward(self, x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
        x, bias = _contiguous(x), None if bias is None else _contiguous(bias)
        y = x.new_empty(len(x), weight.shape[0])
        self._lib.lk_linear(byref(self.weight(weight)), address(bias), x.data_ptr(), len(x), y.data_ptr())
        return y

    def linear_run(self, x: Tensor, weights: Sequence[QuantizedWeight]) -> Tensor:
        """Run `linear_forward` with several weights of one shape, for the benchmark. Returns the last result."""
        addresses = (c_void_p * len(weights))(*(addressof(self.weight(weight)) for weight in weights))
        y = x.new_empty(len(x), weights[0].shape[0])
        self._lib.lk_linear_run(addresses, len(weights), x.data_ptr(), len(x), y.data_ptr())
        return y

    def grouped_forward(self, x: Tensor, weights: ExpertWeights, counts: Tensor) -> Tensor:
        x, counts, y = _contiguous(x), counts.contiguous(), x.new_empty(len(x), weights.shape[0])
        struct = byref(experts_struct(weights))
        self._lib.lk_grouped_linear(struct, x.data_ptr(), counts.data_ptr(), len(counts), len(x), y.data_ptr())
        return y

    def linear_backward(self, dy: Tensor, weight: QuantizedWeight) -> Tensor:
        dy = _contiguous(dy)
        dx = dy.new_empty(len(dy), weight.shape[1])
        self._lib.lk_linear_backward(byref(self.weight(weight)), dy.data_ptr(), len(dy), dx.data_ptr())
        return dx

    def with_int8_inputs(self, weight: QuantizedWeight | ExpertWeights) -> QuantizedWeight | ExpertWeights:
        """`weight.with_int8_inputs()`, laid out by the library: its reading and writing is all that takes time."""
        single = weight[0] if isinstance(weight, ExpertWeights) else weight
        levels, unit = single.int8_levels()
        layout = -(-weight.shape[0] // 16), weight.shape[1] // _BLOCK, 9 * _BLOCK
        if isinstance(weight, QuantizedWeight):
            data = empty_on_huge_pages(layout, torch.uint8)
            self._lib.lk_int8_copy(byref(self.weight(weight)), unit, data.data_ptr())
        elif weight.blocksize != _BLOCK:
            raise ValueError(f"no int8 inputs for experts in blocks of {weight.blocksize}")
        else:
            data = empty_on_huge_pages((len(weight), *layout), torch.uint8)
            self._lib.lk_int8_experts(byref(experts_struct(weight)), len(weight), unit, data.data_ptr())
        return replace(weight, int8=Int8Copy(data, levels))

    def dequantize(self, weight: QuantizedWeight) -> Tensor:
        dense = torch.empty(weight.shape)
        self._lib.lk_dequantize(byref(self.weight(weight)), dense.data_ptr())
        return dense

    def lora_add_(
        self, y: Tensor, x: Tensor, a: Tensor, b: Tensor, table: Tensor, scale: Tensor, ranks: int = 0
    ) -> None:
        x, table, scale = _contiguous(x), table.contiguous(), scale.contiguous()
        adapters = AdaptersStruct(
            a.data_ptr(), b.data_ptr(), table.data_ptr(), scale.data_ptr(), len(table), a.shape[1], b.shape[1]
        )
        self._lib.lk_lora_add(byref(adapters), x.data_ptr(), y.data_ptr())

    def write_kv(self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
        """See `reference.write_kv`, but with the layout of `KvCache` in attention.h: a block's keys lie by columns."""
        k, v, slots = _contiguous(k), _contiguous(v), slots.contiguous()
        cache = _kv_struct(k_cache, v_cache)
        self._lib.lk_write_kv(k.data_ptr(), v.data_ptr(), slots.data_ptr(), *k.shape, byref(cache))

    def paged_attention(
        self,
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
        sinks = None if sinks is None else _contiguous(sinks)
        q, seqs, block_tables = _contiguous(q), seqs.contiguous(), block_tables.contiguous()
        out = torch.empty_like(q)
        tokens, heads, head_dim = q.shape
        attention = AttentionStruct(
            q.data_ptr(),
            out.data_ptr(),
            seqs.data_ptr(),
            block_tables.data_ptr(),
            tokens,
            heads,
            k_cache.shape[1],
            head_dim,
            len(seqs),
            block_tables.shape[1],
            scaling,
            window,
            softcap,
            address(sinks),
            _kv_struct(k_cache, v_cache),
        )
        self._lib.lk_attention(byref(attention))
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, weight = _contiguous(x), _contiguous(weight)
        y = torch.empty_like(x)
        width = x.shape[-1]
        self._lib.lk_rms_norm(x.data_ptr(), weight.data_ptr(), eps, x.numel() // width, width, y.data_ptr())
        return y

    def silu_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = _contiguous(gate), _contiguous(up)
        y = torch.empty_like(gate)
        self._lib.lk_silu_mul(gate.data_ptr(), up.data_ptr(), gate.numel(), y.data_ptr())
        return y

    def rope_(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
        cos, sin = _contiguous(cos), _contiguous(sin)
        tokens, heads, head_dim = q.shape
        self._lib.lk_rope(
            q.data_ptr(),
            k.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            tokens,
            heads,
            k.shape[1],
            head_dim,
            cos.shape[1],
        )

    def argmax(self, scores: Tensor, *, masked: bool = False) -> Tensor:
        scores = scores.contiguous()
        found = torch.empty(len(scores), dtype=torch.int64)
        self._lib.lk_argmax(scores.data_ptr(), *scores.shape, masked, found.data_ptr())
        return found

    def mask_(self, scores: Tensor, allowed: Tensor) -> None:
        """Set scores `[n]` to -inf where the bits of `allowed`, int32, are 0 or missing."""
        allowed = allowed.contiguous()
        self._lib.lk_mask(scores.data_ptr(), len(scores), allowed.data_ptr(), len(allowed))

    def draw(self, scores: Tensor, truncations: Sequence[Truncation], uniforms: Sequence[float]) -> Tensor:
        """Draw a token per row, int64 [rows]: at its number in [0, 1) of the weights kept by its truncation."""
        scores, drawn = scores.contiguous(), torch.empty(len(scores), dtype=torch.int64)
        columns = zip(*truncations, strict=True) if truncations else ((),) * 4
        kept = [*(array(kind, column) for kind, column in zip("ffid", columns, strict=True)), array("d", uniforms)]
        addresses = (numbers.buffer_info()[0] for numbers in kept)
        self._lib.lk_draw(scores.data_ptr(), *scores.shape, *addresses, drawn.data_ptr())
        return drawn

    def logprobs(self, logits: Tensor, tokens: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return each row's log-probability and rank of its token, and ids and log-probabilities of the likeliest."""
        logits, tokens = logits.contiguous(), tokens.contiguous()
        rows, most = len(logits), min(most, logits.shape[1])
        if rows and int(tokens.max()) >= logits.shape[1]:
            raise IndexError(f"token {int(tokens.max())} is outside the vocabulary of {logits.shape[1]}")
        found = (
            torch.empty(rows, dtype=torch.float64),
            torch.empty(rows, dtype=torch.int64),
            torch.empty(rows, most, dtype=torch.int64),
            torch.empty(rows, most, dtype=torch.float64),
        )
        self._lib.lk_logprobs(logits.data_ptr(), *logits.shape, tokens.data_ptr(), most, *map(address, found))
        return found

    def output_argmax(self, x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
        if weight.sketch is None or bias is not None:
            return self.argmax(self.linear_forward(x, weight, bias))
        return self.plan_output_argmax(weight)(_contiguous(x))

    def plan_output_argmax(self, weight: QuantizedWeight) -> Callable[[Tensor], Tensor]:
        """Return `output_argmax` of a weight with a sketch, for contiguous fp32 inputs."""
        assert weight.sketch is not None
        structs = byref(self.weight(weight)), byref(_sketch_struct(weight.sketch))

        def argmax(x: Tensor) -> Tensor:
            if len(x) > self._lib.lk_sketch_max_rows():
                return self.argmax(self.linear_forward(x, weight))
            found = torch.empty(len(x), dtype=torch.int64)
            self._lib.lk_output_argmax(*structs, x.data_ptr(), len(x), found.data_ptr())
            return found

        return argmax

    def decode(self, decoder: Structure, step: Structure) -> None:
        """Run one step through the decoder layers; the structures are those of plan.py."""
        self._lib.lk_decode(byref(decoder), byref(step))

    def call(self, name: str, arguments: Structure) -> None:
        """Call a function that takes one structure, defined by the caller's file."""
        getattr(self._lib, name)(byref(arguments))

    def read(self, data: Tensor) -> None:
        """Read fp32 `data` once, to measure memory bandwidth."""
        self._lib.lk_read(data.data_ptr(), data.numel())

    def multiply_add(self, millions: int) -> None:
        """Do `millions` million fused multiply-adds in registers, to measure the fp32 peak."""
        self._lib.lk_multiply_add(millions)


def _kv_struct(k_cache: Tensor, v_cache: Tensor) -> KvCacheStruct:
    return KvCacheStruct(k_cache.data_ptr(), v_cache.data_ptr(), k_cache.shape[2], KV_KINDS[k_cache.dtype])


def _weight_struct(weight: QuantizedWeight) -> tuple[WeightStruct, Tensor | None]:
    """Return the structure, and the scales that it points to."""
    kind = _DENSE_KINDS[weight.data.dtype] if weight.kind == "dense" else 1 if weight.kind == "int8" else 0
    scales, blocksize = weight.absmax, weight.blocksize
    if kind == 0:
        # Decoding double quantisation in every step would take 7% of one request's time.
        blocksize = min(blocksize, _BLOCK)  # both are powers of two
        scales = weight.block_scales(blocksize)
    struct = WeightStruct(
        address(weight.data),
        address(scales),
        address(weight.code),
        None,
        kind,
        *weight.shape,
        blocksize,
        *((address(weight.int8.data), address(weight.int8.levels)) if weight.int8 else (None, None)),
    )
    return struct, scales


def experts_struct(weights: ExpertWeights) -> ExpertsStruct:
    """Return the library's view of experts' weights, which must outlive it."""
    data, absmax, nested = weights.data[0], weights.absmax, weights.nested_absmax
    kind = _DENSE_KINDS[data.dtype] if weights.kind == "dense" else 1 if weights.kind == "int8" else 0
    plain, doubly = (absmax, None) if nested is None else (None, absmax)
    copy = (None, None) if weights.int8 is None else (address(weights.int8.data), address(weights.int8.levels))
    first = (address(data), address(plain), address(weights.code), None, kind, *weights.shape, weights.blocksize, *copy)
    count = 0 if absmax is None else absmax[0].numel()
    parts = map(address, (doubly, nested, weights.nested_code, weights.offset))
    return ExpertsStruct(WeightStruct(*first), data.nbytes, count, *parts, weights.nested_blocksize)


def _sketch_struct(sketch: Sketch) -> SketchStruct:
    return SketchStruct(*map(address, (sketch.data, sketch.scale, sketch.norm, sketch.error)), sketch.greatest_norm)


def supports_weight(weight: QuantizedWeight | ExpertWeights) -> bool:
    """Whether the library can read this weight in place, and decodes it as the weight's own library does.

    bitsandbytes 0.50 decodes 4-bit rows that are not whole blocks differently on the CPU than it encoded them. PEFT's
    users see the results of that, so such weights are left to bitsandbytes.
    """
    if weight.blocksize and weight.shape[1] % weight.blocksize:
        return False
    parts = (weight.data, weight.absmax, weight.code, weight.nested_absmax, weight.nested_code)
    if any(part is not None and not (part.is_cpu and part.is_contiguous()) for part in parts):
        return False
    return weight.kind != "dense" or weight.data.dtype in _DENSE_KINDS
