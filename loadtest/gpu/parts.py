"""The parts of the GPU measurement, one for each letter, or group of letters, of the promises."""

import json
import math
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loadtest.gpu.lines import Line, at_least, at_most
from loadtest.gpu.models import Size, adapter_bytes, bytes_per_token, make_model
from loadtest.synthetic import make_adapters, random_prompts
from loadtest.workers import Ask, worker

OUR_ENGINE = "server.engine.offline"
OUR_TRAINER = "server.training.bench"
PEFT = "loadtest.peers.peft_worker"
PEFT_TRAINER = "loadtest.peers.peft_training"
KERNELS = "adapters.kernels.triton.bench"
TESTS = [
    "tests/adapters/kernels/test_triton.py",
    "tests/adapters/device/test_pool.py",
    "tests/server/engine/test_triton_engine.py",
    "tests/server/engine/test_graphs.py",
    "tests/server/engine/test_in_flight.py",
    "tests/server/training/test_triton.py",
]
RANK = 16
PEFT_TOKENS = 24  # few, since PEFT's step gets slower with every adapter
# Distinct adapters -> share of the throughput without adapters, if bandwidth were the only cost.
LORA_TAX = {1: 0.98, 8: 0.88, 32: 0.65, 64: 0.48}
RUNNING = 16  # running requests while cold adapters are loaded
MAX_SLOWDOWN, MIN_KEPT = 1.25, 0.15  # of P99 inter-token latency, and of a job's speed, when they share the device
LOG_PROBABILITY = 0.5  # largest difference between bf16 and stock transformers
SEED = 0


@dataclass
class Bench:
    """State shared by the parts: a folder, a size, and models, adapters and bandwidths, made once."""

    folder: Path
    size: Size
    raw: dict[str, Any] = field(default_factory=dict)  # of the current part
    measured: dict[str, Any] | None = None  # output of KERNELS

    def model(self, name: str) -> Path:
        """Return a model's folder, made on first use."""
        path = self.folder / name
        if not (path / "config.json").exists():
            make_model(path, self.size.models[name], self.size.device)
        return path

    def adapters(self, name: str, count: int) -> dict[str, str]:
        """Return `count` adapters of a model as name -> folder, made on first use."""
        folder = self.folder / f"{name}-adapters"
        if not (folder / f"bfloat16-{count - 1}" / "adapter_config.json").exists():
            make_adapters(folder, self.model(name), count, rank=RANK, dtype="bfloat16", seed=SEED)
        return {f"bfloat16-{index}": str(folder / f"bfloat16-{index}") for index in range(count)}

    def prompts(self, count: int, seed: int) -> list[list[int]]:
        """Return random prompts of the size's length."""
        high = min(shape["vocab_size"] for shape in self.size.models.values()) - 1
        return random_prompts(count, self.size.prompt, seed, high=min(10_000, high))

    @cached_property
    def bandwidths(self) -> dict[str, float]:
        """`copy` within the device and `host_to_device`, in bytes per second."""
        measured = self.measured or run_json(KERNELS, *self.flags, "--bandwidths")
        return {name: measured[f"{name}_gb_s"] * 1e9 for name in ("copy", "host_to_device")}

    @property
    def threads(self) -> int:
        """Threads of libraries on the host."""
        return min(8, os.cpu_count() or 1) if self.size.full else 1

    @property
    def flags(self) -> list[str]:
        return [] if self.size.full else ["--smoke"]

    @contextmanager
    def engine(self, name: str, adapters: dict[str, str], **config: Any) -> Iterator[tuple[Ask, Any]]:
        """Start our engine on a model, as `worker` does."""
        settings = {
            "model": str(self.model(name)),
            "cache_dir": str(self.folder),
            "adapters": adapters,
            "engine": {"device": self.size.device, **config},
            "check": True,
        }
        with worker(OUR_ENGINE, settings) as asked:
            yield asked


# --- the parts ---------------------------------------------------------------------------------


def tests(bench: Bench) -> list[Line]:
    """(a) Run the tests of kernels, graphs and trainer, slow ones included."""
    # Without the project's pytest settings, which need plugins that such a machine may lack.
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "--rootdir=.", "--import-mode=importlib"]
    command += ["-m", "slow or not slow"] if bench.size.full else ["--collect-only"]
    if bench.size.full and find_spec("xdist"):
        command += ["-n", "8"]
    done = subprocess.run([*command, *TESTS], capture_output=True, text=True)
    bench.raw["output"] = (done.stdout + done.stderr)[-20_000:]
    summary = ((done.stdout.strip() or done.stderr.strip()).splitlines() or ["no output"])[-1]
    return [Line("a", "tests on the GPU", "all pass", summary.strip("= "), done.returncode == 0)]


