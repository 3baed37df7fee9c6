"""Grouped LoRA over the rank-row pool: all adapters of a step in two launches, for any ranks and dtypes.

`_shrink` writes each segment's `scale * (x @ A.T)`, in slices of the input; `_expand` adds the slices in order,
multiplies by B and adds to y, segment after segment in table order. Programs belong to tokens, so a segment without
tokens or rank costs only its row of the table. Few tokens (decoding, perhaps each with its own adapter) are processed
one by one and cost the bytes of A and B; more go as tiles through the tensor cores. Up to three linears of one input
share both launches, since these are short.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# A kernel's parameters are pointers and numbers of Triton's, which has no types for them.

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from adapters.kernels.triton import is_deterministic, large_tiles

MAX_RANK = 512
SCRATCH = 64 << 20  # bytes; tables with more segments than fit are processed in pieces


@triton.jit
def _touching(table, segments, low, high, SEGMENTS: tl.constexpr):
    """Return the first and last segment with rank and tokens in [low, high)."""
    s = tl.arange(0, SEGMENTS)
    real = s < segments
    start = tl.load(table + s * 5, mask=real, other=0)
    end = tl.load(table + s * 5 + 1, mask=real, other=0)
    rank = tl.load(table + s * 5 + 3, mask=real, other=0)
    touches = real & (start < high) & (end > low) & (start < end) & (rank > 0)
    return tl.min(tl.where(touches, s, SEGMENTS), axis=0), tl.max(tl.where(touches, s, -1), axis=0)


@triton.jit
def _rank_rows(pool, first_unit, width, r, column, mask, dtype):
    """Load rank rows r at columns, as fp32: [len(r), len(column)]. An fp32 row is two consecutive units."""
    window = pool + first_unit.to(tl.int64) * width
    at = r.to(tl.int64)[:, None] * width + column[None, :]
    if dtype == 0:
        rows = tl.load(window.to(tl.pointer_type(tl.float32)) + at, mask=mask, other=0.0)
    else:
        raw = tl.load(window + at, mask=mask, other=0)
        if dtype == 1:  # bf16 is the upper half of fp32
            rows = (raw.to(tl.int32) << 16).to(tl.float32, bitcast=True)
        else:
            rows = raw.to(tl.float16, bitcast=True).to(tl.float32)
    return rows


@triton.jit
def _of(linear, first, second, third, LINEARS: tl.constexpr):
    """Return the argument of this program's linear."""
    chosen = first
    if LINEARS > 1:
        chosen = tl.where(linear == 0, first, second)
    if LINEARS > 2:
        chosen = tl.where(linear == 2, third, chosen)
    return chosen


