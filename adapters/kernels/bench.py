"""Benchmark of native kernels against libraries and the machine's roofline: `python -m adapters.kernels.bench`.

A linear is timed over a run of weights in one native call, as in a step; its library counterpart call by call.
Prints one JSON object: `roofline` (read_gb_s, fp32_gflop_s, threads, instruction_set) and `lines` (kernel, shape, rows,
seconds, library, library_seconds, bandwidth_share, flops_share), empty with `--roofline`. Weights are rotated through
more memory than caches hold, as in a model. Times are medians; the roofline is measured before and after, and the best
is used.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from itertools import chain, cycle
from typing import Any

import bitsandbytes.functional as bnb
import torch
import torch.nn.functional as F
from torch import Tensor

from adapters.kernels import native, reference
from adapters.kernels.weight import QuantizedWeight

MEMORY = 96 << 20  # total bytes of the rotated weights
BUDGET = 0.25  # seconds of measurement per figure
RUN = 8  # weights per timed call
SHAPES = [(576, 576), (1536, 576), (576, 1536)]  # q and o, gate and up, down of the default model
VOCAB, HIDDEN = 49152, 576


def time_call(function: Callable[[], Any], budget: float = BUDGET) -> float:
    """Return the median seconds of a call."""
    function()
    seconds: list[float] = []
    end = time.perf_counter() + budget
    while len(seconds) < 5 or (time.perf_counter() < end and len(seconds) < 200):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


class Roofline:
    """The machine's read bandwidth and fp32 multiply-add rate, the best of several measurements."""

    def __init__(self, kernels: native.Kernels) -> None:
        self._kernels = kernels
        self._data = torch.ones(64 << 20)  # 256 MiB
        self.read_gb_s = self.fp32_gflop_s = 0.0
        self.measure_once()

    def measure_once(self) -> None:
        for _ in range(5):
            start = time.perf_counter()
            self._kernels.read(self._data)
            middle = time.perf_counter()
            self._kernels.multiply_add(4000)
            end = time.perf_counter()
            self.read_gb_s = max(self.read_gb_s, self._data.nbytes / (middle - start) / 1e9)
            self.fp32_gflop_s = max(self.fp32_gflop_s, 2 * 4000e6 / (end - middle) / 1e9)