def kernels(bench: Bench) -> list[Line]:
    """(b) Measure correctness and speed of the kernels."""
    measured = bench.raw["kernels"] = bench.measured = run_json(KERNELS, *bench.flags)
    lines = [
        at_most("b", f"error of {entry['kernel']}, {entry['case']}", entry["error"], entry["limit"], "")
        for entry in measured["errors"]
    ]
    for entry in measured["fused"]:
        what = f"adapters of q, k and v fused, beside one after the other, {entry['adapters']} adapters"
        lines.append(at_least("b", what, entry["apart_seconds"] / entry["seconds"], 1.0))
    for entry in measured["experts"]:
        what = f"experts of {entry['tokens']} tokens in one launch, beside expert by expert"
        note = f"{entry['bytes'] / entry['seconds'] / bench.bandwidths['copy']:.2f} of the copy bandwidth"
        lines.append(at_least("b", what, entry["apart_seconds"] / entry["seconds"], 1.0, "x", note))
    most = max(measured["states"], key=lambda entry: entry["sequences"])
    share = most["bytes"] / most["seconds"] / bench.bandwidths["copy"]
    what = f"states of {most['sequences']} sequences, a token each, share of the copy bandwidth"
    lines.append(at_least("b", what, share, 0.5, ""))
    for model, shape in bench.size.models.items():
        rows = [entry for entry in measured["lines"] if model in entry["models"]]
        gains = [entry["library_seconds"] / entry["seconds"] for entry in rows]
        hidden = shape["hidden_size"]
        pairs = list(zip(rows, gains, strict=True))
        up_to_64 = [gain for entry, gain in pairs if entry["rows"] <= 64]
        middle = [gain for entry, gain in pairs if 8 <= entry["rows"] <= 32 and entry["ins"] == hidden]
        few = [entry for entry in rows if entry["rows"] <= 16]
        shares = [entry["bytes"] / entry["seconds"] / bench.bandwidths["copy"] for entry in few]
        title = f"linear, {model}"
        lines += [
            at_least("b", f"{title}, beside bitsandbytes, 1-64 rows, geomean", geomean(up_to_64), 1.5),
            at_least("b", f"{title}, beside bitsandbytes, 8-32 rows, {hidden} wide, geomean", geomean(middle), 2.5),
            at_least("b", f"{title}, beside bitsandbytes, any number of rows, the worst", min(gains), 1.0),
            at_least("b", f"{title}, 1-16 rows, share of the copy bandwidth, the worst", min(shares), 0.6, ""),
        ]
    return lines


def decoding(bench: Bench) -> list[Line]:
    """(c), (d), (e) Measure decoding on both models, and PEFT's mixed batch on the first."""
    size, lines = bench.size, []
    most = max(size.counts)
    for name, shape in size.models.items():
        adapters = bench.adapters(name, most)
        room = 2 * most * adapter_bytes(shape, RANK)
        with bench.engine(name, adapters, max_batch_requests=most, adapter_bytes=room) as (ask, ready):
            single = rate(bench, ask, 1, [None])
            plain = {count: rate(bench, ask, count, [None]) for count in size.counts}
            tax = {count: rate(bench, ask, count, list(adapters)[:count]) for count in size.counts}
        bench.raw[name] = {"ready": ready, "single": single, "plain": plain, "adapters": tax}
        roofline = bench.bandwidths["copy"] / bytes_per_token(shape)
        what = f"log-probabilities beside stock transformers, {name}, largest difference"
        note = f"{single:.0f} of {roofline:.0f} tokens/s"
        lines += [
            at_most("a", what, ready["difference"], LOG_PROBABILITY, ""),
            at_least("d", f"single-request decode, {name}, share of the roofline", single / roofline, 0.5, "", note),
        ]
        for count in size.counts:
            note = f"{tax[count]:.0f} of {plain[count]:.0f} tokens/s"
            what = f"throughput left with {count} adapters, {name}, beside the byte bound"
            lines.append(at_least("e", what, tax[count] / plain[count], LORA_TAX.get(count, 0.9), "", note))
    name = next(iter(size.models))
    count = min(32, most)
    chosen = dict(list(bench.adapters(name, most).items())[:count])
    settings = {"model": str(bench.model(name)), "adapters": chosen, "device": size.device, "switching": False}
    with worker(PEFT, settings | {"dtype": "bfloat16", "threads": bench.threads}) as (ask, _):
        peft = rate(bench, ask, count, list(chosen), rounds=1, tokens=min(PEFT_TOKENS, size.tokens))
    ours = bench.raw[name]["adapters"][count]
    bench.raw["peft"] = peft
    what = f"{count} requests on {count} adapters beside PEFT's mixed batch, {name}"
    return [at_least("c", what, ours / peft, 20, "x", f"{ours:.0f} beside {peft:.1f} tokens/s"), *lines]