@triton.jit(do_not_specialize=["tokens", "segments", "row_width"])  # otherwise many steps would compile again
def _shrink(
    x,  # [tokens, width]
    a0,  # int16 [units, width], of the first linear
    a1,
    a2,
    table,  # int32 [LINEARS, row_width, 5], of which the first `segments` are used
    scale,  # fp32 [LINEARS, row_width]
    down,  # fp32 [LINEARS, segments, SPLITS, tokens, ranks]
    tokens,
    width,
    segments,
    row_width,
    ranks,
    SEGMENTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    LINEARS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    low, split, linear = tl.program_id(0) * BLOCK_T, tl.program_id(1), tl.program_id(2)
    a = _of(linear, a0, a1, a2, LINEARS)
    table += linear * row_width * 5
    scale += linear * row_width
    down += linear.to(tl.int64) * segments * SPLITS * tokens * ranks
    t = low + tl.arange(0, BLOCK_T)
    per_split = tl.cdiv(tl.cdiv(width, BLOCK_K), SPLITS) * BLOCK_K
    begin = split * per_split
    finish = tl.minimum(begin + per_split, width)
    first, last = _touching(table, segments, low, low + BLOCK_T, SEGMENTS)
    for segment in range(first, last + 1):
        row = table + segment * 5
        start, end, first_unit = tl.load(row), tl.load(row + 1), tl.load(row + 2)
        rank, dtype = tl.load(row + 3), tl.load(row + 4)
        if (start < low + BLOCK_T) & (end > low):
            mine = (t >= start) & (t < end)
            factor = tl.load(scale + segment)
            for first_rank in range(0, rank, BLOCK_R):
                r = first_rank + tl.arange(0, BLOCK_R)
                acc = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
                for first_k in range(begin, finish, BLOCK_K):
                    k = first_k + tl.arange(0, BLOCK_K)
                    at = t.to(tl.int64)[:, None] * width + k[None, :]
                    values = tl.load(x + at, mask=mine[:, None] & (k < finish)[None, :], other=0.0).to(tl.float32)
                    mask = (r < rank)[:, None] & (k < finish)[None, :]
                    rows = _rank_rows(a, first_unit, width, r, k, mask, dtype)  # [BLOCK_R, BLOCK_K]
                    if BLOCK_T == 1:
                        acc += tl.sum(values * rows, axis=1)[None, :]
                    else:
                        acc = tl.dot(values, tl.trans(rows), acc, input_precision=PRECISION)
                plane = (segment * SPLITS + split) * tokens
                target = down + (plane + t)[:, None] * ranks + r[None, :]
                tl.store(target, acc * factor, mask=mine[:, None] & (r < rank)[None, :])


@triton.jit(do_not_specialize=["tokens", "segments", "row_width"])
def _expand(
    y0,  # [tokens, width0]
    y1,
    y2,
    b0,  # int16 [units, width0]
    b1,
    b2,
    table,
    down,
    tokens,
    width0,
    width1,
    width2,
    segments,
    row_width,
    ranks,
    SEGMENTS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    LINEARS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    low, first_column, linear = tl.program_id(0) * BLOCK_T, tl.program_id(1) * BLOCK_N, tl.program_id(2)
    y, b = _of(linear, y0, y1, y2, LINEARS), _of(linear, b0, b1, b2, LINEARS)
    width = _of(linear, width0, width1, width2, LINEARS)
    table += linear * row_width * 5
    down += linear.to(tl.int64) * segments * SPLITS * tokens * ranks
    t = low + tl.arange(0, BLOCK_T)
    n = first_column + tl.arange(0, BLOCK_N)
    if first_column < width:  # linears of one launch differ in width
        first, last = _touching(table, segments, low, low + BLOCK_T, SEGMENTS)
        if first <= last:
            place = y + t.to(tl.int64)[:, None] * width + n[None, :]
            inside = (t < tokens)[:, None] & (n < width)[None, :]
            acc = tl.load(place, mask=inside, other=0.0).to(tl.float32)
            for segment in range(first, last + 1):
                row = table + segment * 5
                start, end, first_unit = tl.load(row), tl.load(row + 1), tl.load(row + 2)
                rank, dtype = tl.load(row + 3), tl.load(row + 4)
                if (start < low + BLOCK_T) & (end > low):
                    mine = (t >= start) & (t < end)
                    for first_rank in range(0, rank, BLOCK_R):
                        r = first_rank + tl.arange(0, BLOCK_R)
                        known = mine[:, None] & (r < rank)[None, :]
                        values = tl.zeros([BLOCK_T, BLOCK_R], tl.float32)
                        for split in tl.static_range(SPLITS):
                            plane = (segment * SPLITS + split) * tokens
                            values += tl.load(down + (plane + t)[:, None] * ranks + r[None, :], mask=known, other=0.0)
                        mask = (r < rank)[:, None] & (n < width)[None, :]
                        rows = _rank_rows(b, first_unit, width, r, n, mask, dtype)  # [BLOCK_R, BLOCK_N]
                        if BLOCK_T == 1:
                            acc += tl.sum(tl.trans(values) * rows, axis=0)[None, :]
                        else:
                            acc = tl.dot(values, rows, acc, input_precision=PRECISION)
            tl.store(place, acc.to(y.dtype.element_ty), mask=inside)


def lora_add_(y: Tensor, x: Tensor, a: Tensor, b: Tensor, table: Tensor, scale: Tensor, ranks: int = 0) -> None:
    """See `reference.lora_add_`; for ranks up to `MAX_RANK`; sums are rounded to y's dtype once."""
    lora_add_several_([y], x, [a], [b], table[None], scale[None], ranks)


def lora_add_several_(
    ys: Sequence[Tensor],
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    table: Tensor,
    scale: Tensor,
    ranks: int = 0,
) -> None:
    """`lora_add_` for up to three linears of one input: table `[linears, S, 5]`, scale `[linears, S]`."""
    linears, segments = scale.shape
    tokens = len(x)
    if tokens == 0 or segments == 0:
        return
    x, table, scale = x.contiguous(), table.contiguous(), scale.contiguous()
    tiles = _tiles(tokens)
    ranks = ranks or min(MAX_RANK, max(map(len, a)))
    # Many tokens fill the GPU without splits, and scratch grows with tokens times splits.
    most = 8 if is_deterministic() else max(1, min(8, 1024 // tokens))
    splits = triton.next_power_of_2(min(most, triton.cdiv(x.shape[1], 512)))
    at_once = max(1, SCRATCH // (4 * linears * splits * tokens * ranks))
    sums = ys if segments <= at_once else [y.float() for y in ys]  # rounded once, for any number of pieces
    # bf16 and fp16 numbers are exact in tf32: only fp32 rows lose bits, which matters only with fp32 activations.
    precision = "ieee" if x.dtype == torch.float32 else "tf32"
    rows, columns = triton.cdiv(tokens, tiles.tokens), triton.cdiv(max(y.shape[1] for y in ys), tiles.outs)
    widths = [y.shape[1] for y in ys]
    for first in range(0, segments, at_once):
        count = min(at_once, segments - first)
        piece = table[:, first:]
        down = x.new_empty(linears * count * splits * tokens * ranks, dtype=torch.float32)
        shared = {
            "SEGMENTS": triton.next_power_of_2(count),
            "BLOCK_T": tiles.tokens,
            "BLOCK_R": tiles.ranks,
            "SPLITS": splits,
            "LINEARS": linears,
            "PRECISION": precision,
        }
        numbers = (count, segments, ranks)
        _shrink[(rows, splits, linears)](
            x,
            *_pad_to_three(a),
            piece,
            scale[:, first:],
            down,
            tokens,
            x.shape[1],
            *numbers,
            BLOCK_K=tiles.ins,
            **shared,
        )
        _expand[(rows, columns, linears)](
            *_pad_to_three(sums),
            *_pad_to_three(b),
            piece,
            down,
            tokens,
            *_pad_to_three(widths),
            *numbers,
            BLOCK_N=tiles.outs,
            **shared,
        )
    for y, total in zip(ys, sums, strict=True):
        if total is not y:
            y.copy_(total)


def _pad_to_three(arguments: Sequence[Any]) -> list[Any]:
    """Return a kernel's three parameters; missing ones are filled with the first and not used."""
    return [*arguments, *[arguments[0]] * (3 - len(arguments))]


class Tiles(NamedTuple):
    """The sizes of a program's tiles."""

    tokens: int
    ranks: int
    ins: int
    outs: int


def _tiles(tokens: int) -> Tiles:
    if large_tiles():
        return Tiles(64, 64, 256, 256)
    rows = 16 if is_deterministic() else 1 if tokens <= 64 else 32
    return Tiles(rows, 16, 128, 64)
