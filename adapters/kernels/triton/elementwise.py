"""Elementwise kernels, one launch each: norms (with the residual addition before them), SwiGLU, rope.

Arithmetic in fp32, one rounding to the tensors' dtype.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# A kernel's parameters are pointers and numbers of Triton's, which has no types for them.

import torch
import triton
import triton.language as tl
from torch import Tensor

from adapters.kernels.triton import large_tiles


def tile_rows(rows: int) -> int:
    """Return the number of rows per program: `rows`, except in the interpreter."""
    return 256 if large_tiles() else rows


@triton.jit(do_not_specialize=["rows"])  # otherwise many steps would compile again
def _rms_norm(x, delta, weight, y, rows, width, eps, RESIDUAL: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    known = column < width
    inside = (row < rows)[:, None] & known[None, :]
    place = row.to(tl.int64)[:, None] * width + column[None, :]
    values = tl.load(x + place, mask=inside, other=0.0)
    if RESIDUAL:
        sums = values.to(tl.float32) + tl.load(delta + place, mask=inside, other=0.0).to(tl.float32)
        values = sums.to(values.dtype)
        tl.store(x + place, values, mask=inside)
    wide = values.to(tl.float32)
    normed = wide * tl.rsqrt(tl.sum(wide * wide, axis=1) / width + eps)[:, None]
    factor = tl.load(weight + column, mask=known, other=0.0).to(tl.float32)[None, :]
    # Rounded before the weight is applied, as in the models.
    tl.store(y + place, (normed.to(y.dtype.element_ty).to(tl.float32) * factor).to(y.dtype.element_ty), mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `reference.rms_norm`."""
    x = x.contiguous()
    return _norm(x, None, weight, eps)


def add_rms_norm_(hidden: Tensor, delta: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`hidden += delta` in place, then `rms_norm(hidden)`: both contiguous `[rows, width]`."""
    return _norm(hidden, delta, weight, eps)


def _norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    y = torch.empty_like(x)
    width = x.shape[-1]
    rows = x.numel() // width
    tile = tile_rows(1)
    _rms_norm[(triton.cdiv(rows, tile),)](
        x,
        x if delta is None else delta,
        weight,
        y,
        rows,
        width,
        eps,
        RESIDUAL=delta is not None,
        ROWS=tile,
        BLOCK=triton.next_power_of_2(width),
    )
    return y


@triton.jit
def _silu_mul(gate, up, y, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    value = tl.load(gate + at, mask=inside, other=0.0).to(tl.float32)
    value = value / (1.0 + tl.exp(-value)) * tl.load(up + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=inside)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """See `reference.silu_mul`."""
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    block = 1 << 14 if large_tiles() else 1 << 10
    _silu_mul[(triton.cdiv(gate.numel(), block),)](gate, up, y, gate.numel(), BLOCK=block)
    return y


@triton.jit(do_not_specialize=["rows"])
def _rope(x, cos, sin, rows, heads, dim, rotary, ROWS: tl.constexpr, HALF: tl.constexpr):
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, HALF)  # a row is one head of one token
    half = rotary // 2
    mask = (row < rows)[:, None] & (column < half)[None, :]
    low = x + row.to(tl.int64)[:, None] * dim + column[None, :]
    high = low + half
    angles = (row // heads)[:, None] * rotary + column[None, :]
    cos_low = tl.load(cos + angles, mask=mask, other=0.0).to(tl.float32)
    sin_low = tl.load(sin + angles, mask=mask, other=0.0).to(tl.float32)
    cos_high = tl.load(cos + angles + half, mask=mask, other=0.0).to(tl.float32)
    sin_high = tl.load(sin + angles + half, mask=mask, other=0.0).to(tl.float32)
    first = tl.load(low, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(high, mask=mask, other=0.0).to(tl.float32)
    tl.store(low, (first * cos_low - second * sin_low).to(x.dtype.element_ty), mask=mask)
    tl.store(high, (second * cos_high + first * sin_high).to(x.dtype.element_ty), mask=mask)


def rope_(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """See `reference.rope_`; for contiguous q and k."""
    cos, sin = cos.contiguous(), sin.contiguous()
    rotary = cos.shape[-1]
    for heads in (q, k):
        tokens, count, dim = heads.shape
        if tokens:
            rows, tile = tokens * count, tile_rows(triton.next_power_of_2(count))
            half = triton.next_power_of_2(rotary // 2)
            _rope[(triton.cdiv(rows, tile),)](heads, cos, sin, rows, count, dim, rotary, ROWS=tile, HALF=half)