def cold(bench: Bench) -> list[Line]:
    """(f) Measure requests for cold adapters, and the cost of loading these to running requests.

    The same requests arrive at the same times, once for adapters already in use and once for cold ones: at first on
    disk (just written, so in the file cache), later in host memory, since the device has no room for all.
    """
    size, name = bench.size, next(iter(bench.size.models))
    one_adapter = adapter_bytes(size.models[name], RANK)
    names = list(bench.adapters(name, RUNNING + size.cold))
    warm, cold_names = names[:RUNNING], names[RUNNING:]
    room = round((RUNNING + size.cold / 2 + 0.5) * one_adapter)
    with bench.engine(name, bench.adapters(name, len(names)), max_batch_requests=32, adapter_bytes=room) as (ask, _):
        step = 1 / (rate(bench, ask, RUNNING, warm, rounds=1) / RUNNING)  # seconds
        tokens = min(math.ceil((size.cold + 2) * size.spacing / step), 4000)
        runs: dict[str, list[Burst]] = {"warm": [], "disk": [], "host": []}
        for kind in ("warm", "disk", *("warm", "host") * size.rounds):
            arrivals = warm[: len(cold_names)] if kind == "warm" else cold_names
            runs[kind].append(run_beside(bench, ask, warm, arrivals, tokens))
    firsts = {kind: statistics.median(t for burst in bursts for t in burst.firsts) for kind, bursts in runs.items()}
    p99 = {kind: percentile([gap for burst in bursts for gap in burst.gaps], 99) for kind, bursts in runs.items()}
    transfer = 2 * one_adapter / bench.bandwidths["host_to_device"]
    bench.raw["cold"] = {"first": firsts, "itl_p99": p99, "bytes": one_adapter, "step": step, **bench.bandwidths}
    lines = []
    for kind, place in (("host", "in host memory"), ("disk", "on disk")):
        what = f"a cold adapter {place}, time to the first token"
        limit = 1e3 * (firsts["warm"] + transfer)
        lines.append(at_most("f", what, 1e3 * firsts[kind], limit, " ms", f"warm {1e3 * firsts['warm']:.1f} ms"))
        note = f"{1e3 * p99[kind]:.1f} beside {1e3 * p99['warm']:.1f} ms"
        what = f"its neighbours' P99 inter-token latency, adapters {place}"
        lines.append(at_most("f", what, p99[kind] / p99["warm"], 1.1, "x", note))
    return lines


def training(bench: Bench) -> list[Line]:
    """(g) Compare training with PEFT + bitsandbytes, and joint jobs with jobs one after the other."""
    size, name = bench.size, next(iter(bench.size.models))
    batch, length = size.sequences
    wide = {"batch_size": batch, "length": length, "micro_batch_tokens": batch * length}
    narrow = {"batch_size": batch, "length": size.narrow, "micro_batch_tokens": size.narrow}
    settings = {"model": str(bench.model(name)), "cache_dir": str(bench.folder), "device": size.device, "rank": RANK}
    settings["threads"] = bench.threads
    found: dict[str, Trained] = {}
    with worker(PEFT_TRAINER, settings) as (ask, _):
        for title, checkpointing in (("PEFT", False), ("PEFT, checkpointing", True)):
            found[title] = train(ask, {"checkpointing": checkpointing, **wide}, size.steps)
    with worker(OUR_TRAINER, settings) as (ask, _):
        for memory in ("keep", "recompute"):
            found[memory] = train(ask, {"memory": memory, "jobs": 1, **wide}, size.steps)
            for jobs in (1, 2, 4):
                title = f"{memory}, {jobs} jobs"
                found[title] = train(ask, {"memory": memory, "jobs": jobs, **narrow}, size.steps)
    bench.raw["training"] = {title: {"tokens_per_second": one.speed, "peak": one.peak} for title, one in found.items()}
    lines = []
    for ours, theirs in (("keep", "PEFT"), ("recompute", "PEFT, checkpointing")):
        own, other = found[ours], found[theirs]
        what, note = f"training, mode {ours}, beside {theirs}", f"{own.speed:.0f} beside {other.speed:.0f} tokens/s"
        lines.append(at_least("g", what, own.speed / other.speed, 1.5, "x", note))
        note = f"{own.peak / 2**30:.2f} beside {other.peak / 2**30:.2f} GiB"
        lines.append(at_most("g", f"{what}, peak above the base", own.peak / other.peak, 1.0, "x", note))
    alone = max(found[f"{memory}, 1 jobs"].speed for memory in ("keep", "recompute"))
    for jobs in (2, 4):
        joint = max(found[f"{memory}, {jobs} jobs"].speed for memory in ("keep", "recompute"))
        what = f"{jobs} jobs together beside one after the other, micro-batches of {size.narrow} tokens"
        lines.append(at_least("g", what, joint / alone, 1.0, "x", f"{joint:.0f} beside {alone:.0f} tokens/s"))
    return lines


