"""The Triton kernels compile to PTX for real GPUs, which the interpreter says nothing about; no GPU is needed for it.

In a process of its own: this one may have been told to interpret.
"""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

# Types of a kernel's arguments, by name; bf16 activations, as they are on a GPU.
POINTERS = {
    "linear": {
        "data": "u8",
        "absmax": "u8",
        "nested_absmax": "fp32",
        "nested_code": "fp32",
        "partial": "fp32",
        "arrived": "i32",
    },
    "lora": {"a": "i16", "b": "i16", "table": "i32", "scale": "fp32", "down": "fp32"},
    "attention": {
        "seqs": "i32",
        "block_tables": "i32",
        "slots": "i64",
        "part": "fp32",
        "part_top": "fp32",
        "part_sum": "fp32",
    },
    "elementwise": {},
}
ACTIVATIONS = {"x", "y", "q", "k", "v", "out", "code", "bias", "k_cache", "v_cache", "delta", "weight", "gate", "up"}
ACTIVATIONS |= {"cos", "sin"}
FLOATS = {"offset", "scaling", "eps"}

_linear = {"BLOCKSIZE": 64, "NESTED": 256, "BIAS": True, "DOT": "bf16", "BLOCK_N": 32, "UNROLL": 2}
_lora = {"SEGMENTS": 32, "BLOCK_R": 16, "SPLITS": 8, "PRECISION": "tf32"}
_attention = {"DIM": 128, "PADDED": 128, "REQUESTS": 32}
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("linear", "_linear", _linear | {"BLOCK_M": 16, "SPLITS": 4}),
    ("linear", "_linear", _linear | {"BLOCK_M": 64, "SPLITS": 1, "rows": 1}),
    ("lora", "_shrink", _lora | {"BLOCK_T": 1, "BLOCK_K": 128}),
    ("lora", "_shrink", _lora | {"BLOCK_T": 32, "BLOCK_K": 128}),
    ("lora", "_expand", _lora | {"BLOCK_T": 1, "BLOCK_N": 64, "tokens": 1, "segments": 1, "SEGMENTS": 1}),
    ("lora", "_expand", _lora | {"BLOCK_T": 32, "BLOCK_N": 64}),
    ("attention", "_attend", _attention | {"GROUP": 4, "BLOCK_M": 16, "KEYS": 64, "SPLITS": 16, "DOT": "bf16"}),
    ("attention", "_attend", _attention | {"GROUP": 4, "BLOCK_M": 64, "KEYS": 64, "SPLITS": 2, "DOT": "bf16"}),
    ("attention", "_combine", _attention | {"SPLITS": 16}),
    ("attention", "_write", {"DIM": 128, "PADDED": 128}),
    ("elementwise", "_rms_norm", {"RESIDUAL": True, "BLOCK": 4096}),
    ("elementwise", "_silu_mul", {"BLOCK": 1024}),
    ("elementwise", "_rope", {"HEADS": 32, "HALF": 64}),
]
PROGRAM = """
import importlib, json, sys
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
for module, name, types, constants in json.load(sys.stdin):
    kernel = getattr(importlib.import_module(f"adapters.kernels.triton.{module}"), name)
    values = {(kernel.arg_names.index(k),): tl.bfloat16 if v == "bf16" else v for k, v in constants.items()}
    signature = {k: "constexpr" if k in constants else types.get(k, "i32") for k in kernel.arg_names}
    compiled = triton.compile(ASTSource(kernel, signature, constexprs=values), target=GPUTarget("cuda", 90, 32))
    print(name, compiled.metadata.shared)
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_kernel_compiles_for_hopper() -> None:
    pytest.importorskip("triton")
    cases = []
    for module, name, constants in CASES:
        types = {key: f"*{kind}" for key, kind in POINTERS[module].items()}
        types |= dict.fromkeys(ACTIVATIONS, "*bf16") | dict.fromkeys(FLOATS, "fp32")
        cases.append((module, name, types, constants))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        input=json.dumps(cases),
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "0"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    shared = [int(line.split()[1]) for line in done.stdout.splitlines()]
    assert len(shared) == len(CASES)
    assert max(shared) <= 227 << 10, "more shared memory than a program may have"
