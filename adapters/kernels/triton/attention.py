"""Paged attention: one kernel for prompts, chunks and decoding, with keys in groups of 64 from position 0 on.

A program takes one KV head's queries of one request (several positions times the heads that share the KV head) and a
range of its keys. With few programs, keys are split at positions that depend on the longest possible sequence and the
number of tokens, and `_combine` joins the parts in order.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# A kernel's parameters are pointers and numbers of Triton's, which has no types for them.

import torch
import triton
import triton.language as tl
from torch import Tensor

from adapters.kernels.reference import KEY_GROUP
from adapters.kernels.triton import is_deterministic, large_tiles
from adapters.kernels.triton.elementwise import tile_rows
from adapters.kernels.triton.linear import dot_dtype

LOG2E = tl.constexpr(1.4426950408889634)
EXPONENT_GAP = tl.constexpr(2.0**120)  # for the difference of fp32's and fp8's exponent biases
EXPONENT_GAP_BACK = tl.constexpr(2.0**-120)
ROUNDING = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to an integer
PLAIN, FP8, INT8 = (tl.constexpr(kind) for kind in range(3))  # caches: plain numbers, e4m3, int8 with a scale per row
MAX_SPLITS = 64
MIN_SPLIT = 256  # keys
FEW_TOKENS = 256  # up to this many tokens, keys are split and query tiles small


@triton.jit
def _first_number(block_line, slot, STRIDE: tl.constexpr):
    """Return the place of the first number of row `block_line + slot`, for ascending slots and any blocks.

    Not the sum times STRIDE: Triton 3.6 takes such a sum for a multiple of 16 if its first element is one, and reads
    int8 rows, which are four bytes longer than their numbers, in pieces to which they are not aligned.
    """
    return block_line * STRIDE + slot * STRIDE


@triton.jit
def _numbers(cache, scale, place, line, inside, known, DIM: tl.constexpr, STRIDE: tl.constexpr, KIND: tl.constexpr):
    """Load rows of a cache, in the cache's dtype or, from fp8 and int8, as fp32."""
    numbers = tl.load(cache + place, mask=inside, other=0)
    if KIND == FP8:  # see `load` of simd.h
        bits = numbers.to(tl.int32)
        size = bits & 0x7F
        numbers = (((bits & 0x80) << 24) | (size << 20)).to(tl.float32, bitcast=True) * EXPONENT_GAP
        numbers = tl.where(size == 0x7F, float("nan"), numbers)
    if KIND == INT8:
        factor = tl.load(scale + line * (STRIDE // 4) + DIM // 4, mask=known, other=0.0)
        numbers = numbers.to(tl.float32) * factor[:, None]
    return numbers


@triton.jit(do_not_specialize=["tokens", "requests", "max_blocks"])  # otherwise many steps would compile again
def _attend(
    q,  # [tokens, heads, DIM]
    k_cache,  # [blocks, kv_heads, block_size, STRIDE]; fp8 as uint8
    v_cache,
    k_scale,  # the same memory as fp32: an int8 row's scale follows its numbers
    v_scale,
    seqs,  # int32 [requests, 3]: q_start, q_end, kv_len, ascending
    block_tables,  # int32 [requests, max_blocks]
    out,  # as q; not written if SPLIT
    part,  # fp32 [splits, tokens, heads, DIM], not yet divided by the sums
    part_top,  # fp32 [splits, tokens, heads], the largest score
    part_sum,  # fp32 [splits, tokens, heads]
    tokens,
    heads,
    kv_heads,
    requests,
    max_blocks,
    block_size,
    split_keys,
    scaling,  # times log2(e), unless SOFTCAP
    window,
    softcap,
    sinks,  # fp32 [heads]
    DIM: tl.constexpr,
    PADDED: tl.constexpr,  # DIM up to a power of two
    REQUESTS: tl.constexpr,
    GROUP: tl.constexpr,  # heads per KV head
    BLOCK_M: tl.constexpr,
    KEYS: tl.constexpr,
    SPLIT: tl.constexpr,
    DOT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    STRIDE: tl.constexpr,  # of a cache's rows
    KIND: tl.constexpr,  # of the cache: PLAIN, FP8, INT8
):
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    POSITIONS: tl.constexpr = BLOCK_M // GROUP  # queries of a tile
    # Tile `start // POSITIONS + r` is the first possible one of request r: find this tile's request.
    r = tl.arange(0, REQUESTS)
    starts = tl.load(seqs + r * 3, mask=r < requests, other=0)
    mine = (r < requests) & (starts // POSITIONS + r <= tile)
    request = tl.maximum(tl.sum(mine.to(tl.int32), axis=0) - 1, 0)  # padding requests start beyond all tiles
    q_start, q_end = tl.load(seqs + request * 3), tl.load(seqs + request * 3 + 1)
    kv_len = tl.load(seqs + request * 3 + 2)
    first_query = q_start + (tile - (q_start // POSITIONS + request)) * POSITIONS
    if (first_query >= q_start) & (first_query < q_end):
        m = tl.arange(0, BLOCK_M)
        token = first_query + m // GROUP
        head = kv_head * GROUP + m % GROUP
        real = (token < q_end) & (m < POSITIONS * GROUP)
        position = kv_len - (q_end - token)
        d = tl.arange(0, PADDED)
        row = token.to(tl.int64) * heads + head
        at = row[:, None] * DIM + d[None, :]
        mask = real[:, None] & (d < DIM)[None, :]
        queries = tl.load(q + at, mask=mask, other=0.0).to(DOT)

        last_query = tl.minimum(first_query + POSITIONS, q_end) - 1
        begin = split * split_keys
        end = tl.minimum(begin + split_keys, kv_len - (q_end - last_query) + 1)
        if window > 0:
            oldest = tl.maximum(kv_len - (q_end - first_query) - window + 1, 0)
            begin = tl.maximum(begin, oldest // KEYS * KEYS)

        top = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, PADDED], tl.float32)
        for first_key in range(begin, end, KEYS):
            key = first_key + tl.arange(0, KEYS)
            known = key < kv_len
            block = tl.load(block_tables + request * max_blocks + key // block_size, mask=known, other=0)
            block_line, slot = (block.to(tl.int64) * kv_heads + kv_head) * block_size, key % block_size
            line = block_line + slot
            place = _first_number(block_line, slot, STRIDE)[:, None] + d[None, :]
            inside = known[:, None] & (d < DIM)[None, :]
            keys = _numbers(k_cache, k_scale, place, line, inside, known, DIM, STRIDE, KIND).to(DOT)
            scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scaling  # [BLOCK_M, KEYS]
            if SOFTCAP:  # LOG2E * softcap * tanh(scores / softcap)
                scores = LOG2E * softcap * (1.0 - 2.0 / (tl.exp2(scores * (2.0 * LOG2E / softcap)) + 1.0))
            visible = key[None, :] <= position[:, None]
            if window > 0:
                visible = visible & (key[None, :] > (position - window)[:, None])
            scores = tl.where(visible, scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, axis=1))
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # for rows without a visible key yet
            weights = tl.exp2(scores - shift[:, None])
            decay = tl.exp2(top - shift)
            total = total * decay + tl.sum(weights, axis=1)
            values = _numbers(v_cache, v_scale, place, line, inside, known, DIM, STRIDE, KIND).to(DOT)
            rounded = weights.to(q.dtype.element_ty).to(DOT)
            acc = acc * decay[:, None] + tl.dot(rounded, values, input_precision="ieee")
            top = new_top

        if not SPLIT:
            total = tl.where(total == 0.0, 1.0, total)  # for rows without a query
            if SINKS:
                total += tl.exp2(tl.load(sinks + head, mask=real, other=0.0) * LOG2E - top)
            tl.store(out + at, (acc / total[:, None]).to(out.dtype.element_ty), mask=mask)
        else:
            plane = split * tokens * heads
            tl.store(part_top + plane + row, top, mask=real)
            tl.store(part_sum + plane + row, total, mask=real)
            if begin < end:  # a split beyond the sequence adds nothing, and `_combine` ignores it
                # int64: splits times tokens times a wide model may pass 2^31.
                tl.store(part + (plane + row)[:, None] * DIM + d[None, :], acc, mask=mask)


@triton.jit(do_not_specialize=["tokens", "requests"])
def _combine(
    out,
    part,
    part_top,
    part_sum,
    seqs,
    sinks,
    tokens,
    heads,
    requests,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    REQUESTS: tl.constexpr,
    SPLITS: tl.constexpr,
    SINKS: tl.constexpr,
):
    token, head = tl.program_id(0), tl.program_id(1)
    r = tl.arange(0, REQUESTS)
    start = tl.load(seqs + r * 3, mask=r < requests, other=0)
    end = tl.load(seqs + r * 3 + 1, mask=r < requests, other=0)
    owned = tl.sum(((start <= token) & (token < end)).to(tl.int32), axis=0) > 0
    d = tl.arange(0, PADDED)
    row = token.to(tl.int64) * heads + head
    if owned:
        top = tl.load(part_top + row)
        for split in tl.static_range(1, SPLITS):
            top = tl.maximum(top, tl.load(part_top + split * tokens * heads + row))
        shift = tl.where(top == float("-inf"), 0.0, top)
        total = 0.0
        acc = tl.zeros([PADDED], tl.float32)
        for split in tl.static_range(SPLITS):
            at = split * tokens * heads + row
            own = tl.load(part_top + at)
            weight = tl.exp2(own - shift)
            total += tl.load(part_sum + at) * weight
            width = tl.where(own > float("-inf"), DIM, 0)
            acc += tl.load(part + at * DIM + d, mask=d < width, other=0.0) * weight
        if SINKS:
            total += tl.exp2(tl.load(sinks + head) * LOG2E - shift)
        tl.store(out + row * DIM + d, (acc / total).to(out.dtype.element_ty), mask=d < DIM)
    else:
        tl.store(out + row * DIM + d, tl.zeros([PADDED], out.dtype.element_ty), mask=d < DIM)


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
    """See `reference.paged_attention`; for requests with ascending q_start; weights are rounded to the dtype of q."""
    q, seqs, block_tables = q.contiguous(), seqs.contiguous(), block_tables.contiguous()
    tokens, heads, dim = q.shape
    _, kv_heads, block_size, _ = k_cache.shape
    requests, max_blocks = block_tables.shape
    if requests == 0 or tokens == 0:
        return torch.zeros_like(q)
    group = heads // kv_heads
    splits, split_keys = _splits(tokens, max_blocks * block_size)
    small = (is_deterministic() or tokens <= FEW_TOKENS) and not large_tiles()
    block_m = max(16 if small else 64, triton.next_power_of_2(group))
    sizes = {
        "DIM": dim,
        "PADDED": max(16, triton.next_power_of_2(dim)),
        "REQUESTS": triton.next_power_of_2(requests),
    }
    if splits == 1:
        out = torch.zeros_like(q)
        part = top = total = out
    else:
        out = torch.empty_like(q)
        part = q.new_empty(splits, tokens, heads, dim, dtype=torch.float32)
        top, total = q.new_empty(2, splits, tokens, heads, dtype=torch.float32)
    kind, dtype = _layout(k_cache)
    _attend[(tokens // (block_m // group) + requests, kv_heads, splits)](
        q,
        *(cache.view(dtype) for cache in (k_cache, v_cache)),
        *(cache.view(torch.float32) if kind == INT8.value else q for cache in (k_cache, v_cache)),
        seqs,
        block_tables,
        out,
        part,
        top,
        total,
        tokens,
        heads,
        kv_heads,
        requests,
        max_blocks,
        block_size,
        split_keys,
        scaling if softcap else scaling * LOG2E,
        window,
        softcap,
        q if sinks is None else sinks,
        GROUP=group,
        BLOCK_M=block_m,
        KEYS=KEY_GROUP,
        SPLIT=splits > 1,
        DOT=dot_dtype(q.dtype),
        SOFTCAP=softcap > 0,
        SINKS=sinks is not None,
        STRIDE=k_cache.shape[3],
        KIND=kind,
        num_warps=4,
        num_stages=2 if dim <= 128 else 1,  # pipelined keys and values take shared memory
        **sizes,
    )
    if splits > 1:
        _combine[(tokens, heads)](
            out,
            part,
            top,
            total,
            seqs,
            q if sinks is None else sinks,
            tokens,
            heads,
            requests,
            SPLITS=splits,
            SINKS=sinks is not None,
            **sizes,
        )
    return out


def _splits(tokens: int, max_keys: int) -> tuple[int, int]:
    """Return the number of splits, a power of two (each is compiled), and keys per split, for up to `max_keys` keys."""
    if is_deterministic() or tokens > FEW_TOKENS or max_keys <= MIN_SPLIT:
        return 1, max_keys
    most = MAX_SPLITS if tokens <= 16 else 32 if tokens <= 32 else 16  # many requests fill the GPU without splits
    splits = min(most, triton.next_power_of_2(triton.cdiv(max_keys, MIN_SPLIT)))
    return splits, triton.cdiv(triton.cdiv(max_keys, splits), KEY_GROUP) * KEY_GROUP


def _layout(cache: Tensor) -> tuple[int, torch.dtype]:
    """Return a cache's kind, and the dtype in which kernels view it."""
    match cache.dtype:
        case torch.float8_e4m3fn:
            return FP8.value, torch.uint8
        case torch.int8:
            return INT8.value, torch.int8
        case dtype:
            return PLAIN.value, dtype


@triton.jit
def _store(cache, scale, states, target, line, mask, real, DIM: tl.constexpr, STRIDE: tl.constexpr, KIND: tl.constexpr):
    """Store rows in a cache, rounded as in `reference.cache_rows`."""
    if KIND == FP8:
        states = states.to(tl.float32)
        near = tl.minimum(tl.abs(states), 448.0)
        bits = (near * EXPONENT_GAP_BACK).to(tl.int32, bitcast=True)
        size = (bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20
        size = tl.where(near < 0.015625, ((near * 512.0 + ROUNDING) - ROUNDING).to(tl.int32), size)  # subnormal
        size = tl.where(states == states, size, 0x7F)
        sign = (states.to(tl.int32, bitcast=True) >> 24) & 0x80
        tl.store(cache + target, (sign | size).to(tl.uint8), mask=mask)
    elif KIND == INT8:
        states = states.to(tl.float32)
        factor = tl.max(tl.abs(states), axis=1) / 127.0
        codes = states / tl.where(factor > 0, factor, 1.0)[:, None]
        codes = (codes + ROUNDING) - ROUNDING
        tl.store(cache + target, codes.to(tl.int8), mask=mask)
        tl.store(scale + line * (STRIDE // 4) + DIM // 4, factor, mask=real)
    else:
        tl.store(cache + target, states.to(cache.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _write(
    k,
    v,
    k_cache,
    v_cache,
    k_scale,
    v_scale,
    slots,
    rows,
    kv_heads,
    block_size,
    DIM: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    STRIDE: tl.constexpr,
    KIND: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # one head of one token
    token, head = row // kv_heads, row % kv_heads
    slot = tl.load(slots + token, mask=row < rows, other=0)
    d = tl.arange(0, PADDED)
    mask = (row < rows)[:, None] & (d < DIM)[None, :]
    block_line = (slot // block_size * kv_heads + head) * block_size
    line = block_line + slot % block_size
    target = _first_number(block_line, slot % block_size, STRIDE)[:, None] + d[None, :]
    source = row.to(tl.int64)[:, None] * DIM + d[None, :]
    key, value = tl.load(k + source, mask=mask, other=0.0), tl.load(v + source, mask=mask, other=0.0)
    _store(k_cache, k_scale, key, target, line, mask, row < rows, DIM, STRIDE, KIND)
    _store(v_cache, v_scale, value, target, line, mask, row < rows, DIM, STRIDE, KIND)


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """See `reference.write_kv`."""
    k, v = k.contiguous(), v.contiguous()
    tokens, heads, dim = k.shape
    if tokens:
        rows, tile = tokens * heads, tile_rows(triton.next_power_of_2(heads))
        kind, dtype = _layout(k_cache)
        _write[(triton.cdiv(rows, tile),)](
            k,
            v,
            *(cache.view(dtype) for cache in (k_cache, v_cache)),
            *(cache.view(torch.float32) if kind == INT8.value else k for cache in (k_cache, v_cache)),
            slots,
            rows,
            heads,
            k_cache.shape[2],
            DIM=dim,
            PADDED=triton.next_power_of_2(dim),
            ROWS=tile,
            STRIDE=k_cache.shape[3],
            KIND=kind,
        )
