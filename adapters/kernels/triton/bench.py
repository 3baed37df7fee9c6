"""Accuracy and speed of the Triton kernels: `python -m adapters.kernels.triton.bench` prints one JSON object.

`errors`: (kernel, case, error, limit), relative to float64 as in the tests, on shapes too large for the interpreter.
`lines`: 4-bit linears of Llama-3.1-8B and Qwen3-8B, and bitsandbytes' own on the same weights, both replayed from CUDA
graphs that rotate through more weights than the L2 cache holds. `experts`: Qwen3-30B-A3B's gate and up in one launch,
and expert by expert. `states`: one token of each of several sequences through Qwen3.5's linear attention. `fused`: the
adapters of Llama-3.1-8B's q, k and v in one pair of launches, and one after the other. `copy_gb_s`: bytes read and
written per second by a copy; `host_to_device_gb_s`: bytes copied from pinned memory (`--bandwidths`: only these two).
`--smoke` runs everything on a CPU, under `LORAKEET_TRITON=interpret`, with meaningless times.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor

from adapters.kernels import BF16, FP32, ExpertWeights, Recurrence, recurrence, reference
from adapters.kernels.triton import load
from adapters.kernels.weight import QuantizedWeight

LLAMA, QWEN = "Llama-3.1-8B", "Qwen3-8B"
LIMIT = 1e-2  # relative error of bf16 results


@dataclass(frozen=True)
class Size:
    """The sizes of all measurements."""

    device: str
    shapes: dict[tuple[int, int], tuple[str, ...]]  # (outs, ins) of a linear -> models with it
    rows: tuple[int, ...]
    memory: int  # bytes of weights read by a graph
    repeats: int
    copied: int  # bytes
    segments: int  # of a LoRA table
    experts: tuple[int, int, int, int]  # experts, experts per token, outs, ins
    state: tuple[int, int, int, int]  # key heads, heads, keys, values
    limit: float


FULL = Size(
    device="cuda",
    shapes={
        (4096, 4096): (LLAMA, QWEN),  # q and o
        (1024, 4096): (LLAMA, QWEN),  # k and v
        (14336, 4096): (LLAMA,),  # gate and up
        (4096, 14336): (LLAMA,),  # down
        (12288, 4096): (QWEN,),
        (4096, 12288): (QWEN,),
    },
    rows=(1, 2, 4, 8, 16, 24, 32, 48, 64, 128, 1024),
    memory=512 << 20,
    repeats=20,
    copied=1 << 30,
    segments=32,
    experts=(128, 8, 1536, 2048),
    state=(16, 32, 128, 128),
    limit=LIMIT,
)
# The interpreter truncates bf16, which doubles the error.
SMOKE = Size("cpu", {(32, 128): (LLAMA, QWEN)}, (1, 8), 1, 1, 1 << 20, 2, (4, 2, 32, 128), (1, 2, 16, 16), 2 * LIMIT)


def time_replay(size: Size, calls: Sequence[Callable[[], Any]]) -> float:
    """Return the seconds per call, from a graph of all calls; the median of several replays."""
    if size.device == "cpu":
        began = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - began) / len(calls)
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
    graph.replay()
    times = []
    for _ in range(size.repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / len(calls))
    return sorted(times)[size.repeats // 2]


def bandwidths(size: Size) -> dict[str, float]:
    """Return GB per second, within the device and from the host."""
    source = torch.empty(size.copied, dtype=torch.uint8)
    target = torch.empty_like(source)
    pinned = torch.empty(size.copied // 4, dtype=torch.uint8, device="cpu", pin_memory=size.device == "cuda")
    arriving = target[: size.copied // 4]
    within = time_replay(size, [lambda: target.copy_(source)] * 4)
    onto = time_replay(size, [lambda: arriving.copy_(pinned, non_blocking=True)] * 4)
    return {"copy_gb_s": 2 * source.nbytes / within / 1e9, "host_to_device_gb_s": pinned.nbytes / onto / 1e9}


def make_linears(size: Size, outs: int, ins: int, memory: int) -> list[Linear4bit]:
    """Return enough linears that none is still in a cache when it is used again."""
    made = []
    for _ in range(max(1, memory // (outs * ins // 2))):
        linear = Linear4bit(ins, outs, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", device="meta")
        dense = torch.randn(outs, ins, dtype=torch.bfloat16) * ins**-0.5
        linear.weight = Params4bit(dense, requires_grad=False, quant_type="nf4", module=linear)
        made.append(linear.to(size.device))
    return made


def linear_lines(size: Size, outs: int, ins: int) -> list[dict[str, Any]]:
    """Return one line per row count: our seconds, bitsandbytes', and the bytes to read."""
    kernels = load()
    assert kernels is not None
    linears = make_linears(size, outs, ins, size.memory)
    weights = [QuantizedWeight.from_linear(linear) for linear in linears]
    lines = []
    for rows in size.rows:
        x = torch.randn(rows, ins, dtype=torch.bfloat16)
        ours = time_replay(size, [partial(kernels.linear_forward, x, weight) for weight in weights])
        theirs = time_replay(size, [partial(linear, x) for linear in linears])
        moved = outs * ins // 2 + outs * ins // 64 + 2 * rows * (outs + ins)
        line = {"outs": outs, "ins": ins, "rows": rows, "seconds": ours, "library_seconds": theirs, "bytes": moved}
        lines.append(line | {"models": size.shapes[outs, ins]})
    return lines


