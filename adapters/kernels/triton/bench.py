"""The Triton kernels on this GPU, right and fast: `python -m adapters.kernels.triton.bench` prints one JSON object.

`errors`: (kernel, case, error, limit), relative to float64 as in the tests, on shapes that the interpreter is too slow
for. `lines`: 4-bit linears of Llama-3.1-8B and bitsandbytes' own on the same weights, both replayed from CUDA graphs
that rotate through more weights than the L2 cache holds. `copy_gb_s`: bytes read and written per second by a copy.
"""

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor

from adapters.kernels import BF16, FP32, reference
from adapters.kernels.triton import load
from adapters.kernels.weight import QuantizedWeight

SHAPES = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)]  # q and o, k and v, gate and up, down
ROWS = [1, 2, 4, 8, 16, 24, 32, 48, 64]
MEMORY = 512 << 20  # bytes of weights that a graph goes through
REPEATS = 20
LIMIT = 1e-2  # relative error of bf16 results


def replayed(calls: list[Callable[[], Any]]) -> float:
    """Seconds of one call, from a graph of them all; the median of `REPEATS` replays."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    times = []
    for _ in range(REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return sorted(times)[REPEATS // 2]


def copy_bandwidth() -> float:
    """Bytes read and written per second."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / replayed([lambda: target.copy_(source)] * 4)


def make_linears(outs: int, ins: int, memory: int = MEMORY) -> list[Linear4bit]:
    """Enough of them that none is still in a cache when its turn comes again."""
    made = []
    for _ in range(max(1, memory // (outs * ins // 2))):
        linear = Linear4bit(ins, outs, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta")
        dense = torch.randn(outs, ins, dtype=torch.bfloat16) * ins**-0.5
        linear.weight = Params4bit(dense, requires_grad=False, quant_type="nf4", module=linear)
        made.append(linear.to("cuda"))
    return made


def linear_lines(outs: int, ins: int) -> list[dict[str, Any]]:
    """One line for each row count: our seconds, bitsandbytes', and the bytes that have to be read."""
    kernels = load()
    assert kernels is not None
    linears = make_linears(outs, ins)
    weights = [QuantizedWeight.from_linear(linear) for linear in linears]
    lines = []
    for rows in ROWS:
        x = torch.randn(rows, ins, dtype=torch.bfloat16)
        ours = replayed([partial(kernels.linear_forward, x, weight) for weight in weights])
        theirs = replayed([partial(linear, x) for linear in linears])
        moved = outs * ins // 2 + outs * ins // 64 + 2 * rows * (outs + ins)
        lines.append(
            {"outs": outs, "ins": ins, "rows": rows, "seconds": ours, "library_seconds": theirs, "bytes": moved}
        )
    return lines


def relative(actual: Tensor, exact: Tensor) -> float:
    """Frobenius norm of the difference over that of the exact result."""
    return float((actual.double() - exact.double()).norm() / exact.double().norm())


def linear_errors() -> Iterator[tuple[str, float]]:
    """bf16 products against float64, below and above the few-row kernel's reach."""
    kernels = load()
    assert kernels is not None
    for outs, ins in SHAPES:
        weight = QuantizedWeight.from_linear(make_linears(outs, ins, memory=1)[0])
        dense = weight.dequantize(torch.float32).double()
        for rows in (1, 7, 64, 65):
            x = torch.randn(rows, ins, dtype=torch.bfloat16)
            yield f"{outs} x {ins}, {rows} rows", relative(kernels.linear_forward(x, weight), x.double() @ dense.T)


def lora_errors() -> Iterator[tuple[str, float]]:
    """32 segments of mixed ranks and dtypes, against `reference` in fp32."""
    kernels = load()
    assert kernels is not None
    for tokens in (32, 512):
        length = tokens // 32
        units = 32 * 128
        a, b = (torch.randn(units // 2, width).view(torch.int16).view(units, width) for width in (4096, 14336))
        rows = [(i * length, (i + 1) * length, i * 128, (8, 16, 64)[i % 3], (FP32, BF16)[i % 2]) for i in range(32)]
        # Random fp32 bytes make no bf16 numbers: the bf16 rows get their own.
        for _, _, first, rank, dtype in rows:
            if dtype == BF16:
                for pool in (a, b):
                    pool[first : first + rank] = torch.randn(rank, pool.shape[1]).bfloat16().view(torch.int16)
        table = torch.tensor(rows, dtype=torch.int32)
        scale = torch.full((32,), 0.01)
        x, y = torch.randn(tokens, 4096, dtype=torch.bfloat16), torch.zeros(tokens, 14336, dtype=torch.bfloat16)
        exact = y.float()
        reference.lora_add_(exact, x.float(), a, b, table, scale)
        kernels.lora_add_(y, x, a, b, table, scale)
        yield f"{tokens} tokens, 32 segments", relative(y, exact)


def attention_errors() -> Iterator[tuple[str, float]]:
    """Decoding and a prompt chunk of Llama-3.1-8B's heads over 4096 keys, against `reference` in fp32."""
    kernels = load()
    assert kernels is not None
    blocks = 256
    k_cache, v_cache = (torch.randn(8 * blocks, 8, 16, 128, dtype=torch.bfloat16) for _ in range(2))
    tables = torch.randperm(8 * blocks).view(8, blocks).int()
    for queries, window in ((1, 0), (1, 1000), (100, 0), (100, 1000)):
        seqs = torch.tensor([(i * queries, (i + 1) * queries, 4096 - 500 * i) for i in range(8)], dtype=torch.int32)
        q = torch.randn(8 * queries, 32, 128, dtype=torch.bfloat16)
        arguments = (seqs, tables, 128**-0.5, window)
        exact = reference.paged_attention(q.float(), k_cache.float(), v_cache.float(), *arguments)
        yield (
            f"{queries} queries, window {window}",
            relative(kernels.paged_attention(q, k_cache, v_cache, *arguments), exact),
        )


@torch.no_grad()
def main() -> None:
    """Measure and print."""
    torch.manual_seed(0)
    torch.set_default_device("cuda")
    torch.backends.cuda.matmul.allow_tf32 = False
    checks = (("linear", linear_errors), ("lora", lora_errors), ("attention", attention_errors))
    errors = [
        {"kernel": kernel, "case": case, "error": error, "limit": LIMIT}
        for kernel, check in checks
        for case, error in check()
    ]
    lines = [line for outs, ins in SHAPES for line in linear_lines(outs, ins)]
    print(json.dumps({"copy_gb_s": copy_bandwidth() / 1e9, "errors": errors, "lines": lines}))


if __name__ == "__main__":
    main()
