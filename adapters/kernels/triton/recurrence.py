"""Layers that keep a state: short convolutions and linear attention, one launch each for all runs of a step.

A program owns some channels or columns of a state and processes one sequence's runs, which are adjacent, token by
token; no other sequence's program touches the slots that it writes.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# A kernel's parameters are pointers and numbers of Triton's, which has no types for them.

import torch
import triton
import triton.language as tl
from torch import Tensor

from adapters.kernels.recurrence import NORM_EPS, Recurrence
from adapters.kernels.triton import large_tiles


@triton.jit
def _continues(runs, run, count):
    """Whether a run continues from the state written by the run before it."""
    known = (run > 0) & (run < count)
    read = tl.load(runs + run * 4 + 2, mask=known, other=0)
    return known & (read == tl.load(runs + run * 4 - 1, mask=known, other=-1))


@triton.jit
def _inputs(x, states, old, begin, token, channel, mask, channels, KEPT: tl.constexpr):
    """Load inputs of tokens; those before a run's first token from its state."""
    new = mask & (token >= begin)[:, None]
    place = token.to(tl.int64)[:, None] * channels + channel[None, :]
    kept = old + (token - begin + KEPT).to(tl.int64)[:, None] * channels + channel[None, :]
    earlier = tl.load(states + kept, mask=mask & (token < begin)[:, None], other=0.0)
    return tl.where(new, tl.load(x + place, mask=new, other=0.0).to(tl.float32), earlier)


@triton.jit(do_not_specialize=["count"])  # otherwise many steps would compile again
def _convolve(
    x,  # [tokens, channels]
    taps,  # [KEPT + 1, channels]
    bias,  # [channels]
    out,
    states,  # fp32 [slots, KEPT, channels]
    runs,  # int32 [count, 4]
    count,
    channels,
    KEPT: tl.constexpr,
    BIAS: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,  # KEPT up to a power of two
    BLOCK_C: tl.constexpr,
):
    run = tl.program_id(0)
    active = _continues(runs, run, count) == 0
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    known = channel < channels
    k = tl.arange(0, BLOCK_K)
    slot = channels * KEPT
    while active:
        begin, end = tl.load(runs + run * 4), tl.load(runs + run * 4 + 1)
        old = tl.load(runs + run * 4 + 2).to(tl.int64) * slot
        new = tl.load(runs + run * 4 + 3).to(tl.int64) * slot
        for first in range(begin, end, BLOCK_T):
            token = first + tl.arange(0, BLOCK_T)
            inside = (token < end)[:, None] & known[None, :]
            y = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
            if BIAS:
                y += tl.load(bias + channel, mask=known, other=0.0).to(tl.float32)[None, :]
            for j in tl.static_range(KEPT + 1):
                tap = tl.load(taps + j * channels + channel, mask=known, other=0.0).to(tl.float32)
                inputs = _inputs(x, states, old, begin, token - KEPT + j, channel, inside, channels, KEPT)
                y += tap[None, :] * inputs
            if SILU:
                y = y / (1.0 + tl.exp(-y))
            place = token.to(tl.int64)[:, None] * channels + channel[None, :]
            tl.store(out + place, y.to(out.dtype.element_ty), mask=inside)
        held = (k < KEPT)[:, None] & known[None, :]
        last = _inputs(x, states, old, begin, end - KEPT + k, channel, held, channels, KEPT)
        tl.debug_barrier()  # all reads of the old state precede the stores, which may go to the same slot
        tl.store(states + new + k[:, None] * channels + channel[None, :], last, mask=held)
        tl.debug_barrier()
        run += 1
        active = _continues(runs, run, count)


@triton.jit
def _log1p(x):
    """Return log(1 + x), for x from 0 to 1."""
    sum_ = 1.0 + x
    return tl.where(sum_ == 1.0, x, tl.log(sum_) * (x / tl.where(sum_ == 1.0, 1.0, sum_ - 1.0)))


