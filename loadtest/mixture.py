"""Decoding a mixture of experts: our engine compared with transformers and bitsandbytes, and with the read bandwidth.

One checkpoint of Qwen3-MoE's shape with random weights; the engine without a server. Every side is a process of its own
with the model loaded; rounds go through them in turn. The bound is the time, at this machine's measured read bandwidth,
for reading once the weights of a step: the experts of its tokens, assuming even routing, all other linears, and the
head's int8 screening copy.
"""

import contextlib
import itertools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers

from loadtest import kernels
from loadtest.peers.mixture_worker import LAYOUTS
from loadtest.synthetic import random_prompts
from loadtest.workers import worker

OUR_ENGINE = "server.engine.offline"
PEER = "loadtest.peers.mixture_worker"
SHAPE: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "hidden_size": 512,
    "moe_intermediate_size": 384,
    "intermediate_size": 384,  # of dense layers, not used
    "num_hidden_layers": 8,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 32768,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
NF4 = 1 / 2 + 1 / 64 + 4 / (64 * 256)  # bytes of a weight with its doubly quantised scales
COUNTS = (1, 8)  # requests at once
PROMPT, TOKENS = 32, 17
MIN_SPEEDUP = 3.0
MAX_OF_BOUND = 1.3

Report = Callable[[str], None]


@dataclass
class Side:
    """One row: a configuration and its milliseconds per step, one value a round."""

    name: str
    module: str
    settings: dict[str, Any]
    steps: dict[int, list[float]] = field(default_factory=lambda: {count: [] for count in COUNTS})

    def median(self, count: int) -> float:
        return statistics.median(self.steps[count])


def sides(cache_dir: Path) -> list[Side]:
    """Return our sides, exact and with int8 activations; the peer with each layout of experts, in fp32 and bf16."""
    ours = {"cache_dir": str(cache_dir), "adapters": {}}
    return [
        Side("lorakeet", OUR_ENGINE, ours | {"engine": {"device": "cpu"}}),
        Side("lorakeet, int8 activations", OUR_ENGINE, ours | {"engine": {"device": "cpu", "activations": "int8"}}),
        *(
            Side(f"transformers + bitsandbytes, {what}, {short}", PEER, {"experts": layout, "dtype": dtype})
            for layout, what in LAYOUTS.items()
            for dtype, short in (("float32", "fp32"), ("bfloat16", "bf16"))
        ),
    ]


def active_bytes(shape: dict[str, Any], tokens: int) -> float:
    """Return the bytes that a step of `tokens` requests reads at least."""
    hidden, inner, experts = shape["hidden_size"], shape["moe_intermediate_size"], shape["num_experts"]
    heads, kv_heads, head = shape["num_attention_heads"], shape["num_key_value_heads"], shape["head_dim"]
    attention = hidden * head * (2 * heads + 2 * kv_heads) * NF4
    router = 4 * experts * hidden
    chosen = experts * (1 - (1 - shape["num_experts_per_tok"] / experts) ** tokens)
    layer = attention + router + chosen * 3 * hidden * inner * NF4
    return float(shape["num_hidden_layers"] * layer + hidden * shape["vocab_size"])


