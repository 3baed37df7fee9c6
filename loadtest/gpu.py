"""Everything that needs an NVIDIA GPU, in one command: `python -m loadtest.gpu`, or `make gpu`.

Tests, then kernels beside bitsandbytes, then the engine on a random-initialised model of Llama-3.1-8B's shape beside
PEFT. Every figure that is promised gets a line with its verdict; what could not be measured says why. Results go to
`loadtest/results/gpu-<device>.json` and `.md`. Works offline; exits with 1 unless every line holds.
"""

import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from loadtest import machine
from loadtest.synthetic import make_adapters, random_prompts

RESULTS = Path(__file__).parent / "results"
TESTS = [
    "tests/adapters/kernels/test_triton.py",
    "tests/server/engine/test_triton_engine.py",
    "tests/server/engine/test_graphs.py",
    "tests/finetune/test_triton.py",
]
LLAMA_8B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
LORA_TAX = {1: 0.98, 8: 0.88, 32: 0.65, 64: 0.48}  # distinct rank-16 adapters -> share of throughput without
ADAPTERS, RANK = 64, 16
PROMPT, TOKENS, ROUNDS = 64, 128, 3
HEADERS = ("line", "what", "promised", "measured", "verdict")


@dataclass(frozen=True)
class Line:
    """One promise and what became of it."""

    name: str
    what: str
    promised: str
    measured: str
    held: bool | None  # None: not measured

    @property
    def verdict(self) -> str:
        return {True: "holds", False: "FAILS", None: "not measured"}[self.held]


def at_least(name: str, what: str, measured: float, limit: float, unit: str = "x") -> Line:
    """A line for a figure with a lower bound."""
    return Line(name, what, f">= {limit:g}{unit}", f"{measured:.2f}{unit}", measured >= limit)


# --- the parts ---------------------------------------------------------------------------------


def tests(_: dict[str, Any]) -> list[Line]:
    """(a) The kernels' and the graphs' tests, the wide ones too."""
    # Without the project's own settings, which name plugins that such a machine may lack.
    bare = ["-c", os.devnull, "--rootdir=.", "--import-mode=importlib", "-m", "slow or not slow"]
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", *bare, *TESTS], capture_output=True, text=True)
    summary = (done.stdout.strip().splitlines() or ["no output"])[-1]
    return [Line("a", "tests on the GPU", "all pass", summary.strip("= "), done.returncode == 0)]


def kernels(raw: dict[str, Any]) -> list[Line]:
    """(b) Correctness and speed of the kernels."""
    done = subprocess.run([sys.executable, "-m", "adapters.kernels.triton.bench"], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-1500:])
    measured = raw["kernels"] = json.loads(done.stdout)
    lines = [
        Line(
            "b",
            f"error of {entry['kernel']}, {entry['case']}",
            f"<= {entry['limit']:g}",
            f"{entry['error']:.1e}",
            entry["error"] <= entry["limit"],
        )
        for entry in measured["errors"]
    ]
    gains = [(entry, entry["library_seconds"] / entry["seconds"]) for entry in measured["lines"]]
    middle = [gain for entry, gain in gains if 8 <= entry["rows"] <= 32 and entry["ins"] == 4096]
    shares = [e["bytes"] / e["seconds"] / 1e9 / measured["copy_gb_s"] for e in measured["lines"] if e["rows"] <= 16]
    return [
        *lines,
        at_least("b", "linear beside bitsandbytes, 1-64 rows, geomean", geomean([gain for _, gain in gains]), 1.5),
        at_least("b", "linear beside bitsandbytes, 8-32 rows, 4096 wide, geomean", geomean(middle), 2.5),
        at_least("b", "linear beside bitsandbytes, the worst shape", min(gain for _, gain in gains), 1.0),
        at_least("b", "linear, share of copy bandwidth at 1-16 rows, the worst shape", min(shares), 0.6, ""),
    ]


def engine(raw: dict[str, Any]) -> list[Line]:
    """(c), (d), (e) The engine on the large model."""
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "model")
        paths = make_adapters(Path(folder) / "adapters", model, ADAPTERS, rank=RANK, dtype="bfloat16")
        adapters = {path.name: str(path) for path in paths}
        # Our worker comes up first and quantises; PEFT follows when it has given the memory back.
        settings: dict[str, Any] = {"model": str(model), "cache_dir": folder, "adapters": adapters}
        with worker("server.engine.offline", settings) as ask:
            single = rate(ask, 1, [None])
            plain = {count: rate(ask, count, [None]) for count in LORA_TAX}
            tax = {count: rate(ask, count, list(adapters)[:count]) for count in LORA_TAX}
        settings |= {"adapters": dict(list(adapters.items())[:32]), "dtype": "bfloat16", "threads": 8}
        with worker("loadtest.peers.peft_worker", settings | {"switching": False}) as ask:
            peft = rate(ask, 32, list(adapters)[:32], rounds=1)
    raw["engine"] = {"single": single, "plain": plain, "adapters": tax, "peft": peft}
    bandwidth = raw["kernels"]["copy_gb_s"] * 1e9 if "kernels" in raw else math.nan
    roofline = bandwidth / bytes_per_token()
    lines = [
        at_least("c", "32 requests on 32 adapters beside PEFT's mixed batch", tax[32] / peft, 20),
        at_least("d", "single-request decode, share of the roofline", single / roofline, 0.5, ""),
    ]
    for count, share in LORA_TAX.items():
        lines.append(at_least("e", f"throughput left with {count} adapters", tax[count] / plain[count], share, ""))
    return lines


