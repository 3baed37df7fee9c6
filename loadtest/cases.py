"""The comparison's cases, and the sides in each.

Adapters have rank 16 on all linears; prompts have 64 tokens by default.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from loadtest.compare import Case

_LLAMA = ("llama", "llama-q4_0")
_OTHERS = ("vllm", "vllm-bf16", "peft", "peft-bf16")
_ALL = ("lorakeet", "lorakeet-int8", "lorakeet-offline", *_LLAMA, "llama-static", "llama-q4_0-static", *_OTHERS)
_HALF_WIDTH = ("lorakeet", *_LLAMA)
_BASE = ("lorakeet", "lorakeet-bare", *_LLAMA, *_OTHERS, "transformers-serve", "transformers-serve-bf16")
_LONG = ("lorakeet", "lorakeet-kv16", *_LLAMA)
_WHOLE = ("lorakeet", "lorakeet-int8", *_LLAMA, "vllm", "peft-switching")

_CASES = (
    Case("one", "1 request, 1 adapter (fp32 file)", 1, "one", "float32", 65, _ALL),
    Case("eight", "8 requests, 8 adapters (fp32 files)", 8, "distinct", "float32", 65, _ALL),
    # Only these sides keep a half-width file as it is; the others would measure the same twice.
    Case("one-bf16", "1 request, 1 adapter (bf16 file)", 1, "one", "bfloat16", 65, _HALF_WIDTH),
    Case("eight-bf16", "8 requests, 8 adapters (bf16 files)", 8, "distinct", "bfloat16", 65, _HALF_WIDTH),
    Case("base", "8 requests, no adapter", 8, "none", "float32", 65, _BASE),
    Case("whole", "8 whole requests (64 in, 33 out)", 8, "distinct", "float32", 33, _WHOLE),
    # Long enough that the first request still decodes when the last one's prefill ends.
    Case("one-512", "1 request of 512 tokens, 1 adapter", 1, "one", "float32", 33, _LONG, 512),
    Case("eight-512", "8 requests of 512 tokens, 8 adapters", 8, "distinct", "float32", 65, _LONG, 512),
    Case("one-2048", "1 request of 2,048 tokens, 1 adapter", 1, "one", "float32", 33, _LONG, 2048),
    Case("eight-2048", "8 requests of 2,048 tokens, 8 adapters", 8, "distinct", "float32", 161, _LONG, 2048),
    Case("one-6000", "1 request of 6,000 tokens, 1 adapter", 1, "one", "float32", 33, _LONG, 6000),
)
NAMES = [case.name for case in _CASES]


def select(names: Sequence[str], output_tokens: int | None = None) -> list[Case]:
    """Return cases by name, in the order above; `output_tokens` replaces each case's own."""
    chosen = [case for case in _CASES if case.name in names]
    if output_tokens is None:
        return chosen
    return [dataclasses.replace(case, output_tokens=output_tokens) for case in chosen]


def default_sides(machine: dict[str, Any]) -> list[str]:
    """Return the sides for this machine: bf16 ones only if the CPU has instructions for it."""
    sides = dict.fromkeys(side for case in _CASES for side in case.sides)
    fast_bf16 = {"avx512_bf16", "amx_bf16"} & set(machine["vector_extensions"])
    return [side for side in sides if fast_bf16 or not side.endswith("-bf16")]
