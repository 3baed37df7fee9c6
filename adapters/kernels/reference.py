"""The kernels in plain torch: the fallback on any device, the reference for native ones, and the autograd path.

Every function gives a row the same bits for any number of other rows. A library's matrix product does not guarantee
that (its blocking depends on the row count), so row counts are padded to a `row_multiple` found by probing.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters.kernels.experts import ExpertWeights
from adapters.kernels.weight import Int8Copy, QuantizedWeight

KEY_GROUP = 64  # attention reduces over keys in groups of this many, aligned to the sequence's start
PROBED_OUTPUTS = 8192  # most outputs of a weight used to find its row multiple

SCALE_BYTES = 4  # of an int8 row of the KV cache
FP8_MAX = 448.0  # the greatest number of fp8 (e4m3)

FP32, BF16, FP16 = 0, 1, 2  # the dtype column of a segment table
_UNIT_DTYPES = {FP32: torch.float32, BF16: torch.bfloat16, FP16: torch.float16}


@cache
def row_multiple(out_features: int, in_features: int, dtype: torch.dtype, threads: int) -> int:
    """Return the smallest row multiple at which `F.linear` is batch-invariant on this CPU for weights of this shape.

    Args:
        threads: torch's number of threads, on which its products may depend.

    Returns:
        A divisor of 64: among row counts that are multiples of it, equal rows give equal bits.

    Raises:
        RuntimeError: none of 1, 2, 4, ..., 64 is batch-invariant.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(192, in_features, generator=generator).to(dtype)
    weight = torch.randn(min(out_features, PROBED_OUTPUTS), in_features, generator=generator).to(dtype)
    expected = F.linear(x, weight)
    for multiple in (1, 2, 4, 8, 16, 32, 64):
        if _rows_agree(x, weight, expected, multiple):
            return multiple
    raise RuntimeError(f"no row multiple makes {dtype} products of {(out_features, in_features)} invariant")


def _rows_agree(x: Tensor, weight: Tensor, expected: Tensor, multiple: int) -> bool:
    counts = {multiple * n for n in (1, 2, 3, 4, 5, 7, 8, 12, 16)} | {64, 128}
    return all(torch.equal(F.linear(x[:rows], weight), expected[:rows]) for rows in sorted(counts) if rows <= len(x))


# On a CPU, torch computes this many numbers at a time, or half as many, and the rest one by one, perhaps differently.
LANES = 32


def with_row_gaps(y: Tensor) -> Tensor:
    """Return the same rows; on a CPU with a gap between them, unless they are whole `LANES`.

    torch processes contiguous numbers `LANES` at a time and the rest one by one, with other functions for some
    operations (sigmoid, silu), so a row's bits would depend on the number of rows. With gaps it goes row by row.
    """
    odd = y.is_cpu and y.shape[-1] % LANES and len(y) > 1
    return F.pad(y, (0, 1))[:, :-1] if odd else y


def pad_rows(x: Tensor, weight: Tensor, *, whole_lanes: bool = False) -> Tensor:
    """Append zero rows along dimension -2, up to a multiple that suits the weight.

    Args:
        whole_lanes: whether to make the product's numbers whole `LANES` on a CPU.
    """
    out_features, in_features = weight.shape[-2:]
    multiple = row_multiple(out_features, in_features, x.dtype, torch.get_num_threads()) if x.is_cpu else 4
    if whole_lanes and x.is_cpu:
        multiple = math.lcm(multiple, LANES // math.gcd(LANES, out_features))
    missing = -x.shape[-2] % multiple
    return F.pad(x, (0, 0, 0, missing)) if missing else x


def padded_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return `x @ weight.T` with the row count padded: `[..., rows, in] x [..., out, in] -> [..., rows, out]`.

    Never a view of the padded product, since autograd forbids changing that in place.
    """
    y = pad_rows(x, weight) @ weight.transpose(-1, -2)
    return y if y.shape[-2] == x.shape[-2] else y[..., : x.shape[-2], :].clone()


# --- linears ------------------------------------------------------------------------------------


class LinearFunction(torch.autograd.Function):
    """`x @ W.T + bias` for a frozen weight: the backward pass decodes W again instead of keeping it."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: QuantizedWeight,
        bias: Tensor | None,
        forward: Callable[[Tensor, QuantizedWeight, Tensor | None], Tensor],
        backward: Callable[[Tensor, QuantizedWeight], Tensor],
    ) -> Tensor:
        ctx.weight, ctx.backward_of_x = weight, backward
        return forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.backward_of_x(grads[0], ctx.weight), None, None, None, None


