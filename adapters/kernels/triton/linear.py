"""4-bit linears for few rows, on bitsandbytes' storage: codes are looked up and multiplied, never stored.

A program decodes a tile of weights once for up to 64 rows. Codes enter the tensor cores unscaled; each block's scale
(with double quantisation decoded) multiplies the block's fp32 sums. One row is summed without the tensor cores. Long
inputs are split over programs, and the last program to finish adds the partial sums in order. More rows, and other
weights, are done as in `reference`: dequantise, then a library product.

On a GPU, 16-bit codes are looked up in registers, four at a time, by permuting bytes (`lookup_asm`): a gather from
memory for each weight took half of the time.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# A kernel's parameters are pointers and numbers of Triton's, which has no types for them.

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from adapters.kernels import reference
from adapters.kernels.experts import ExpertWeights
from adapters.kernels.triton import is_deterministic, is_interpreted, large_tiles
from adapters.kernels.weight import QuantizedWeight

MAX_ROWS = 64
CHUNK: tl.constexpr = tl.constexpr(64)  # weights of one row; a scale covers one or more chunks


@triton.jit
def _look_up(packed, code, LOOKUP: tl.constexpr, DOT: tl.constexpr):
    """Return the codes of bytes' high and low nibbles."""
    if LOOKUP == "":
        nibbles = packed.to(tl.int32)
        high = tl.load(code + (nibbles >> 4)).to(DOT)
        low = tl.load(code + (nibbles & 15)).to(DOT)
    elif tl.bfloat16 == DOT:
        high, low = tl.inline_asm_elementwise(
            LOOKUP, "=r,=r,=r,=r,r", [packed], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    else:
        high, low = tl.inline_asm_elementwise(
            LOOKUP, "=r,=r,=r,=r,r", [packed], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
    return high, low


@triton.jit
def _inputs(x, at, mask, PAIRED: tl.constexpr, DOT: tl.constexpr):
    """Load pairs of adjacent inputs, at index `at` of pairs: the even ones and the odd ones."""
    if PAIRED:  # 16 bits each: one load for both
        pairs = tl.load(x.to(tl.pointer_type(tl.int32)) + at, mask=mask, other=0)
        even = pairs.to(tl.int16).to(x.dtype.element_ty, bitcast=True)
        odd = (pairs >> 16).to(tl.int16).to(x.dtype.element_ty, bitcast=True)
    else:
        even = tl.load(x + 2 * at, mask=mask, other=0.0)
        odd = tl.load(x + 2 * at + 1, mask=mask, other=0.0)
    return even.to(DOT), odd.to(DOT)


@triton.jit
def _levels(absmax, nested_absmax, at, known, NESTED: tl.constexpr):
    """Load blocks' absmax and, with double quantisation, its scale."""
    level = tl.load(absmax + at, mask=known, other=0)
    outer = tl.load(nested_absmax + at // NESTED, mask=known, other=0.0) if NESTED > 0 else level
    return level, outer


@triton.jit
def tile_sums(
    x,
    data,
    absmax,
    code,
    nested_absmax,
    nested_code,
    offset,
    n,
    m,
    rows,
    outs,
    ins,
    begin,
    end,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,
    LOOKUP: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Return products of outputs n and rows m below `rows`, over chunks [begin, end): fp32 [BLOCK_N, BLOCK_M].

    Arguments as in `_linear`.
    """
    byte, ahead = tl.arange(0, CHUNK // 2), tl.arange(0, UNROLL)
    first_weight = n.to(tl.int64) * ins
    first_pair = m.to(tl.int64) * (ins // 2)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_N], tl.float32)  # in place of `acc` for a single row
    # A scale takes two dependent loads: the first is done one iteration ahead.
    at = (first_weight // BLOCKSIZE)[:, None] + ((begin + ahead) * CHUNK // BLOCKSIZE)[None, :]
    known = (n < outs)[:, None] & (begin + ahead < end)[None, :]
    level, outer = _levels(absmax, nested_absmax, at, known, NESTED)
    for first in range(begin, end, UNROLL):
        if NESTED > 0:
            scales = tl.load(nested_code + level.to(tl.int32)) * outer + offset  # [BLOCK_N, UNROLL]
        else:
            scales = level
        following = first + UNROLL + ahead
        at = (first_weight // BLOCKSIZE)[:, None] + (following * CHUNK // BLOCKSIZE)[None, :]
        known = (n < outs)[:, None] & (following < end)[None, :]
        level, outer = _levels(absmax, nested_absmax, at, known, NESTED)
        for step in tl.static_range(UNROLL):
            chunk = first + step
            in_range = chunk < end
            packed = tl.load(
                data + (first_weight // 2 + chunk * (CHUNK // 2))[:, None] + byte[None, :],
                mask=(n < tl.where(in_range, outs, 0))[:, None],
                other=0,
                eviction_policy="evict_first",
            )
            high, low = _look_up(packed, code, LOOKUP, DOT)
            scale = tl.sum(tl.where(ahead[None, :] == step, scales, 0.0), axis=1)
            if BLOCK_M == 1:
                byte_mask = byte < tl.where(in_range, CHUNK // 2, 0)
                even, odd = _inputs(x, chunk * (CHUNK // 2) + byte, byte_mask, LOOKUP != "", tl.float32)
                products = high.to(tl.float32) * even[None, :] + low.to(tl.float32) * odd[None, :]
                sums += tl.sum(products, axis=1) * scale
            else:
                pair = first_pair[None, :] + (chunk * (CHUNK // 2) + byte)[:, None]
                real = (m < tl.where(in_range, rows, 0))[None, :]
                even, odd = _inputs(x, pair, real, LOOKUP != "", DOT)  # [CHUNK / 2, BLOCK_M]
                dots = tl.dot(high, even, input_precision="ieee")
                dots = tl.dot(low, odd, dots, input_precision="ieee")  # [BLOCK_N, BLOCK_M]
                acc += dots * scale[:, None]
    if BLOCK_M == 1:
        acc = sums[:, None]
    return acc


@triton.jit(do_not_specialize=["rows"])  # otherwise many steps would compile again
def _linear(
    x,  # [rows, ins]
    data,  # uint8 [outs * ins / 2], two codes per byte, the earlier one in the high nibble
    absmax,  # [outs * ins / BLOCKSIZE], uint8 if NESTED else fp32
    code,  # [16] in x's dtype
    nested_absmax,
    nested_code,
    offset,
    bias,
    y,  # [rows, outs]
    partial,  # fp32 [SPLITS, rows, outs]
    arrived,  # int32 [tiles], zeros; left as zeros
    rows,
    outs,
    ins,
    BLOCKSIZE: tl.constexpr,
    NESTED: tl.constexpr,  # blocks per nested absmax; 0 without double quantisation
    BIAS: tl.constexpr,
    LOOKUP: tl.constexpr,  # from `lookup_asm`, or empty to gather codes from memory
    DOT: tl.constexpr,  # dtype of the factors of products
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNROLL: tl.constexpr,  # chunks in flight
    SPLITS: tl.constexpr,
):
    tile_n, tile_m, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    chunks = ins // CHUNK
    per_split = tl.cdiv(tl.cdiv(chunks, UNROLL), SPLITS) * UNROLL
    begin = split * per_split
    end = tl.minimum(begin + per_split, chunks)
    acc = tile_sums(
        x,
        data,
        absmax,
        code,
        nested_absmax,
        nested_code,
        offset,
        n,
        m,
        rows,
        outs,
        ins,
        begin,
        end,
        BLOCKSIZE,
        NESTED,
        LOOKUP,
        DOT,
        BLOCK_M,
        BLOCK_N,
        UNROLL,
    )

    target = m.to(tl.int64)[None, :] * outs + n[:, None]
    mask = (n < outs)[:, None] & (m < rows)[None, :]
    last = True
    if SPLITS > 1:
        plane = rows * outs
        tl.store(partial + split * plane + target, acc, mask=mask)
        tl.debug_barrier()  # all of the program's stores precede its count
        counter = arrived + tile_m * tl.num_programs(0) + tile_n
        last = tl.atomic_add(counter, 1, sem="acq_rel") == SPLITS - 1
        tl.debug_barrier()
        if last:
            acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            for other in range(SPLITS):
                acc += tl.load(partial + other * plane + target, mask=mask, other=0.0, cache_modifier=".cg")
            tl.store(counter, 0)
    if last:
        if BIAS:
            acc += tl.load(bias + n, mask=n < outs, other=0.0).to(tl.float32)[:, None]
        tl.store(y + target, acc.to(y.dtype.element_ty), mask=mask)


class Tiles(NamedTuple):
    """The division of a launch. The values below were the fastest tried on an H200, for 4-bit linears of 8B models."""

    outs: int
    unroll: int
    splits: int  # most splits
    warps: int
    stages: int


_ONE_ROW = Tiles(16, 4, 8, 1, 2)
_FEW_ROWS = Tiles(32, 2, 8, 2, 3)  # up to 16
_MORE_ROWS = Tiles(64, 2, 4, 4, 3)
_CHUNKS = 8  # least chunks per split

_tables: dict[Any, tuple[Tensor, str]] = {}  # (kind, dtype, device) -> the 16 codes in that dtype, and `lookup_asm`
_counters: dict[Any, Tensor] = {}  # (device, stream) -> int32 zeros, one per tile of a launch
_COUNTERS = 1 << 16


def supports_weight(weight: QuantizedWeight | ExpertWeights) -> bool:
    """Whether a weight is 4-bit, with rows of whole blocks and blocks of whole chunks."""
    four_bit = weight.kind in ("nf4", "fp4")
    return four_bit and weight.blocksize % CHUNK.value == 0 and weight.shape[1] % weight.blocksize == 0


def linear_forward(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """See `reference.linear_forward`."""
    few = 0 < len(x) <= MAX_ROWS or (is_deterministic() and len(x) > 0)
    if not (few and supports_weight(weight)):
        return (
            _linear_in_fixed_batches(x, weight, bias)
            if is_deterministic()
            else reference.linear_forward(x, weight, bias)
        )
    return linear_by_tiles(x, weight, bias, choose_tiles(len(x), weight.shape))


def _linear_in_fixed_batches(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """Run the library product always on the same number of rows, so that it always takes the same path."""
    dense = replace(weight, kind="dense", data=weight.dequantize(x.dtype))
    y = x.new_empty(len(x), weight.shape[0])
    for first in range(0, len(x), MAX_ROWS):
        rows = x[first : first + MAX_ROWS]
        padded = F.pad(rows, (0, 0, 0, MAX_ROWS - len(rows)))
        y[first : first + MAX_ROWS] = reference.linear_forward(padded, dense, bias)[: len(rows)]
    return y


def choose_tiles(rows: int, shape: tuple[int, int]) -> Tiles:
    """Return the tiles for a number of rows; if deterministic, they depend only on the weight's shape."""
    outs, ins = shape
    if large_tiles():
        return Tiles(min(256, triton.next_power_of_2(outs)), 1, 1, 4, 3)
    tiles = _MORE_ROWS if is_deterministic() or rows > 16 else _FEW_ROWS if rows > 1 else _ONE_ROW
    splits = 1
    while splits < tiles.splits and ins // (CHUNK.value * 2 * splits) >= _CHUNKS:
        splits *= 2
    return tiles._replace(splits=splits)


def linear_by_tiles(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, tiles: Tiles) -> Tensor:
    """Run the kernel with these tiles."""
    x = pair_aligned(x)
    (rows, ins), outs = x.shape, weight.shape[0]
    y = x.new_empty(rows, outs)
    if is_deterministic():
        block_m = MAX_ROWS
    else:
        block_m = 1 if rows == 1 else max(16, triton.next_power_of_2(min(rows, MAX_ROWS)))
    grid = triton.cdiv(outs, tiles.outs), triton.cdiv(rows, block_m), tiles.splits
    assert grid[0] * grid[1] <= _COUNTERS
    nested = weight.nested_absmax is not None
    code, lookup = code_table(weight, x.dtype)
    _linear[grid](
        x,
        weight.data,
        weight.absmax,
        code,
        weight.nested_absmax if nested else weight.absmax,
        weight.nested_code if nested else weight.absmax,
        weight.offset,
        y if bias is None else bias,
        y,
        y if tiles.splits == 1 else x.new_empty(tiles.splits, rows, outs, dtype=torch.float32),
        _arrival_counters(x.device),
        rows,
        outs,
        ins,
        BLOCKSIZE=weight.blocksize,
        NESTED=weight.nested_blocksize if nested else 0,
        BIAS=bias is not None,
        LOOKUP=lookup,
        DOT=dot_dtype(x.dtype),
        BLOCK_M=block_m,
        BLOCK_N=tiles.outs,
        UNROLL=tiles.unroll,
        SPLITS=tiles.splits,
        num_warps=tiles.warps,
        num_stages=tiles.stages,
    )
    return y


def pair_aligned(x: Tensor) -> Tensor:
    """Return the same numbers, contiguous and aligned so that two of 16 bits can be read at once."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 4 else x


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """Return the dtype in which numbers of this dtype are multiplied."""
    # The interpreter multiplies bf16 as integers; fp32 gives the same products.
    if is_interpreted() or dtype == torch.float32:
        return tl.float32
    return tl.bfloat16 if dtype == torch.bfloat16 else tl.float16


def code_table(weight: QuantizedWeight | ExpertWeights, dtype: torch.dtype) -> tuple[Tensor, str]:
    """Return the 16 codes in that dtype, and their `lookup_asm` if they are looked up in registers, else ""."""
    key = (weight.kind, dtype, weight.data.device)
    if key not in _tables:
        assert weight.code is not None
        code = weight.code.to(dtype)
        in_registers = dtype != torch.float32 and not is_interpreted()
        _tables[key] = code, lookup_asm(code.view(torch.int16).tolist()) if in_registers else ""
    return _tables[key]


def lookup_asm(values: Sequence[int]) -> str:
    """Return PTX that looks up four bytes' nibbles among 16 values of 16 bits.

    Args:
        values: the values' bits.

    Returns:
        Instructions from `$4`, four bytes, to the values of the high nibbles in `$0` and `$1`, two each, and of the low
        nibbles in `$2` and `$3`.
    """
    # `prmt` picks four bytes, each of eight by three bits: two for sixteen values, and a third for the fourth bit.
    low_bytes, high_bytes = ([value >> shift & 255 for value in values] for shift in (0, 8))
    lines = [
        "{ .reg .b32 three, fourth, a, b, low, high;",
        "and.b32 three, $4, 0x77777777;",
        "shr.u32 fourth, $4, 1;",
        "and.b32 fourth, fourth, 0x44444444;",
        "or.b32 fourth, fourth, 0x32103210;",
    ]
    for half in range(2):
        if half:
            lines += ["shr.u32 three, three, 16;", "shr.u32 fourth, fourth, 16;"]
        for name, chosen in (("low", low_bytes), ("high", high_bytes)):
            words = [int.from_bytes(bytes(chosen[first : first + 4]), "little") for first in range(0, 16, 4)]
            lines += [
                f"prmt.b32 a, {words[0]:#x}, {words[1]:#x}, three;",
                f"prmt.b32 b, {words[2]:#x}, {words[3]:#x}, three;",
                f"prmt.b32 {name}, a, b, fourth;",
            ]
        # Of four nibbles, the first and third are low ones.
        lines += [f"prmt.b32 ${half}, low, high, 0x7351;", f"prmt.b32 ${2 + half}, low, high, 0x6240;"]
    return " ".join([*lines, "}"])


def _arrival_counters(device: torch.device) -> Tensor:
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (device, stream)
    if key not in _counters:
        _counters[key] = torch.zeros(_COUNTERS, dtype=torch.int32, device=device)
    return _counters[key]
