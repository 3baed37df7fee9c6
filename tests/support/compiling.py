"""Compiles every kernel for an H100, as launched by its wrappers, without a GPU, and prints its resource usage.

This is a separate program because Triton must not interpret. The tensors' device is simulated; NVIDIA's assembler
produces machine code, so that type errors, unknown intrinsics and excessive shared memory are detected.
"""

import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from adapters.kernels.experts import ExpertWeights
from adapters.kernels.recurrence import Recurrence
from adapters.kernels.triton import fix_tiles
from adapters.kernels.triton import functions as kernels
from adapters.kernels.weight import QuantizedWeight, WeightKind

BF16 = torch.bfloat16


class Pretended:
    """The driver functions that Triton calls before a launch."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def launches() -> None:
    """Launch every wrapper with shapes of Llama-3.1-8B (one token, a batch, a prompt) and of families that differ."""
    int32 = torch.int32
    for rows in (1, 16, 64):
        kernels.linear_forward(torch.zeros(rows, 4096, dtype=BF16), weight(1024, 4096))
    fix_tiles(True)
    kinds: dict[torch.dtype, WeightKind] = {BF16: "fp4", torch.float16: "nf4", torch.float32: "nf4"}
    for dtype, kind in kinds.items():
        x, bias = torch.zeros(3, 4096, dtype=dtype), torch.zeros(1024, dtype=dtype)
        kernels.linear_forward(x, weight(1024, 4096, kind, nested=dtype == BF16), bias)
    fix_tiles(False)
    for dtype, tokens, segments in ((BF16, 1, 1), (BF16, 64, 64), (BF16, 2048, 40), (torch.float32, 2048, 40)):
        a, b = (torch.zeros(600, width, dtype=torch.int16) for width in (4096, 1024))
        table, scale = torch.zeros(segments, 5, dtype=int32), torch.zeros(segments)
        x, y = torch.zeros(tokens, 4096, dtype=dtype), torch.zeros(tokens, 1024, dtype=dtype)
        kernels.lora_add_(y, x, a, b, table, scale)
        kernels.lora_add_several_([y] * 3, x, [a] * 3, [b] * 3, table.expand(3, -1, -1), scale.expand(3, -1))
    for dim, heads in ((64, 32), (80, 20), (128, 32), (256, 8)):
        for tokens, requests in ((1, 1), (64, 64), (2048, 4)) if dim == 128 else ((64, 64), (2048, 4)):
            q, k = torch.zeros(tokens, heads, dim, dtype=BF16), torch.zeros(tokens, heads // 4, dim, dtype=BF16)
            cache = torch.zeros(10, heads // 4, 16, dim, dtype=BF16)
            seqs, blocks = torch.zeros(requests, 3, dtype=int32), torch.zeros(requests, 512, dtype=int32)
            kernels.paged_attention(q, cache, cache, seqs, blocks, 0.1, 0)
            if dim == 128:
                for kept in (torch.float8_e4m3fn, torch.int8):
                    held = torch.zeros(*cache.shape[:3], dim + 4 * (kept == torch.int8), dtype=torch.int8).view(kept)
                    kernels.paged_attention(q, held, held, seqs, blocks, 0.1, 0)
                    kernels.write_kv(k, k, held, held, torch.zeros(tokens, dtype=torch.int64))
            if dim == 64:
                kernels.paged_attention(q, cache, cache, seqs, blocks, 0.1, 0, 50.0, torch.zeros(heads))
        kernels.write_kv(k, k, cache, cache, torch.zeros(tokens, dtype=torch.int64))
        angles = torch.zeros(tokens, dim, dtype=BF16)
        kernels.rope_(q, k, angles, angles)
        kernels.rms_norm(q, torch.zeros(dim, dtype=BF16), 1e-6)
    for dtype, rows in ((BF16, 8), (BF16, 4096), (torch.float32, 8)):  # Qwen3-30B-A3B's
        counts = torch.zeros(128, dtype=torch.int64)
        kernels.grouped_forward(torch.zeros(rows, 2048, dtype=dtype), experts(1536, 2048), counts)
        kernels.grouped_forward(torch.zeros(rows, 768, dtype=dtype), experts(2048, 768, nested=False), counts)
    runs = torch.zeros(4, 4, dtype=int32)
    for dtype in (BF16, torch.float32):  # Qwen3.5's gated DeltaNet, Granite 4's Mamba-2
        for channels, heads, shape, delta in ((8192, 16, (32, 128, 128), True), (3328, 1, (48, 256, 64), False)):
            x, taps = torch.zeros(7, channels, dtype=dtype), torch.zeros(4, channels, dtype=dtype)
            kernels.convolve(x, taps, None if delta else taps[0], True, torch.zeros(9, 3, channels), runs)
            q, v = torch.zeros(7, heads, shape[1], dtype=dtype), torch.zeros(7, shape[0], shape[2], dtype=dtype)
            a, rates = torch.zeros(7, shape[0], dtype=dtype), torch.zeros(shape[0])
            recurrence = Recurrence(q, q, v, a, a if delta else None, rates, rates)
            kernels.recur(recurrence, torch.zeros(9, *shape), runs)
    hidden = torch.zeros(3, 4096, dtype=BF16)
    kernels.add_rms_norm_(hidden, hidden.clone(), torch.zeros(4096, dtype=BF16), 1e-5)
    kernels.silu_mul(hidden, hidden)


def weight(outs: int, ins: int, kind: WeightKind = "nf4", *, nested: bool = True) -> QuantizedWeight:
    """Zeros in bitsandbytes' layout."""
    blocks = outs * ins // 64
    absmax: dict[str, Any] = {"absmax": torch.zeros(blocks), "code": torch.zeros(16), "blocksize": 64}
    if nested:
        absmax |= {"absmax": torch.zeros(blocks, dtype=torch.uint8), "nested_absmax": torch.zeros(blocks // 256)}
        absmax |= {"nested_code": torch.zeros(256), "nested_blocksize": 256, "offset": 0.1}
    return QuantizedWeight(kind, torch.zeros(outs * ins // 2, 1, dtype=torch.uint8), (outs, ins), **absmax)


def experts(outs: int, ins: int, *, nested: bool = True) -> ExpertWeights:
    """128 such weights."""
    single, parts = weight(outs, ins, nested=nested), {}
    for name in ("data", "absmax", *(["nested_absmax"] if nested else [])):
        part = getattr(single, name)
        parts[name] = part.expand(128, *part.shape).contiguous()
    offset = torch.zeros(128) if nested else None
    more = {name: getattr(single, name) for name in ("code", "nested_code", "blocksize", "nested_blocksize")}
    return ExpertWeights("nf4", (outs, ins), offset=offset, **parts, **more)


def usage(kernel: Any) -> dict[str, Any]:
    """Resources of a multiprocessor used by a compiled kernel, as reported by NVIDIA's tool."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    [line] = [line for line in done.stdout.splitlines() if "REG:" in line]
    pairs = dict(pair.split(":") for pair in line.split() if pair.count(":") == 1)
    return {"registers": int(pairs["REG"]), "stack": int(pairs["STACK"]), "shared": kernel.metadata.shared}


def main() -> None:
    """Compile and print one JSON line for each kernel."""
    compiled: dict[int, tuple[str, Any]] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        compiled[id(kernel)] = (self.__name__, kernel)
        return kernel

    driver.set_active(Pretended())
    JITFunction.run = compile_only
    launches()
    for name, kernel in compiled.values():
        print(json.dumps({"kernel": name, **usage(kernel)}))


if __name__ == "__main__":
    main()