def background(bench: Bench) -> list[Line]:
    """(h) Measure a standing load at half of the engine's capacity, without and with a job in the background."""
    size, name = bench.size, next(iter(bench.size.models))
    adapters = bench.adapters(name, min(8, max(size.counts)))
    batch, length = size.sequences
    job = {"batch_size": batch, "length": length, "micro_batch_tokens": length, "memory": "recompute", "rank": RANK}
    room = 2 * len(adapters) * adapter_bytes(size.models[name], RANK)
    with bench.engine(name, adapters, adapter_bytes=room) as (ask, _):
        capacity = requests_per_second(bench, ask, list(adapters))
        load = poisson(capacity / 2, size.window)
        names = [list(adapters)[i % len(adapters)] for i in range(len(load))]

        def serve(seed: int) -> Burst:
            prompts = bench.prompts(len(load), seed)
            return Burst.of(ask({"prompts": prompts, "tokens": size.tokens, "adapters": names, "at": load}))

        quiet = serve(1)
        ask({"job": job})
        ask({"watch": 0.2 * size.window})  # warms up the device
        alone = ask({"watch": 0.4 * size.window})
        busy = serve(2)
        shared = ask({"watch": 0.0})
    speeds = [watch["tokens"] / watch["seconds"] for watch in (alone, shared)]
    latencies = [percentile(burst.gaps, 99) for burst in (quiet, busy)]
    bench.raw["background"] = {
        "requests_per_second": capacity / 2,
        "itl_p99": dict(zip(("without", "with"), latencies, strict=True)),
        "served_tokens_per_second": {"without": quiet.rate, "with": busy.rate},
        "trained_tokens_per_second": dict(zip(("alone", "beside"), speeds, strict=True)),
    }
    itl = f"{1e3 * latencies[1]:.1f} beside {1e3 * latencies[0]:.1f} ms at {capacity / 2:.1f} requests/s"
    kept = f"{speeds[1]:.0f} of {speeds[0]:.0f} tokens/s"
    served = f"{busy.rate:.0f} beside {quiet.rate:.0f} tokens/s"
    share = speeds[1] / speeds[0] if speeds[0] else math.nan
    return [
        at_most(
            "h", "half load beside a job, P99 inter-token latency", latencies[1] / latencies[0], MAX_SLOWDOWN, "x", itl
        ),
        at_least("h", "half load beside a job, tokens served", busy.rate / quiet.rate, 0.95, "", served),
        at_least("h", "half load beside a job, the job's speed kept", share, MIN_KEPT, "", kept),
    ]


PARTS: dict[str, Callable[[Bench], list[Line]]] = {
    "a": tests,
    "b": kernels,
    "cde": decoding,
    "f": cold,
    "g": training,
    "h": background,
}


# --- helpers ------------------------------------------------------------------------------------


def run_json(module: str, *arguments: str) -> Any:
    """Return the JSON output of `python -m module`. Raises RuntimeError with the end of its errors."""
    interpreted = {"LORAKEET_TRITON": "interpret", "TRITON_INTERPRET": "1"}  # read by Triton at import
    environment = os.environ | (interpreted if "--smoke" in arguments else {})
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(done.stderr[-1500:])
    return json.loads(done.stdout)