def base_linear(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """Return `x @ W.T + bias`, `[rows, in] -> [rows, out]`, in x's dtype; differentiable with respect to x only."""
    y: Tensor = LinearFunction.apply(x, weight, bias, linear_forward, linear_backward)
    return y


def linear_forward(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """Return `x @ W.T + bias`, without autograd."""
    if weight.int8 is not None:
        y = int8_linear(x, weight, weight.int8)
        return y if bias is None else y + bias
    y = padded_linear(x, weight.dequantize(x.dtype))
    return y if bias is None else y + bias.to(y.dtype)


def int8_linear(x: Tensor, weight: QuantizedWeight, copy: Int8Copy) -> Tensor:
    """Return `x @ W.T` with inputs rounded to int8, times the copy's integer levels, in blocks of 64 inputs.

    A block of x, fp32 `[rows, in]`, is `round(x / scale)` with `scale = max |x| / 127`. A block's sum is exact, and
    `y += sum * (scales * scale)` goes over the blocks in order.
    """
    out_features, in_features = weight.shape
    blocks = in_features // 64
    x = x.float().view(len(x), blocks, 64)
    tops = x.abs().amax(-1)  # [rows, blocks]
    tops = tops.masked_fill(~tops.isfinite(), torch.nan)
    q = (x * torch.where(tops > 1e-30, 127.0 / tops, 0.0)[..., None]).round().nan_to_num(0.0).double()
    nibbles = torch.stack((weight.data.view(-1) >> 4, weight.data.view(-1) & 15), dim=-1).view(-1).int()
    levels = copy.levels.double()[nibbles].view(out_features, blocks, 64)
    scales = copy.scales[:out_features]
    sums = torch.einsum("rbi,obi->bro", q, levels)  # exact in float64, as in fp32 and in integers
    y = x.new_zeros(len(x), out_features).double()
    for block in range(blocks):
        scale = scales[:, block] * (tops[:, block, None] / 127.0)  # fp32 [rows, out]
        y = (y + sums[block] * scale.double()).float().double()  # one rounding: a fused multiply-add
    return y.float()


def linear_backward(dy: Tensor, weight: QuantizedWeight) -> Tensor:
    """Return `dy @ W`: `[rows, out] -> [rows, in]`."""
    return padded_linear(dy, weight.dequantize(dy.dtype).T)


def map_experts(
    rows: Tensor, weights: ExpertWeights, counts: Tensor, product: Callable[[Tensor, QuantizedWeight], Tensor]
) -> Tensor:
    """Return `product` of each expert's rows (`counts`, in order) and its weight, concatenated."""
    parts, start = [], 0
    for expert, count in enumerate(counts.tolist()):
        if count:
            parts.append(product(rows[start : start + count], weights[expert]))
            start += count
    return torch.cat(parts)


def grouped_linear(x: Tensor, weights: ExpertWeights, counts: Tensor) -> Tensor:
    """Multiply rows sorted by expert, `[rows, in] -> [rows, out]`; differentiable with respect to x only.

    Args:
        counts: int64 `[experts]`, rows of each expert.
    """
    y: Tensor = GroupedFunction.apply(x, weights, counts, grouped_forward, linear_backward)
    return y


def grouped_forward(x: Tensor, weights: ExpertWeights, counts: Tensor) -> Tensor:
    """See `grouped_linear`; without autograd."""
    return map_experts(x, weights, counts, linear_forward)


class GroupedFunction(torch.autograd.Function):
    """A `LinearFunction` of many weights, for `grouped_linear`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: ExpertWeights,
        counts: Tensor,
        forward: Callable[[Tensor, ExpertWeights, Tensor], Tensor],
        backward: Callable[[Tensor, QuantizedWeight], Tensor],
    ) -> Tensor:
        ctx.weights, ctx.counts, ctx.backward_of_x = weights, counts, backward
        return forward(x, weights, counts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return map_experts(grads[0], ctx.weights, ctx.counts, ctx.backward_of_x), None, None, None, None


# --- adapters -----------------------------------------------------------------------------------


def unit_rows(pool: Tensor, first_unit: int, rank: int, dtype: int) -> Tensor:
    """Return rank rows of a pool as numbers: `[rank, width]`, a view of `pool [units, width]` int16."""
    if dtype == FP32:
        return pool[first_unit : first_unit + 2 * rank].view(-1).view(torch.float32).view(rank, pool.shape[1])
    return pool[first_unit : first_unit + rank].view(_UNIT_DTYPES[dtype])


def lora_add_(y: Tensor, x: Tensor, a: Tensor, b: Tensor, table: Tensor, scale: Tensor, ranks: int = 0) -> None:
    """Add the adapters' deltas in place: for each segment `y[s:e] += scale * ((x[s:e] @ A.T) @ B)`, in table order.

    Args:
        y: `[T, out]`.
        x: `[T, in]`.
        a: int16 `[units, in]`, the pool's row units; an fp32 rank row is two consecutive units.
        b: int16 `[units, out]`, B transposed, in the same units.
        table: int32 `[S, 5]`, columns start, end, first_unit, rank, dtype (`FP32`, `BF16`, `FP16`).
        scale: fp32 `[S]`.
        ranks: upper bound on segments' ranks, if known, which saves memory on a GPU; 0 if not.
    """
    for (start, end, first_unit, rank, dtype), factor in zip(table.tolist(), scale.tolist(), strict=True):
        if start >= end or rank == 0:
            continue
        down = padded_linear(x[start:end].float(), unit_rows(a, first_unit, rank, dtype).float())  # [n, rank]
        delta = padded_linear(down * factor, unit_rows(b, first_unit, rank, dtype).float().T)  # [n, out]
        y[start:end] = (y[start:end] + delta).to(y.dtype)


# --- attention ----------------------------------------------------------------------------------


def head_size(cache: Tensor) -> int:
    """Return D of a cache, without the scale at the end of int8 rows."""
    return cache.shape[-1] - SCALE_BYTES if cache.dtype == torch.int8 else cache.shape[-1]


def cache_rows(states: Tensor, dtype: torch.dtype) -> Tensor:
    """Return numbers `[..., D]` as stored in a cache of this dtype: rounded, and for fp8 clamped to its range."""
    if dtype == torch.int8:
        scale = states.float().abs().amax(-1, keepdim=True) / 127.0
        codes = (states.float() / torch.where(scale > 0, scale, 1.0)).round().nan_to_num().to(torch.int8)
        return torch.cat([codes, scale.view(torch.int8)], dim=-1)
    if dtype == torch.float8_e4m3fn:
        states = states.clamp(-FP8_MAX, FP8_MAX)
    return states.to(dtype)


def cache_numbers(rows: Tensor) -> Tensor:
    """Return the values of a cache's rows, fp32 `[..., D]`."""
    if rows.dtype == torch.int8:
        return rows[..., :-SCALE_BYTES].float() * rows[..., -SCALE_BYTES:].contiguous().view(torch.float32)
    return rows.float()


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Store `k, v [T, Hkv, D]` in `[blocks, Hkv, block_size, D]` caches; slots int64 `[T]` = block * size + offset.

    Caches are fp32, bf16, fp16, fp8 (e4m3) or int8: `[..., D + 4]`, each row's fp32 scale in its last four bytes.
    Only the implementation that wrote a cache can read it: the C++ kernels have their own layout of a block.
    """
    block_size = k_cache.shape[2]
    block, offset = slots // block_size, slots % block_size
    k_cache[block, :, offset] = cache_rows(k, k_cache.dtype)
    v_cache[block, :, offset] = cache_rows(v, v_cache.dtype)


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
    """Return causal attention of each request's new tokens over its paged keys, `[T, H, D] -> [T, H, D]`.

    Keys are reduced in groups of `KEY_GROUP` from position 0 on with a running softmax, so a query's result does not
    depend on the chunks of its prompt.

    Args:
        q: `[T, H, D]`; rows of no request give zeros.
        k_cache, v_cache: `[blocks, Hkv, block_size, D]` as in `write_kv`, with the step's own keys already written;
            block_size divides `KEY_GROUP` or is a multiple of it.
        seqs: int32 `[R, 3]`, columns q_start, q_end, kv_len (keys after this step). Query i is at position
            `kv_len - (q_end - i)`.
        block_tables: int32 `[R, max_blocks]`.
        window: when positive, a query at position p sees keys in `(p - window, p]`.
        softcap: when positive, a score s becomes `softcap * tanh(s / softcap)`.
        sinks: fp32 `[H]`, a score per head that takes part in the softmax without a value.
    """
    out = torch.zeros_like(q)
    kv_heads, block_size = k_cache.shape[1], k_cache.shape[2]
    for request, (q_start, q_end, kv_len) in enumerate(seqs.tolist()):
        if q_start >= q_end:
            continue
        table = block_tables[request, : -(-kv_len // block_size)].long()
        keys, values = (_gather_blocks(cache, table, kv_len) for cache in (k_cache, v_cache))  # [Hkv, groups * 64, D]
        queries = q[q_start:q_end].float() * scaling
        queries = queries.view(len(queries), kv_heads, -1, q.shape[2]).permute(1, 2, 0, 3)  # [Hkv, H / Hkv, n, D]
        last = torch.arange(kv_len - (q_end - q_start), kv_len, device=q.device)  # each query's own position
        attended, top, total = _grouped_softmax(queries, keys, values, last, kv_len, window, softcap)
        if sinks is not None:
            total = total + torch.exp(sinks.view(kv_heads, -1, 1, 1) - top)
        attended = attended / total
        out[q_start:q_end] = attended.permute(2, 0, 1, 3).flatten(1, 2).to(q.dtype)
    return out


def _gather_blocks(cache: Tensor, table: Tensor, kv_len: int) -> Tensor:
    """Return a request's first `kv_len` cache rows as fp32 `[Hkv, groups * KEY_GROUP, D]`, padded with zeros."""
    rows = cache_numbers(cache[table].transpose(0, 1).flatten(1, 2)[:, :kv_len])
    return F.pad(rows, (0, 0, 0, -kv_len % KEY_GROUP))


def _grouped_softmax(
    q: Tensor, keys: Tensor, values: Tensor, last: Tensor, kv_len: int, window: int, softcap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute a running softmax over key groups: `q [Hkv, G, n, D]`, `keys, values [Hkv, groups * 64, D]`.

    Returns `[Hkv, G, n, D]`, not yet divided by the sums of weights, each row's largest score, and these sums.
    """
    top = q.new_full((*q.shape[:-1], 1), float("-inf"))
    total = torch.zeros_like(top)
    acc = torch.zeros_like(q)
    first_group = max(0, kv_len - len(last) - window + 1) // KEY_GROUP if window else 0
    for start in range(first_group * KEY_GROUP, kv_len, KEY_GROUP):
        key = keys[:, None, start : start + KEY_GROUP]  # [Hkv, 1, 64, D]
        value = values[:, None, start : start + KEY_GROUP]
        position = torch.arange(start, start + KEY_GROUP, device=q.device)
        visible = position <= last[:, None]  # [n, 64]
        if window:
            visible &= position > last[:, None] - window
        scores = padded_linear(q, key)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~visible, float("-inf"))
        new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
        shift = torch.where(new_top == float("-inf"), 0.0, new_top)  # for rows without a visible key yet
        weights = torch.exp(scores - shift)
        decay = torch.exp(top - shift)
        total = total * decay + weights.sum(-1, keepdim=True)
        acc = acc * decay + padded_linear(weights, value.transpose(-1, -2))
        top = new_top
    return acc, top, total


# --- norms, activation, rope ----------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return `x / sqrt(mean(x^2) + eps) * weight` over the last dimension, the mean in fp32."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """Return `silu(gate) * up`, elementwise."""
    return F.silu(gate) * up


def rope_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate `q [T, H, D]` and `k [T, Hkv, D]` in place by Llama's half-rotation; `cos, sin [T, rotary]`.

    If rotary < D, only each head's first `rotary` numbers are rotated.
    """
    rotary = cos.shape[-1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    for heads in (q, k):
        turned = heads[..., :rotary]
        low, high = turned.chunk(2, dim=-1)
        turned.copy_(turned * cos + torch.cat((-high, low), dim=-1) * sin)


# --- greedy tokens ----------------------------------------------------------------------------------


def argmax(scores: Tensor, *, masked: bool = False) -> Tensor:
    """Return the argmax of each row of scores `[rows, n]`, the first of ties, int64 `[rows]`; -1 for invalid rows.

    An invalid row holds NaN or infinity, or only -inf. With `masked`, some scores of a valid row may be -inf.
    """
    valid = scores.amax(-1).isfinite()
    if not masked:
        valid &= scores.amin(-1).isfinite()
    return torch.where(valid, scores.argmax(-1), -1)


def output_argmax(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """Return `argmax(base_linear(x, weight, bias))`, int64 `[rows]`: greedy tokens, if the weight is the head's.

    A weight with a sketch is read only in part, with the same result.
    """
    return argmax(linear_forward(x, weight, bias))