@triton.jit(do_not_specialize=["count"])
def _recur(
    q,  # [tokens, key_heads, keys]
    k,
    v,  # [tokens, heads, values]
    a,  # [tokens, heads]
    b,
    a_log,  # [heads]
    dt_bias,
    out,
    states,  # fp32 [slots, heads, keys, values]
    runs,
    count,
    key_heads,
    heads,
    keys,
    values,
    scale,  # of queries
    gain,
    low,
    high,
    DELTA: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_K: tl.constexpr,  # keys up to a power of two
    BLOCK_V: tl.constexpr,
):
    run, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i, j = tl.arange(0, BLOCK_K), tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (i < keys)[:, None] & (j < values)[None, :]
    slot = heads * keys * values
    at = head * keys * values + i[:, None] * values + j[None, :]
    rate = -tl.exp(tl.load(a_log + head).to(tl.float32))
    shift = tl.load(dt_bias + head).to(tl.float32)
    key_head = head // (heads // key_heads)
    active = _continues(runs, run, count) == 0
    state = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if active:
        state = tl.load(states + tl.load(runs + run * 4 + 2).to(tl.int64) * slot + at, mask=inside, other=0.0)
    while active:
        for token in range(tl.load(runs + run * 4), tl.load(runs + run * 4 + 1)):
            row = head + token * heads
            key_row = (key_head + token * key_heads) * keys + i
            query = tl.load(q + key_row, mask=i < keys, other=0.0).to(tl.float32)
            key = tl.load(k + key_row, mask=i < keys, other=0.0).to(tl.float32)
            update = tl.load(v + row * values + j, mask=j < values, other=0.0).to(tl.float32)
            step = tl.load(a + row).to(tl.float32) + shift
            step = tl.maximum(step, 0.0) + _log1p(tl.exp(-tl.abs(step)))
            step = tl.minimum(tl.maximum(step, low), high)
            state = state * tl.exp(rate * step)
            if DELTA:
                query = query * (tl.rsqrt(tl.sum(query * query, axis=0) + EPS) * scale)
                key = key * tl.rsqrt(tl.sum(key * key, axis=0) + EPS)
                update = update - tl.sum(state * key[:, None], axis=0)
                update = update * (gain / (1.0 + tl.exp(-tl.load(b + row).to(tl.float32))))
            else:
                update = update * step
            state = state + key[:, None] * update[None, :]
            y = tl.sum(state * query[:, None], axis=0)
            tl.store(out + row * values + j, y.to(out.dtype.element_ty), mask=j < values)
        tl.store(states + tl.load(runs + run * 4 + 3).to(tl.int64) * slot + at, state, mask=inside)
        run += 1
        active = _continues(runs, run, count)


def convolve(x: Tensor, taps: Tensor, bias: Tensor | None, silu: bool, states: Tensor, runs: Tensor) -> Tensor:
    """See `recurrence.convolve`."""
    x, (kernel, channels) = x.contiguous(), taps.shape
    out = torch.empty_like(x)
    block_t, block_c = (16, 64) if not large_tiles() else (64, 1024)
    _convolve[(len(runs), triton.cdiv(channels, block_c))](
        x,
        taps.contiguous(),
        taps if bias is None else bias,
        out,
        states,
        runs.contiguous(),
        len(runs),
        channels,
        KEPT=kernel - 1,
        BIAS=bias is not None,
        SILU=silu,
        BLOCK_T=block_t,
        BLOCK_K=triton.next_power_of_2(kernel - 1),
        BLOCK_C=block_c,
    )
    return out


def recur(r: Recurrence, states: Tensor, runs: Tensor) -> Tensor:
    """See `recurrence.recur`."""
    q, k, v, a = (part.contiguous() for part in (r.q, r.k, r.v, r.a))
    out = torch.empty_like(v)
    (_, key_heads, keys), (heads, values) = q.shape, v.shape[1:]
    # One warp, so that sums over keys need no synchronisation; a state of 128 keys takes a quarter of its registers.
    block_v = triton.next_power_of_2(values) if large_tiles() else min(8, triton.next_power_of_2(values))
    _recur[(len(runs), heads, triton.cdiv(values, block_v))](
        q,
        k,
        v,
        a,
        a if r.b is None else r.b.contiguous(),
        r.a_log,
        r.dt_bias,
        out,
        states,
        runs.contiguous(),
        len(runs),
        key_heads,
        heads,
        keys,
        values,
        keys**-0.5,
        r.gain,
        *r.limits,
        DELTA=r.b is not None,
        EPS=NORM_EPS,
        BLOCK_K=triton.next_power_of_2(keys),
        BLOCK_V=block_v,
        num_warps=1,
    )
    return out