def unmeasured(_: dict[str, Any]) -> list[Line]:
    """Promises that this command has no measurement for."""
    wanted = {
        "f": "a cold adapter's first token, and its neighbours' latency",
        "g": "training beside PEFT + bitsandbytes, joint jobs",
        "h": "a job in the background at half load",
    }
    return [Line(name, what, "see the issue", "no measurement is written", None) for name, what in wanted.items()]


PARTS: tuple[Callable[[dict[str, Any]], list[Line]], ...] = (tests, kernels, engine, unmeasured)


# --- their means --------------------------------------------------------------------------------


def geomean(values: list[float]) -> float:
    """Geometric mean."""
    return math.exp(statistics.fmean(map(math.log, values)))


def bytes_per_token() -> float:
    """What decoding one token has to read: NF4 weights with their scales, and the bf16 head."""
    hidden, wide = LLAMA_8B["hidden_size"], LLAMA_8B["intermediate_size"]
    kv = hidden * LLAMA_8B["num_key_value_heads"] / LLAMA_8B["num_attention_heads"]
    weights = LLAMA_8B["num_hidden_layers"] * hidden * (2 * hidden + 2 * kv + 3 * wide)
    return weights * (1 / 2 + 1 / 64) + 2 * hidden * LLAMA_8B["vocab_size"]


def make_model(folder: Path) -> Path:
    """A Llama of the 8B's shape with random weights, in Hugging Face layout."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**LLAMA_8B, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    del model
    torch.cuda.empty_cache()
    return folder


@contextlib.contextmanager
def worker(module: str, settings: dict[str, Any]) -> Iterator[Callable[[dict[str, Any]], Any]]:
    """A process that answers JSON lines, as `loadtest.peers.worker` describes it."""
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            [sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        ) as child,
    ):
        assert child.stdin is not None
        assert child.stdout is not None
        to, back = child.stdin, child.stdout

        def ask(message: dict[str, Any]) -> Any:
            with contextlib.suppress(BrokenPipeError):  # it has ended: its log says why
                to.write(json.dumps(message) + "\n")
                to.flush()
            answer = back.readline()
            if not answer:
                log.seek(0)
                raise RuntimeError(f"{module} ended: {log.read()[-1500:]}")
            return json.loads(answer)

        try:
            ask(settings)
            yield ask
        finally:
            child.kill()


def rate(ask: Callable[[dict[str, Any]], Any], requests: int, adapters: list[Any], rounds: int = ROUNDS) -> float:
    """Decoded tokens per second of a burst, the first tokens left out; the median after a round to warm up."""
    rates = []
    for round_ in range(rounds + 1):
        prompts = random_prompts(requests, PROMPT, seed=round_)
        names = [adapters[i % len(adapters)] for i in range(requests)]
        answers = ask({"prompts": prompts, "tokens": TOKENS, "adapters": names})
        first = max(answer["times"][0] for answer in answers)
        last = max(answer["times"][-1] for answer in answers)
        rates.append(sum(time > first for answer in answers for time in answer["times"]) / (last - first))
    return statistics.median(rates[1:])


# --- the command --------------------------------------------------------------------------------


def markdown(described: dict[str, Any], lines: list[Line]) -> str:
    """The result as a page."""
    rows = [HEADERS, ("---",) * len(HEADERS)]
    rows += [(line.name, line.what, line.promised, line.measured, line.verdict) for line in lines]
    table = "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)
    packages = ", ".join(f"{name} {version}" for name, version in described["packages"].items())
    about = f"{described['gpu']}, CUDA {described['cuda']}; {packages}; {described['date']}, `{described['command']}`"
    return f"# On one GPU\n\n{about}\n\n{table}\n"


def main() -> int:
    """Run every part, print the table, write the files."""
    if not torch.cuda.is_available():
        print("No NVIDIA GPU that torch can use: nothing was measured.", file=sys.stderr)
        return 2
    described = machine.describe([sys.executable, "-m", "loadtest.gpu"])
    described |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    raw: dict[str, Any] = {}
    lines: list[Line] = []
    for part in PARTS:
        try:
            found = part(raw)
        except Exception as fault:  # a part that breaks takes no other with it
            traceback.print_exc()
            reason = str(fault).strip().splitlines() or [type(fault).__name__]
            found = [Line("-", part.__name__, "runs", reason[-1][:200], None)]
        for line in found:
            print(f"{line.verdict:>12}  {line.name}  {line.what}: {line.measured} ({line.promised})", flush=True)
        lines += found
    name = "-".join(described["gpu"].lower().split())
    RESULTS.mkdir(exist_ok=True)
    result = {"machine": described, "lines": [asdict(line) | {"verdict": line.verdict} for line in lines], **raw}
    (RESULTS / f"gpu-{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    (RESULTS / f"gpu-{name}.md").write_text(markdown(described, lines))
    return 0 if all(line.held for line in lines) else 1


if __name__ == "__main__":
    sys.exit(main())
