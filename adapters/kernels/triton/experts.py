"""4-bit linears of a mixture's experts: rows sorted by expert, all experts in one launch.

The experts' row counts stay on the device: the largest possible number of row tiles is launched, and each program finds
its expert. A tile is computed as in `linear`.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# A kernel's parameters are pointers and numbers of Triton's, which has no types for them.

import triton
import triton.language as tl
from torch import Tensor

from adapters.kernels import reference
from adapters.kernels.experts import ExpertWeights
from adapters.kernels.triton import is_deterministic
from adapters.kernels.triton.linear import (
    CHUNK,
    MAX_ROWS,
    choose_tiles,
    code_table,
    dot_dtype,
    linear_forward,
    pair_aligned,
    supports_weight,
    tile_sums,
)

FEW_ROWS = 16  # rows per tile if experts have few


@triton.jit
def _grouped(
    x,  # [rows, ins], sorted by expert
    data,  # [experts, ...], like absmax and nested_absmax; see `_linear`
    absmax,
    code,  # [16]
    nested_absmax,
    nested_code,  # [256]
    offset,  # fp32 [experts]
    counts,  # int64 [experts], rows of each
    y,  # [rows, outs]
    experts,
    outs,
    ins,
    scales,  # per expert
    nested_scales,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    LOOKUP: tl.constexpr,
    DOT: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNROLL: tl.constexpr,
):
    tile = tl.program_id(1)
    e = tl.arange(0, EXPERTS)
    count = tl.load(counts + e, mask=e < experts, other=0).to(tl.int32)
    tiles = (count + BLOCK_M - 1) // BLOCK_M
    expert = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), axis=0)
    if expert < experts:
        before = e < expert
        start = tl.sum(tl.where(before, count, 0), axis=0)
        end = start + tl.sum(tl.where(e == expert, count, 0), axis=0)
        n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        m = start + (tile - tl.sum(tl.where(before, tiles, 0), axis=0)) * BLOCK_M + tl.arange(0, BLOCK_M)
        place = expert.to(tl.int64)
        acc = tile_sums(
            x,
            data + place * outs * (ins // 2),
            absmax + place * scales,
            code,
            nested_absmax + place * nested_scales,
            nested_code,
            tl.load(offset + expert) if NESTED > 0 else 0.0,
            n,
            m,
            end,
            outs,
            ins,
            0,
            ins // CHUNK,
            BLOCKSIZE,
            NESTED,
            LOOKUP,
            DOT,
            BLOCK_M,
            BLOCK_N,
            UNROLL,
        )
        target = m.to(tl.int64)[None, :] * outs + n[:, None]
        tl.store(y + target, acc.to(y.dtype.element_ty), mask=(n < outs)[:, None] & (m < end)[None, :])


def grouped_forward(x: Tensor, weights: ExpertWeights, counts: Tensor) -> Tensor:
    """See `reference.grouped_forward`."""
    if not supports_weight(weights):
        return reference.map_experts(x, weights, counts, linear_forward)
    x, experts = pair_aligned(x), len(weights)
    (rows, ins), outs = x.shape, weights.shape[0]
    y = x.new_empty(rows, outs)
    if rows == 0:
        return y
    block_m = FEW_ROWS if is_deterministic() or rows <= experts * FEW_ROWS else MAX_ROWS
    tiles = choose_tiles(block_m, weights.shape)
    absmax, nested = weights.absmax, weights.nested_absmax
    assert absmax is not None
    code, lookup = code_table(weights, x.dtype)
    _grouped[(triton.cdiv(outs, tiles.outs), min(rows, rows // block_m + experts))](
        x,
        weights.data,
        absmax,
        code,
        absmax if nested is None else nested,
        absmax if nested is None else weights.nested_code,
        absmax if nested is None else weights.offset,
        counts,
        y,
        experts,
        outs,
        ins,
        absmax[0].numel(),
        0 if nested is None else nested[0].numel(),
        BLOCKSIZE=weights.blocksize,
        NESTED=0 if nested is None else weights.nested_blocksize,
        LOOKUP=lookup,
        DOT=dot_dtype(x.dtype),
        EXPERTS=triton.next_power_of_2(experts),
        BLOCK_M=block_m,
        BLOCK_N=tiles.outs,
        UNROLL=tiles.unroll,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return y
