"""4-bit linears for few rows, on bitsandbytes' storage: codes are looked up and multiplied, never written out.

A program decodes a tile of weights once for up to 64 rows. Codes enter the tensor cores as they are; each block's scale
(double quantisation undone on the way) multiplies the block's fp32 sums. Long inputs are split over programs, and the
last one to arrive adds the partial sums in their order. More rows, and other weights, go by `reference`'s way:
dequantise, then a library product.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# A kernel's parameters are pointers and numbers of Triton's, which has no types for them.

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from adapters.kernels import reference
from adapters.kernels.triton import deterministic, few_programs, interpreted
from adapters.kernels.weight import QuantizedWeight

MAX_ROWS = 64
MAX_SPLITS = 8
CHUNK: tl.constexpr = tl.constexpr(64)  # weights of one row that share a scale, at least


@triton.jit(do_not_specialize=["rows"])  # or every other step would compile anew
def _linear(
    x,  # [rows, ins]
    data,  # uint8 [outs * ins / 2], two codes a byte, the earlier one in the high nibble
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
    NESTED: tl.constexpr,  # blocks that share a nested absmax; 0 without double quantisation
    BIAS: tl.constexpr,
    DOT: tl.constexpr,  # dtype of the factors of products
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNROLL: tl.constexpr,  # chunks in flight
    SPLITS: tl.constexpr,
):
    tile_n, tile_m, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    column, byte = tl.arange(0, CHUNK), tl.arange(0, CHUNK // 2)
    first_weight = n.to(tl.int64) * ins
    first_x = m.to(tl.int64) * ins

    chunks = ins // CHUNK
    per_split = tl.cdiv(tl.cdiv(chunks, UNROLL), SPLITS) * UNROLL
    begin = split * per_split
    end = tl.minimum(begin + per_split, chunks)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for first in range(begin, end, UNROLL):
        for step in tl.static_range(UNROLL):
            chunk = first + step
            there = chunk < end
            inside = n < tl.where(there, outs, 0)
            packed = tl.load(
                data + (first_weight // 2 + chunk * (CHUNK // 2))[:, None] + byte[None, :],
                mask=inside[:, None],
                other=0,
                eviction_policy="evict_first",
            ).to(tl.int32)
            high = tl.load(code + (packed >> 4)).to(DOT)
            low = tl.load(code + (packed & 15)).to(DOT)
            pairs = tl.load(
                x + first_x[:, None] + chunk * CHUNK + column[None, :],
                mask=(m < tl.where(there, rows, 0))[:, None],
                other=0.0,
            ).to(DOT)
            even, odd = tl.split(tl.reshape(pairs, [BLOCK_M, CHUNK // 2, 2]))  # [BLOCK_M, CHUNK / 2]
            sums = tl.dot(high, tl.trans(even), input_precision="ieee")
            sums = tl.dot(low, tl.trans(odd), sums, input_precision="ieee")  # [BLOCK_N, BLOCK_M]
            block = (first_weight + chunk * CHUNK) // BLOCKSIZE
            if NESTED > 0:
                level = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
                scale = tl.load(nested_absmax + block // NESTED, mask=inside, other=0.0)
                scale = tl.load(nested_code + level) * scale + offset
            else:
                scale = tl.load(absmax + block, mask=inside, other=0.0)
            acc += sums * scale[:, None]

    target = m.to(tl.int64)[None, :] * outs + n[:, None]
    mask = (n < outs)[:, None] & (m < rows)[None, :]
    last = True
    if SPLITS > 1:
        plane = rows * outs
        tl.store(partial + split * plane + target, acc, mask=mask)
        tl.debug_barrier()  # the whole program has stored before it says so
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


CONFIGS = [
    triton.Config({"BLOCK_N": block_n, "UNROLL": unroll, "SPLITS": splits}, num_warps=warps, num_stages=stages)
    for block_n, warps in ((16, 2), (32, 4), (64, 4))
    for unroll, stages in ((1, 4), (2, 3), (4, 2))
    for splits in (1, 2, 4, MAX_SPLITS)
]


def _worth_timing(configs: list[Any], arguments: dict[str, Any], **_: Any) -> list[Any]:
    """Without splits that would leave most of a GPU idle, or most programs hardly anything to do."""

    def worth(block_n: int, splits: int) -> bool:
        programs = triton.cdiv(arguments["outs"], block_n) * splits
        return (splits == 1 or programs <= 1024) and (splits == MAX_SPLITS or programs >= 128)

    return [config for config in configs if worth(config.kwargs["BLOCK_N"], config.kwargs["SPLITS"])]


# Timed once per GPU, shape and dtype (which Triton adds to the key itself); Triton keeps the choice on disk.
_tuned = triton.autotune(
    CONFIGS,
    key=["outs", "ins", "BLOCK_M"],
    prune_configs_by={"early_config_prune": _worth_timing},
    cache_results=True,
)(_linear)

_tables: dict[Any, Tensor] = {}  # (kind, dtype, device) -> the 16 code values in that dtype
_counters: dict[Any, Tensor] = {}  # (device, stream) -> int32 zeros, one for each tile of a launch
_COUNTERS = 1 << 16


def takes_weight(weight: QuantizedWeight) -> bool:
    """4-bit weights whose rows are whole blocks, and whose blocks are whole chunks."""
    four_bit = weight.kind in ("nf4", "fp4")
    return four_bit and weight.blocksize % CHUNK.value == 0 and weight.shape[1] % weight.blocksize == 0


def linear_forward(x: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    """As `reference.linear_forward`."""
    few = 0 < len(x) <= MAX_ROWS or (deterministic() and len(x) > 0)
    if not (few and takes_weight(weight)):
        return _fixed_rows(x, weight, bias) if deterministic() else reference.linear_forward(x, weight, bias)
    if deterministic() or interpreted():
        return few_rows(x, weight, bias, fixed_config(weight.shape))
    return few_rows(x, weight, bias, None)


def _fixed_rows(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """A library product always of as many rows, so that it always takes the same way."""
    dense = replace(weight, kind="dense", data=weight.dequantize(x.dtype))
    y = x.new_empty(len(x), weight.shape[0])
    for first in range(0, len(x), MAX_ROWS):
        rows = x[first : first + MAX_ROWS]
        padded = F.pad(rows, (0, 0, 0, MAX_ROWS - len(rows)))
        y[first : first + MAX_ROWS] = reference.linear_forward(padded, dense, bias)[: len(rows)]
    return y


def fixed_config(shape: tuple[int, int]) -> dict[str, int]:
    """Tiles that depend on nothing but the weight's shape: enough programs for a large GPU."""
    outs, ins = shape
    if few_programs():
        return {"BLOCK_N": min(256, triton.next_power_of_2(outs)), "UNROLL": 1, "SPLITS": 1}
    splits = 1
    while splits < MAX_SPLITS and outs // 32 * splits < 256 and ins // (CHUNK.value * splits) >= 8:
        splits *= 2
    return {"BLOCK_N": 32, "UNROLL": 2, "SPLITS": splits}