def random_nf4(out_features: int, in_features: int) -> QuantizedWeight:
    """Return a double-quantised NF4 weight of random bits: as fast to read as a real one, faster to make."""
    blocks = out_features * in_features // 64
    return QuantizedWeight(
        kind="nf4",
        data=torch.randint(0, 256, (out_features * in_features // 2, 1), dtype=torch.uint8),
        shape=(out_features, in_features),
        absmax=torch.randint(0, 256, (blocks,), dtype=torch.uint8),
        code=bnb.get_4bit_type("nf4", device="cpu"),
        blocksize=64,
        nested_absmax=torch.rand(-(-blocks // 256)),
        nested_code=bnb.create_dynamic_map(),
        nested_blocksize=256,
        offset=0.1,
    )


def weight_bytes(weight: QuantizedWeight) -> int:
    """Return the stored bytes of a weight, the least that a product must read."""
    if weight.int8 is not None:
        return weight.int8.data.nbytes
    parts = (weight.data, weight.absmax, weight.nested_absmax)
    return sum(part.nbytes for part in parts if part is not None)


def linear_lines(kernels: native.Kernels) -> list[dict[str, Any]]:
    return [line for shape in SHAPES for line in _linear_lines(kernels, *shape)]


def _linear_lines(kernels: native.Kernels, out_features: int, in_features: int) -> list[dict[str, Any]]:
    first = random_nf4(out_features, in_features)
    copies = MEMORY // weight_bytes(first) // RUN + 1
    runs = [[random_nf4(out_features, in_features) for _ in range(RUN)] for _ in range(copies)]
    int8_runs = [[weight.with_int8_inputs() for weight in run] for run in runs]
    for weight in chain(*runs, *int8_runs):
        kernels.weight(weight)  # the first use decodes double quantisation
    next_run, next_int8_run, weights = cycle(runs), cycle(int8_runs), cycle(chain.from_iterable(runs))

    def line(kernel: str, rows: int, seconds: float, library: str, library_seconds: float) -> dict[str, Any]:
        return {
            "kernel": kernel,
            "shape": f"{out_features}x{in_features}",
            "rows": rows,
            "seconds": seconds,
            "library": library,
            "library_seconds": library_seconds,
            "bytes": weight_bytes(first.with_int8_inputs() if "int8" in kernel else first),
            "flops": 2 * rows * out_features * in_features,
        }

    def forward(rows: int) -> dict[str, Any]:
        x = torch.randn(rows, in_features)
        seconds = time_call(lambda: kernels.linear_run(x, next(next_run))) / RUN
        library = "bitsandbytes dequantize + F.linear"
        return line("nf4 linear", rows, seconds, library, time_call(lambda: reference.linear_forward(x, next(weights))))

    def rounded(exact: dict[str, Any]) -> dict[str, Any]:
        x = torch.randn(exact["rows"], in_features)
        seconds = time_call(lambda: kernels.linear_run(x, next(next_int8_run))) / RUN
        return line("nf4 linear, int8 inputs", len(x), seconds, "the same, exact", exact["seconds"])

    dy = torch.randn(128, out_features)
    seconds = time_call(lambda: kernels.linear_backward(dy, next(weights)))
    library = "bitsandbytes dequantize + matmul"
    library_seconds = time_call(lambda: reference.linear_backward(dy, next(weights)))
    backward = line("nf4 linear backward", 128, seconds, library, library_seconds)
    exact = [forward(rows) for rows in (1, 4, 8, 16, 128, 512)]
    return [*exact, backward, *map(rounded, exact)]


def head_lines(kernels: native.Kernels) -> list[dict[str, Any]]:
    heads = [_random_head() for _ in range(4)]
    next_head, sketch, wide = cycle(heads), heads[0].sketch, heads[0].dequantize(torch.float32)
    assert sketch is not None
    ways: list[tuple[str, Callable[[Tensor], Tensor], str, Callable[[Tensor], Tensor], int]] = [
        (
            *("bf16 head", lambda x: kernels.linear_forward(x, next(next_head))),
            *("F.linear on an fp32 copy", lambda x: F.linear(x, wide), heads[0].data.nbytes),
        ),
        (
            *("bf16 head, greedy tokens by its sketch", lambda x: kernels.output_argmax(x, next(next_head))),
            *("F.linear on an fp32 copy, argmax", lambda x: F.linear(x, wide).argmax(-1), sketch.data.nbytes),
        ),
    ]
    return [_head_line(rows, *way) for way in ways for rows in (1, 8, 16)]


def _random_head() -> QuantizedWeight:
    return QuantizedWeight("dense", torch.randn(VOCAB, HIDDEN).bfloat16(), (VOCAB, HIDDEN)).with_sketch()


def _head_line(
    rows: int, name: str, ours: Callable[[Tensor], Tensor], library: str, theirs: Callable[[Tensor], Tensor], size: int
) -> dict[str, Any]:
    x = torch.randn(rows, HIDDEN)
    return {
        "kernel": name,
        "shape": f"{VOCAB}x{HIDDEN}",
        "rows": rows,
        "seconds": time_call(lambda: ours(x)),
        "library": library,
        "library_seconds": time_call(lambda: theirs(x)),
        "bytes": size,
        "flops": 2 * rows * VOCAB * HIDDEN,
    }


def lora_lines(kernels: native.Kernels) -> list[dict[str, Any]]:
    dtypes = ((reference.FP32, "fp32"), (reference.BF16, "bf16"))
    return [_lora_line(kernels, *case, *dtype) for dtype in dtypes for case in ((1, 1), (8, 1), (8, 64))]


def _lora_line(kernels: native.Kernels, adapters: int, tokens: int, dtype: int, name: str) -> dict[str, Any]:
    out_features, in_features = SHAPES[1]
    rank = 16
    units = rank * (2 if dtype == reference.FP32 else 1)
    size = adapters * units * (out_features + in_features) * 2
    pools = cycle(_pools(MEMORY // size + 1, adapters * units, in_features, out_features))
    rows = [(i * tokens, (i + 1) * tokens, i * units, rank, dtype) for i in range(adapters)]
    table, scale = torch.tensor(rows, dtype=torch.int32), torch.ones(adapters)
    x, y = torch.randn(adapters * tokens, in_features), torch.randn(adapters * tokens, out_features)
    return {
        "kernel": f"grouped LoRA, {adapters} {name} adapters of rank {rank}",
        "shape": f"{out_features}x{in_features}",
        "rows": adapters * tokens,
        "seconds": time_call(lambda: kernels.lora_add_(y, x, *next(pools), table, scale)),
        "library": "F.linear twice for each",
        "library_seconds": time_call(lambda: reference.lora_add_(y, x, *next(pools), table, scale)),
        "bytes": size,
        "flops": 2 * adapters * tokens * rank * (out_features + in_features),
    }


def _pools(count: int, units: int, in_features: int, out_features: int) -> list[tuple[Tensor, Tensor]]:
    def pool(width: int) -> Tensor:
        return torch.randint(0x3C00, 0x3F80, (units, width), dtype=torch.int16)  # finite in every dtype

    return [(pool(in_features), pool(out_features)) for _ in range(count)]


_ATTENTION = [(1, 1, 512), (8, 1, 512), (1, 256, 512), (1, 1, 2048), (8, 1, 2048), (1, 256, 4096)]


def attention_lines(kernels: native.Kernels) -> list[dict[str, Any]]:
    return [_attention_line(kernels, *case) for case in _ATTENTION]


def _attention_line(kernels: native.Kernels, requests: int, queries: int, length: int) -> dict[str, Any]:
    heads, kv_heads, dim, block = 9, 3, 64, 16
    per_request = length // block
    tables = torch.randperm(requests * per_request).int().view(requests, per_request)
    shape = (requests * per_request, kv_heads, block, dim)
    caches = cycle([(torch.randn(shape), torch.randn(shape)) for _ in range(8)])
    seqs = torch.tensor([(i * queries, (i + 1) * queries, length) for i in range(requests)], dtype=torch.int32)
    q = torch.randn(requests * queries, heads, dim)

    def library() -> Tensor:
        return _sdpa(q, *next(caches), tables, queries)

    def ours() -> Tensor:
        k_cache, v_cache = next(caches)
        return kernels.paged_attention(q, k_cache, v_cache, seqs, tables, dim**-0.5)

    return {
        "kernel": "paged attention",
        "shape": f"{requests} x {queries} queries, {length} keys",
        "rows": requests * queries,
        "seconds": time_call(ours),
        "library": "gather + scaled_dot_product_attention",
        "library_seconds": time_call(library),
        "bytes": 2 * requests * length * kv_heads * dim * 4,
        "flops": 4 * requests * queries * length * heads * dim,
    }


def _sdpa(q: Tensor, k_cache: Tensor, v_cache: Tensor, tables: Tensor, queries: int) -> Tensor:
    k, v = (cache[tables].transpose(1, 2).flatten(2, 3) for cache in (k_cache, v_cache))  # [R, Hkv, keys, D]
    length = k.shape[2]
    mask = torch.arange(length) <= torch.arange(length - queries, length)[:, None]
    return F.scaled_dot_product_attention(
        q.unflatten(0, (-1, queries)).transpose(1, 2), k, v, attn_mask=mask, enable_gqa=True
    )


@torch.no_grad()
def measure(parts: Sequence[Callable[[native.Kernels], list[dict[str, Any]]]]) -> dict[str, Any]:
    """Measure these parts and the roofline. Raises RuntimeError without the native kernels."""
    kernels = native.load()
    if kernels is None:
        raise RuntimeError("the C++ kernels are not available here")
    threads = torch.get_num_threads()
    kernels.set_threads(threads)
    roof = Roofline(kernels)
    lines = [line for part in parts for line in part(kernels)]
    roof.measure_once()
    for line in lines:
        line["bandwidth_share"] = line.pop("bytes") / line["seconds"] / roof.read_gb_s / 1e9
        line["flops_share"] = line.pop("flops") / line["seconds"] / roof.fp32_gflop_s / 1e9
    return {
        "roofline": {
            "read_gb_s": roof.read_gb_s,
            "fp32_gflop_s": roof.fp32_gflop_s,
            "threads": threads,
            "instruction_set": kernels.instruction_set,
        },
        "lines": lines,
    }


if __name__ == "__main__":
    everything = (linear_lines, head_lines, lora_lines, attention_lines)  # about half a minute
    print(json.dumps(measure(() if "--roofline" in sys.argv[1:] else everything)))