def relative(actual: Tensor, exact: Tensor) -> float:
    """Return the Frobenius norm of the difference over that of the exact result."""
    return float((actual.double() - exact.double()).norm() / exact.double().norm())


def linear_errors(size: Size) -> Iterator[tuple[str, float]]:
    """Yield errors of bf16 products against float64, below and above the few-row kernel's limit."""
    kernels = load()
    assert kernels is not None
    for outs, ins in size.shapes:
        weight = QuantizedWeight.from_linear(make_linears(size, outs, ins, memory=1)[0])
        dense = weight.dequantize(torch.float32).double()
        for rows in (1, 7, 64, 65):
            x = torch.randn(rows, ins, dtype=torch.bfloat16)
            yield f"{outs} x {ins}, {rows} rows", relative(kernels.linear_forward(x, weight), x.double() @ dense.T)


def lora_errors(size: Size) -> Iterator[tuple[str, float]]:
    """Yield errors of segments with mixed ranks and dtypes, against `reference` in fp32."""
    kernels = load()
    assert kernels is not None
    ins, outs = max(size.shapes, key=max)[::-1]
    count = size.segments
    for length in (1, 16):
        tokens, units = count * length, count * 128
        a, b = (torch.randn(units // 2, width).view(torch.int16).view(units, width) for width in (ins, outs))
        rows = [(i * length, (i + 1) * length, i * 128, (8, 16, 64)[i % 3], (FP32, BF16)[i % 2]) for i in range(count)]
        # Random fp32 bytes are not usable bf16 numbers: the bf16 rows get their own.
        for _, _, first, rank, dtype in rows:
            if dtype == BF16:
                for pool in (a, b):
                    pool[first : first + rank] = torch.randn(rank, pool.shape[1]).bfloat16().view(torch.int16)
        table = torch.tensor(rows, dtype=torch.int32)
        scale = torch.full((count,), 0.01)
        x, y = torch.randn(tokens, ins, dtype=torch.bfloat16), torch.zeros(tokens, outs, dtype=torch.bfloat16)
        exact = y.float()
        reference.lora_add_(exact, x.float(), a, b, table, scale)
        kernels.lora_add_(y, x, a, b, table, scale)
        yield f"{tokens} tokens, {count} segments", relative(y, exact)


def fused_lines(size: Size) -> list[dict[str, Any]]:
    """Return lines for rank-16 adapters of q, k and v, a token each: seconds in two launches, and two per linear."""
    kernels = load()
    assert kernels is not None
    widths = (4096, 1024, 1024) if size is FULL else (32, 16, 16)
    lines = []
    for tokens in (1, 8, 32, 64) if size is FULL else (1, 2):
        layers = max(1, size.memory // (tokens * 32 * (3 * widths[0] + sum(widths))))
        a = [[torch.zeros(tokens * 16, widths[0], dtype=torch.int16) for _ in widths] for _ in range(layers)]
        b = [[torch.zeros(tokens * 16, width, dtype=torch.int16) for width in widths] for _ in range(layers)]
        rows = [(token, token + 1, token * 16, 16, BF16) for token in range(tokens)]
        table, scale = torch.tensor([rows] * 3, dtype=torch.int32), torch.ones(3, tokens)
        x = torch.randn(tokens, widths[0], dtype=torch.bfloat16)
        ys = [torch.zeros(tokens, width, dtype=torch.bfloat16) for width in widths]
        together = [partial(kernels.lora_add_several_, ys, x, *pools, table, scale) for pools in zip(a, b, strict=True)]
        apart = [
            partial(kernels.lora_add_, y, x, *rest)
            for pools in zip(a, b, strict=True)
            for y, *rest in zip(ys, *pools, table, scale, strict=True)
        ]
        seconds = {"seconds": time_replay(size, together), "apart_seconds": len(widths) * time_replay(size, apart)}
        lines.append({"adapters": tokens, **seconds})
    return lines


def routed(size: Size, tokens: int) -> tuple[Tensor, Tensor]:
    """Return inputs of randomly routed tokens, sorted by expert, and each expert's number of rows."""
    experts, chosen, _, ins = size.experts
    picked = torch.rand(tokens, experts).argsort(1)[:, :chosen].flatten()
    return torch.randn(tokens * chosen, ins, dtype=torch.bfloat16), torch.bincount(picked, minlength=experts)


def make_experts(size: Size) -> ExpertWeights:
    """Return random experts."""
    experts, _, outs, ins = size.experts
    dense = (torch.randn(outs, ins, dtype=torch.bfloat16) * ins**-0.5 for _ in range(experts))
    return ExpertWeights.quantize(dense, "nf4", torch.bfloat16)


def expert_errors(size: Size) -> Iterator[tuple[str, float]]:
    """Yield errors with few and many rows per expert, against float64."""
    kernels, weights = load(), make_experts(size)
    assert kernels is not None
    for tokens in (1, 40, 600) if size is FULL else (3,):
        x, counts = routed(size, tokens)
        exact = reference.map_experts(
            x.double(), weights, counts, lambda rows, each: rows @ each.dequantize().double().T
        )
        yield f"{tokens} tokens", relative(kernels.grouped_forward(x, weights, counts), exact)


def expert_lines(size: Size) -> list[dict[str, Any]]:
    """Return lines with the seconds of tokens' experts in one launch and expert by expert, and the bytes to read."""
    kernels, lines = load(), []
    assert kernels is not None
    experts, _, outs, ins = size.experts
    each = outs * ins // 2 + outs * ins // 64
    layers = [make_experts(size) for _ in range(max(1, size.memory // (each * experts)))]
    for tokens in (1, 8, 64, 512) if size is FULL else (2,):
        x, counts = routed(size, tokens)
        parts = [(rows, expert) for expert, rows in enumerate(x.split(counts.tolist())) if len(rows)]
        singles = [[(rows, weights[expert]) for rows, expert in parts] for weights in layers]
        together = time_replay(size, [partial(kernels.grouped_forward, x, weights, counts) for weights in layers])
        apart = [partial(kernels.linear_forward, rows, weight) for layer in singles for rows, weight in layer]
        seconds = {"seconds": together, "apart_seconds": len(parts) * time_replay(size, apart)}
        lines.append({"tokens": tokens, "bytes": len(parts) * each + 2 * len(x) * (outs + ins), **seconds})
    return lines


def states_of(size: Size, sequences: int, tokens: int) -> tuple[Recurrence, Tensor, Tensor]:
    """Return a recurrence of `tokens` tokens of each sequence, with states and runs."""
    key_heads, heads, keys, values = size.state

    def numbers(*shape: int) -> Tensor:
        return torch.randn(sequences * tokens, *shape, dtype=torch.bfloat16)

    projected = (
        numbers(key_heads, keys),
        numbers(key_heads, keys),
        numbers(heads, values),
        numbers(heads),
        numbers(heads),
    )
    runs = [(i * tokens, (i + 1) * tokens, i, i) for i in range(sequences)]
    states = torch.randn(sequences, heads, keys, values)
    return Recurrence(*projected, torch.randn(heads), torch.randn(heads)), states, torch.tensor(runs, dtype=torch.int32)


def state_errors(size: Size) -> Iterator[tuple[str, float]]:
    """Yield errors of convolutions and the gated delta rule, against plain torch."""
    kernels = load()
    assert kernels is not None
    for sequences, tokens in ((8, 1), (2, 20 if size is FULL else 3)):
        r, states, runs = states_of(size, sequences, tokens)
        case, exact = f"{sequences} times {tokens} tokens", recurrence.recur_torch(r, states.clone(), runs)
        yield f"{case}, delta rule", relative(kernels.recur(r, states, runs), exact)
        x, kept = r.q.flatten(1), torch.randn(sequences, 3, r.q[0].numel())
        taps = torch.randn(4, x.shape[1], dtype=torch.bfloat16)
        exact = recurrence.convolve_torch(x.double(), taps.double(), None, True, kept.clone(), runs)
        yield f"{case}, convolution", relative(kernels.convolve(x, taps, None, True, kept, runs), exact)


def state_lines(size: Size) -> list[dict[str, Any]]:
    """Return lines with the seconds of one token of each sequence, and the bytes of states read and written."""
    kernels, lines = load(), []
    assert kernels is not None
    for sequences in (1, 16, 64) if size is FULL else (2,):
        made = states_of(size, sequences, 1)
        layers = [(made[0], made[1].clone(), made[2]) for _ in range(max(1, size.memory // made[1].nbytes))]
        seconds = time_replay(size, [partial(kernels.recur, *layer) for layer in layers])
        lines.append({"sequences": sequences, "seconds": seconds, "bytes": 2 * made[1].nbytes})
    return lines


def attention_errors(size: Size) -> Iterator[tuple[str, float]]:
    """Yield errors of decoding and prompt chunks of both models' heads over 4096 keys, against `reference` in fp32."""
    kernels = load()
    assert kernels is not None
    full = size is FULL
    requests, blocks, heads = (8, 256, 32) if full else (2, 4, 4)
    k_cache, v_cache = (torch.randn(requests * blocks, heads // 4, 16, 128, dtype=torch.bfloat16) for _ in range(2))
    tables = torch.randperm(requests * blocks).view(requests, blocks).int()
    sinks = torch.randn(heads)
    for queries, window, softcap in (
        *((1, 0, 0.0), (1, blocks * 4, 0.0), (blocks // 2, 0, 0.0), (blocks // 2, blocks * 4, 0.0)),
        *((1, 0, 30.0), (blocks // 2, blocks * 4, 30.0)),
    ):
        lengths = [(i * queries, (i + 1) * queries, 16 * blocks - i * blocks) for i in range(requests)]
        seqs = torch.tensor(lengths, dtype=torch.int32)
        q = torch.randn(requests * queries, heads, 128, dtype=torch.bfloat16)
        arguments = (seqs, tables, 128**-0.5, window, softcap, sinks if softcap else None)
        exact = reference.paged_attention(q.float(), k_cache.float(), v_cache.float(), *arguments)
        yield (
            f"{queries} queries, window {window}" + (", softcap and sinks" if softcap else ""),
            relative(kernels.paged_attention(q, k_cache, v_cache, *arguments), exact),
        )
        if softcap:
            continue
        for kept in (torch.float8_e4m3fn, torch.int8):
            k_kept, v_kept = (reference.cache_rows(cache, kept) for cache in (k_cache, v_cache))
            exact = reference.paged_attention(q.float(), k_kept, v_kept, *arguments)
            yield (
                f"{queries} queries, window {window}, {kept}",
                relative(kernels.paged_attention(q, k_kept, v_kept, *arguments), exact),
            )


@torch.no_grad()
def main(arguments: list[str]) -> None:
    """Measure and print the results."""
    size = SMOKE if "--smoke" in arguments else FULL
    torch.manual_seed(0)
    torch.set_default_device(size.device)
    torch.backends.cuda.matmul.allow_tf32 = False
    found: dict[str, Any] = bandwidths(size)
    if "--bandwidths" not in arguments:
        checks: tuple[tuple[str, Callable[[Size], Iterator[tuple[str, float]]]], ...] = (
            *(("linear", linear_errors), ("experts", expert_errors), ("states", state_errors)),
            *(("lora", lora_errors), ("attention", attention_errors)),
        )
        found["errors"] = [
            {"kernel": kernel, "case": case, "error": error, "limit": size.limit}
            for kernel, check in checks
            for case, error in check(size)
        ]
        found |= {"experts": expert_lines(size), "states": state_lines(size)}
        found["fused"] = fused_lines(size)
        found["lines"] = [line for outs, ins in size.shapes for line in linear_lines(size, outs, ins)]
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
