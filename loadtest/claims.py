"""The ratios promised by the project, with a verdict each, computed from result files (JSON values)."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from loadtest.compare import QUIET_CORES

Result = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Claim:
    """One promise: `value` must be at least (or at most) `target`; None: not measured."""

    title: str
    value: float | None
    target: float
    at_most: bool = False
    percent: bool = False

    @property
    def verdict(self) -> str:
        """`met`, `missed` or `not measured`."""
        if self.value is None:
            return "not measured"
        met = self.value <= self.target if self.at_most else self.value >= self.target
        return "met" if met else "missed"

    def show(self, number: float | None) -> str:
        """Format a value or the target in the claim's unit."""
        if number is None:
            return "-"
        return f"{100 * number:.0f}%" if self.percent else f"{number:.2f}x"


def figure(result: Result, case: str, side: str, quantity: str = "decode") -> float | None:
    """Return the median of one cell's quantity, if it was measured."""
    cell = result.get("cells", {}).get(case, {}).get(side, {})
    value: float | None = cell.get(quantity, {}).get("median")
    return value


def claims(result: Result) -> list[Claim]:
    """Check all promises of the project against one result."""
    ours, half = "lorakeet", "lorakeet-kv16"

    def gain(case: str, *peers: str, quantity: str = "decode", side: str = ours) -> float | None:
        """Return our figure as a multiple of the best of `peers`."""
        rivals = [value for peer in peers if (value := figure(result, case, peer, quantity)) is not None]
        mine = figure(result, case, side, quantity)
        return None if mine is None or not rivals else mine / max(rivals)

    def tax(case: str, against: str, side: str = ours) -> float | None:
        """Return the share of decode speed lost in `case`, compared with another case (of `side`)."""
        return _apply(lambda mine, free: 1 - mine / free, figure(result, case, ours), figure(result, against, side))

    llama, static = ("llama", "llama-q4_0"), ("llama-static", "llama-q4_0-static")
    one, eight = "1 request: decode /", "8 requests, 8 adapters: decode /"
    return [
        Claim(f"{one} llama-server, per-request lora, Q4_1", gain("one", "llama"), 1.0),
        Claim(f"{one} llama-server, per-request lora, its faster type", gain("one", *llama), 1.0),
        Claim(f"{one} llama-server, one static adapter, Q4_1", gain("one", "llama-static"), 0.8),
        Claim(f"{one} llama-server, one static adapter, its faster type", gain("one", *static), 0.8),
        Claim(f"{one} PEFT + bitsandbytes, fp32", gain("one", "peft"), 10.0),
        Claim(f"{one} PEFT + bitsandbytes, its faster type", gain("one", "peft", "peft-bf16"), 10.0),
        Claim(f"{eight} llama-server, per-request lora, Q4_1", gain("eight", "llama"), 2.0),
        Claim(f"{eight} llama-server, per-request lora, its faster type", gain("eight", *llama), 2.0),
        Claim("1 request of 2,048 tokens: decode / llama-server, its faster type", gain("one-2048", *llama), 1.5),
        Claim("8 of 2,048 tokens, 8 adapters: decode / llama-server, its faster type", gain("eight-2048", *llama), 3.0),
        Claim("1 request of 2,048 tokens, fp16 KV cache as llama-server's", gain("one-2048", *llama, side=half), 1.5),
        Claim("8 of 2,048 tokens, 8 adapters, fp16 KV cache too", gain("eight-2048", *llama, side=half), 3.0),
        Claim(f"{eight} vLLM's CPU build, fp32", gain("eight", "vllm"), 6.0),
        Claim(f"{eight} vLLM's CPU build, its faster type", gain("eight", "vllm", "vllm-bf16"), 6.0),
        Claim(f"{eight} PEFT's mixed batch, fp32", gain("eight", "peft"), 10.0),
        Claim(f"{eight} PEFT's mixed batch, its faster type", gain("eight", "peft", "peft-bf16"), 10.0),
        Claim("8 whole requests (64 in, 33 out) / llama-server, Q4_1", gain("whole", "llama", quantity="whole"), 2.0),
        Claim("8 whole requests / llama-server, its faster type", gain("whole", *llama, quantity="whole"), 2.0),
        Claim("LoRA tax, 8 adapters, bf16 files", tax("eight-bf16", "base"), 0.20, at_most=True, percent=True),
        Claim("LoRA tax, 8 adapters, fp32 files", tax("eight", "base"), 0.35, at_most=True, percent=True),
        Claim(
            "Base-only requests: cost of 16 loaded adapters",
            tax("base", "base", side="lorakeet-bare"),
            0.03,  # the difference between two runs of one server
            at_most=True,
            percent=True,
        ),
        Claim("HTTP: 8 streams / engine offline", http_share(result), 0.93, percent=True),
        Claim("512-token shared prefix: second TTFT / first", prefix_ratio(result), 0.15, at_most=True, percent=True),
        *kernel_claims(result),
    ]


def http_share(result: Result) -> float | None:
    """Return the decode rate through HTTP as a share of the engine's own."""
    return _apply(
        lambda http, offline: http / offline,
        figure(result, "eight", "lorakeet"),
        figure(result, "eight", "lorakeet-offline"),
    )


def prefix_ratio(result: Result) -> float | None:
    """Return the ratio of TTFT with a cached prefix to TTFT without, medians."""
    measured = result.get("lorakeet_prefix_cache")
    if not measured or "error" in measured:
        return None
    return statistics.median(measured["second"]) / statistics.median(measured["first"])