def byte_tokenizer() -> Tokenizer:
    """Return a tokenizer with one token per byte: the drift of int8 activations is measured on a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({character: id_ for id_, character in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer


def milliseconds(answers: Sequence[dict[str, Any]]) -> float:
    """Return the median step of one burst, in milliseconds, after all requests have their first token."""
    last = max(answers, key=lambda answer: answer["times"][0])
    return 1e3 * statistics.median(later - earlier for earlier, later in itertools.pairwise(last["times"]))


def run(
    folder: Path, *, threads: int, rounds: int, report: Report, shape: dict[str, Any] = SHAPE, tokens: int = TOKENS
) -> dict[str, Any]:
    """Make the model in `folder` and run all measurements; return JSON values."""
    from loadtest.gpu.models import make_model  # late, since it imports torch

    model = make_model(folder / "model", shape, "cpu")
    byte_tokenizer().save(str(model / "tokenizer.json"))
    rows = sides(folder)
    environment = {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    common = {"model": str(model), "threads": threads}
    rooflines = [kernels.roofline()]
    with contextlib.ExitStack() as stack:
        asked = [stack.enter_context(worker(row.module, common | row.settings, environment))[0] for row in rows]
        for index in range(rounds + 1):
            for row, ask in zip(rows, asked, strict=True):
                for count in COUNTS:
                    prompts = random_prompts(count, PROMPT, 100 * index + count, high=shape["vocab_size"] - 1)
                    burst = {"prompts": prompts, "tokens": tokens, "adapters": [None] * count}
                    found = milliseconds(ask(burst))
                    if index:  # round 0 warms up
                        row.steps[count].append(found)
                        report(f"round {index}/{rounds}  {row.name}, {count} at once: {found:.1f} ms a step")
    rooflines.append(kernels.roofline())
    bandwidth = max(roof["read_gb_s"] for roof in rooflines)
    return summary(rows, shape, bandwidth, rooflines[0])


def summary(rows: Sequence[Side], shape: dict[str, Any], bandwidth: float, machine: dict[str, Any]) -> dict[str, Any]:
    """Return figures and verdicts.

    Args:
        bandwidth: read bandwidth in GB/s.
        machine: the other figures of the roofline.
    """
    ours = [row for row in rows if row.module == OUR_ENGINE]
    peers = [row for row in rows if row.module != OUR_ENGINE]
    bounds = {count: active_bytes(shape, count) / bandwidth / 1e6 for count in COUNTS}
    faster = {count: min(peer.median(count) for peer in peers) / ours[0].median(count) for count in COUNTS}
    of_bound = {(row.name, count): row.median(count) / bounds[count] for row in ours for count in COUNTS}
    return {
        "shape": shape,
        "prompt_tokens": PROMPT,
        "roofline": machine | {"read_gb_s": bandwidth},
        "bound_ms": {str(count): bound for count, bound in bounds.items()},
        "active_mb": {str(count): active_bytes(shape, count) / 1e6 for count in COUNTS},
        "rows": [{"name": row.name, "ms": {str(count): values for count, values in row.steps.items()}} for row in rows],
        "verdicts": [
            *(
                {
                    "claim": f"{count} at once: {MIN_SPEEDUP} x as fast as transformers + bitsandbytes at its best",
                    "value": round(ratio, 3),
                    "holds": ratio >= MIN_SPEEDUP,
                }
                for count, ratio in faster.items()
            ),
            *(
                {
                    "claim": f"{name}, {count} at once: at most {MAX_OF_BOUND} x the time of its bytes",
                    "value": round(ratio, 3),
                    "holds": ratio <= MAX_OF_BOUND,
                }
                for (name, count), ratio in of_bound.items()
            ),
        ],
    }


def lines(result: dict[str, Any]) -> list[list[str]]:
    """Return the figures: a header, a line for each side, and the bound."""
    bound = [f"{value:.1f} ({result['active_mb'][count]:.0f} MB)" for count, value in result["bound_ms"].items()]
    return [
        ["", *(f"{count} at once" for count in result["bound_ms"])],
        *([row["name"], *(_spread(values) for values in row["ms"].values())] for row in result["rows"]),
        [f"its bytes at {result['roofline']['read_gb_s']:.1f} GB/s", *bound],
    ]


def table(result: dict[str, Any]) -> Table:
    """Return the result as a table for the terminal."""
    header, *rows = lines(result)
    shown = Table(*header, title="Milliseconds a step, medians")
    for row in rows:
        shown.add_row(*row)
    return shown


def markdown(result: dict[str, Any]) -> str:
    """Return the result as a Markdown table."""
    header, *rows = lines(result)
    ruled = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in ruled) + "\n"


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.1f} ({min(values):.1f}-{max(values):.1f})"