def few_rows(x: Tensor, weight: QuantizedWeight, bias: Tensor | None, config: dict[str, int] | None) -> Tensor:
    """Run the kernel, with one of `CONFIGS`' settings or, given None, with the fastest."""
    x = x.contiguous()
    (rows, ins), outs = x.shape, weight.shape[0]
    y = x.new_empty(rows, outs)
    block_m = MAX_ROWS if deterministic() else max(16, triton.next_power_of_2(min(rows, MAX_ROWS)))
    tiles_m = triton.cdiv(rows, block_m)
    splits = MAX_SPLITS if config is None else config["SPLITS"]
    nested = weight.nested_absmax is not None
    arguments = (
        x,
        weight.data,
        weight.absmax,
        _table(weight, x.dtype),
        weight.nested_absmax if nested else weight.absmax,
        weight.nested_code if nested else weight.absmax,
        weight.offset,
        y if bias is None else bias,
        y,
        y if splits == 1 else x.new_empty(splits, rows, outs, dtype=torch.float32),
        _arrivals(x.device),
        rows,
        outs,
        ins,
    )
    options: dict[str, Any] = {
        "BLOCKSIZE": weight.blocksize,
        "NESTED": weight.nested_blocksize if nested else 0,
        "BIAS": bias is not None,
        "DOT": dot_dtype(x.dtype),
        "BLOCK_M": block_m,
    }

    def grid(chosen: dict[str, int]) -> tuple[int, int, int]:
        return triton.cdiv(outs, chosen["BLOCK_N"]), tiles_m, chosen["SPLITS"]

    if config is None:
        _tuned[grid](*arguments, **options)
    else:
        assert triton.cdiv(outs, config["BLOCK_N"]) * tiles_m <= _COUNTERS
        _linear[grid](*arguments, **options, **config)
    return y


def dot_dtype(dtype: torch.dtype) -> tl.dtype:
    """What numbers of this dtype are multiplied as."""
    # The interpreter multiplies bf16 as if it were integers; as fp32 the same numbers give the same products.
    if interpreted() or dtype == torch.float32:
        return tl.float32
    return tl.bfloat16 if dtype == torch.bfloat16 else tl.float16


def _table(weight: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    key = (weight.kind, dtype, weight.device)
    if key not in _tables:
        assert weight.code is not None
        _tables[key] = weight.code.to(dtype)
    return _tables[key]


def _arrivals(device: torch.device) -> Tensor:
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (device, stream)
    if key not in _counters:
        _counters[key] = torch.zeros(_COUNTERS, dtype=torch.int32, device=device)
    return _counters[key]