def kernel_claims(result: Result) -> list[Claim]:
    """Check NF4 linears (the worst measured shape) and attention against the roofline."""
    lines = result.get("kernels", {}).get("lines", [])

    def worst(rows: int, bound: str) -> float | None:
        shares = [line[bound] for line in lines if line["kernel"] == "nf4 linear" and line["rows"] == rows]
        return min(shares, default=None)

    def attention(shape: str, bound: str) -> float | None:
        shares = [line[bound] for line in lines if line["kernel"] == "paged attention" and line["shape"] == shape]
        return min(shares, default=None)

    return [
        Claim("NF4 linear, 1 row: share of read bandwidth", worst(1, "bandwidth_share"), 0.35, percent=True),
        Claim("NF4 linear, 16 rows: share of the fp32 peak", worst(16, "flops_share"), 0.60, percent=True),
        *(
            Claim(
                f"Attention, {requests} decoding at 2,048 keys: share of read bandwidth",
                attention(f"{requests} x 1 queries, 2048 keys", "bandwidth_share"),
                0.70,
                percent=True,
            )
            for requests in (1, 8)
        ),
        Claim(
            "Attention, prefill at 4,096 keys: share of the fp32 peak",
            attention("1 x 256 queries, 4096 keys", "flops_share"),
            0.60,
            percent=True,
        ),
    ]


def _apply(function: Callable[[float, float], float], first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else function(first, second)


# --- Markdown ------------------------------------------------------------------------------------------------------

_PEERS = {
    "llama-server": ("llama", "llama-q4_0"),
    "llama-server, one adapter for all": ("llama-static", "llama-q4_0-static"),
    "vLLM (CPU)": ("vllm", "vllm-bf16"),
    "PEFT + bitsandbytes": ("peft", "peft-bf16", "peft-switching"),
}
_SUMMARY = (("one", "decode"), ("eight", "decode"), ("whole", "whole"))


def summary(result: Result) -> str:
    """Return a small table: our median and, for each peer, its best median and our multiple of it."""
    titles = {case["name"]: case["title"] for case in result["cases"]}
    rows = []
    for case, quantity in _SUMMARY:
        if (mine := figure(result, case, "lorakeet", quantity)) is None:
            continue
        row = [titles[case], f"**{mine:.0f}**"]
        for sides in _PEERS.values():
            rivals = [value for side in sides if (value := figure(result, case, side, quantity)) is not None]
            row.append(f"{max(rivals):.0f} ({mine / max(rivals):.1f}x)" if rivals else "")
        rows.append(row)
    return _table(["", "Lorakeet", *_PEERS], rows)


def markdown(result: Result) -> str:
    """Return a result's tables: the figures of all cases, the claims with verdicts, the kernels and the sides."""
    return "\n\n".join(filter(None, [_cases(result), _claims(result), _kernels(result), _sides(result)])) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cases(result: Result) -> str:
    names = [name for name in result["sides"] if any(name in row for row in result["cells"].values())]
    rows = []
    for case in result["cases"]:
        quantity = "whole" if case["name"] == "whole" else "decode"
        cells = [_cell(result["cells"].get(case["name"], {}).get(name), quantity) for name in names]
        rows.append([case["title"], *cells])
    note = "Tokens/s: median over the rounds, (lowest-highest)."
    if result["busy_cores_when_idle"] > QUIET_CORES:
        note += f" **Disturbed**: others kept {result['busy_cores_when_idle']:.1f} cores busy."
    return f"{note}\n\n{_table(['', *names], rows)}"


def _cell(cell: dict[str, Any] | None, quantity: str) -> str:
    if cell is None:
        return ""
    if "error" in cell:
        return "error"
    if quantity not in cell:
        return "-"
    found = cell[quantity]
    return f"{found['median']:.1f} ({found['low']:.1f}-{found['high']:.1f})"


def _claims(result: Result) -> str:
    rows = [
        [c.title, c.show(c.value), ("<= " if c.at_most else ">= ") + c.show(c.target), c.verdict]
        for c in claims(result)
    ]
    return _table(["Claim", "measured", "promised", "verdict"], rows)


def _kernels(result: Result) -> str:
    if not (kernels := result.get("kernels")):
        return ""
    rows = [
        [
            f"{line['kernel']} {line['shape']}, {line['rows']} rows",
            f"{1e6 * line['seconds']:.0f}",
            f"{1e6 * line['library_seconds']:.0f} ({line['library']})",
            f"{100 * line['bandwidth_share']:.0f}%",
            f"{100 * line['flops_share']:.0f}%",
        ]
        for line in kernels["lines"]
    ]
    roof = kernels["roofline"]
    limits = f"{roof['read_gb_s']:.1f} GB/s read, {roof['fp32_gflop_s']:.0f} GFLOP/s fp32"
    note = f"Roofline: {limits}, {roof['threads']} threads."
    return f"{note}\n\n{_table(['Kernel', 'µs', 'library, µs', 'of bandwidth', 'of fp32 peak'], rows)}"


def _sides(result: Result) -> str:
    lines = []
    for name, side in result["sides"].items():
        answers = result["distinct_answers"].get(name)
        seen = "" if answers is None else f"; {answers} different answers of 8 adapters to one prompt"
        lines.append(f"- **{name}**: {'; '.join(f'{key} {value}' for key, value in side.items())}{seen}")
    lines += [f"- **{name}**: not measured, {why.splitlines()[0]}" for name, why in result["missing"].items()]
    return "\n".join(lines)