def reported(what: str, value: float, unit: str) -> float:
    """Print the value at once, since a part may be cut short before its lines are printed; return it."""
    print(f"{what}: {value:.4g} {unit}", file=sys.stderr, flush=True)
    return value


def geomean(values: Sequence[float]) -> float:
    """Return the geometric mean; NaN without values."""
    return math.exp(statistics.fmean(map(math.log, values))) if values else math.nan


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the smallest value that `percent` of the values do not exceed; NaN without values."""
    return sorted(values)[math.ceil(len(values) * percent / 100) - 1] if values else math.nan


def rate(
    bench: Bench, ask: Ask, requests: int, adapters: Sequence[Any], rounds: int | None = None, tokens: int | None = None
) -> float:
    """Measure a burst's decoded tokens per second, without first tokens; the median, after a round to warm up."""
    rates = []
    for round_ in range(1 + (rounds or bench.size.rounds)):
        names = [adapters[i % len(adapters)] for i in range(requests)]
        prompts = bench.prompts(requests, round_)
        answers = ask({"prompts": prompts, "tokens": tokens or bench.size.tokens, "adapters": names})
        first = max(answer["times"][0] for answer in answers)
        last = max(answer["times"][-1] for answer in answers)
        rates.append(sum(time > first for answer in answers for time in answer["times"]) / (last - first))
    adapted = len({name for name in adapters if name is not None})
    return reported(f"{requests} requests on {adapted} adapters", statistics.median(rates[1:]), "tokens/s")


@dataclass(frozen=True)
class Burst:
    """Latencies of requests over time, in seconds."""

    firsts: list[float]  # to the first token of each
    gaps: list[float]  # between tokens
    rate: float  # tokens per second, from the first request to the last token

    @classmethod
    def of(cls, answers: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]] | None = None) -> "Burst":
        """Compute the latencies of `answers`; with `others`, the gaps are those of other answers."""
        times = [answer["times"] for answer in answers]
        seconds = max(map(max, times)) - min(answer["sent"] for answer in answers)
        return cls(
            [answer["times"][0] - answer["sent"] for answer in answers],
            [b - a for other in others or answers for a, b in zip(other["times"], other["times"][1:], strict=False)],
            sum(map(len, times)) / seconds,
        )


def run_beside(bench: Bench, ask: Ask, standing: Sequence[str], arriving: Sequence[str], tokens: int) -> Burst:
    """Send `arriving` requests one after the other beside `standing` ones; first tokens are those of the arriving ones,
    gaps those of the standing ones."""
    spacing, few = bench.size.spacing, 4
    answers = ask(
        {
            "prompts": bench.prompts(len(standing) + len(arriving), random.randrange(2**31)),
            "tokens": [tokens] * len(standing) + [few] * len(arriving),
            "adapters": [*standing, *arriving],
            "at": [0.0] * len(standing) + [(i + 1) * spacing for i in range(len(arriving))],
        }
    )
    return Burst.of(answers[len(standing) :], answers[: len(standing)])


@dataclass(frozen=True)
class Trained:
    """Speed and memory of training with one configuration."""

    speed: float  # tokens per second
    peak: int  # bytes above the base


def train(ask: Ask, settings: dict[str, Any], steps: int) -> Trained:
    """Train for `steps`, after a step to warm up."""
    ask({"steps": 1, **settings})
    answer = ask({"steps": steps, **settings})
    about = ", ".join(f"{name} {value}" for name, value in settings.items())
    speed = reported(f"training, {about}", answer["tokens"] / statistics.median(answer["seconds"]), "tokens/s")
    return Trained(speed, answer["peak"])


def requests_per_second(bench: Bench, ask: Ask, adapters: Sequence[str]) -> float:
    """Measure the engine's requests per second under more requests than it runs at once."""
    count = 4 * 32 if bench.size.full else 8
    names = [adapters[i % len(adapters)] for i in range(count)]
    for seed in (3, 4):  # the first burst warms up
        answers = ask({"prompts": bench.prompts(count, seed), "tokens": bench.size.tokens, "adapters": names})
    begin = min(answer["sent"] for answer in answers)
    seconds = max(answer["times"][-1] for answer in answers) - begin
    return reported(f"{count} requests, most of them waiting", count / seconds, "requests/s")


def poisson(rate_: float, seconds: float) -> list[float]:
    """Draw the arrival times of a Poisson process, at least one."""
    draw, times = random.Random(SEED), [0.0]
    while (following := times[-1] + draw.expovariate(rate_)) < seconds:
        times.append(following)
    return times
