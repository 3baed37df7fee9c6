"""What stands between the linears, one launch each: norms (with the residual addition before them), SwiGLU, rope.

Arithmetic in fp32, one rounding to the tensors' dtype.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# A kernel's parameters are pointers and numbers of Triton's, which has no types for them.

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _rms_norm(x, delta, weight, y, width, eps, RESIDUAL: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    inside = column < width
    place = tl.program_id(0).to(tl.int64) * width + column
    values = tl.load(x + place, mask=inside, other=0.0)
    if RESIDUAL:
        sums = values.to(tl.float32) + tl.load(delta + place, mask=inside, other=0.0).to(tl.float32)
        values = sums.to(values.dtype)
        tl.store(x + place, values, mask=inside)
    wide = values.to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / width + eps)
    factor = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    # Rounded before the weight is applied, as the models do.
    tl.store(y + place, (normed.to(y.dtype.element_ty).to(tl.float32) * factor).to(y.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As `reference.rms_norm`."""
    x = x.contiguous()
    y = torch.empty_like(x)
    width = x.shape[-1]
    _rms_norm[(x.numel() // width,)](x, x, weight, y, width, eps, RESIDUAL=False, BLOCK=triton.next_power_of_2(width))
    return y


def add_rms_norm_(hidden: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`hidden += delta` in place, then `rms_norm(hidden)`: both contiguous `[rows, width]`."""
    y = torch.empty_like(hidden)
    rows, width = hidden.shape
    _rms_norm[(rows,)](hidden, delta, weight, y, width, eps, RESIDUAL=True, BLOCK=triton.next_power_of_2(width))
    return y


@triton.jit
def _silu_mul(gate, up, y, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    value = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    value = value / (1.0 + tl.exp(-value)) * tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """As `reference.silu_mul`."""
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    _silu_mul[(triton.cdiv(gate.numel(), 1024),)](gate, up, y, gate.numel(), BLOCK=1024)
    return y


@triton.jit
def _rope(x, cos, sin, heads, dim, rotary, HEADS: tl.constexpr, HALF: tl.constexpr):
    token = tl.program_id(0)
    head, column = tl.arange(0, HEADS), tl.arange(0, HALF)
    half = rotary // 2
    turned = column < half
    mask = (head < heads)[:, None] & turned[None, :]
    low = x + token.to(tl.int64) * heads * dim + head[:, None] * dim + column[None, :]
    high = low + half
    angles = token * rotary + column
    cos_low = tl.load(cos + angles, mask=turned, other=0.0).to(tl.float32)[None, :]
    sin_low = tl.load(sin + angles, mask=turned, other=0.0).to(tl.float32)[None, :]
    cos_high = tl.load(cos + angles + half, mask=turned, other=0.0).to(tl.float32)[None, :]
    sin_high = tl.load(sin + angles + half, mask=turned, other=0.0).to(tl.float32)[None, :]
    first = tl.load(low, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(high, mask=mask, other=0.0).to(tl.float32)
    tl.store(low, (first * cos_low - second * sin_low).to(x.dtype.element_ty), mask=mask)
    tl.store(high, (second * cos_high + first * sin_high).to(x.dtype.element_ty), mask=mask)


def rope_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """As `reference.rope_`, for contiguous q and k."""
    cos, sin = cos.contiguous(), sin.contiguous()
    rotary = cos.shape[-1]
    for heads in (q, k):
        tokens, count, dim = heads.shape
        if tokens:
            tiles = {"HEADS": triton.next_power_of_2(count), "HALF": triton.next_power_of_2(rotary // 2)}
            _rope[(tokens,)](heads, cos, sin, count, dim, rotary, **tiles)
