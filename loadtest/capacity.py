"""The capacity of one GPU, calculated, and the throughput of many replicas, simulated.

The calculation equals the server's own (tests compare them): rank rows, KV blocks, a job's numbers.

The simulation's costs, all from committed measurements of the default model on two CPU cores:

- A step that decodes b sequences takes `step_seconds + b * token_seconds`: a line through the decode speeds of one
  request and of eight on eight adapters.
- A prompt takes `prompt_seconds` of its replica's time, between steps: the time of whole requests less their decoding.
- A cold adapter is loaded, one at a time per replica, in `load_seconds`, concurrently with steps; its request waits,
  and others continue. A replica's device holds `device_adapters`, of which the least recently used unused one is
  evicted first. From disk a load takes `DISK_SECONDS` for each MiB of an adapter of rank 16 in fp32, as measured for
  docs/guides/operating.md (reading and SHA-256); from an object store it is assumed to take a second.

Each client sends its requests one after the other; the number of clients is fixed per replica, so the load grows with
the replicas. Adapters are drawn by Zipf's law. Requests are routed in one of two ways:

- residency: to the least busy of the replicas that hold the adapter. If there is none, or these have `most_requests`
  each, to the one with the fewest adapters among those with room, as Ray Serve's multiplexing does.
- queue: to the less busy of two random replicas ("power of two choices"), independent of adapters.

Not modelled: the network, the router's own time, prefix caching, and failures.
"""

import heapq
import json
import random
from bisect import bisect_left
from collections import OrderedDict, deque
from dataclasses import asdict, dataclass, field
from itertools import accumulate, count
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from loadtest.synthetic import linear_shapes

Routing = Literal["residency", "queue"]
ROUTINGS: tuple[Routing, ...] = ("residency", "queue")
REPLICAS = (1, 2, 4, 8, 16, 32, 64)
STORE_SECONDS = 1.0
DISK_SECONDS = 0.0011  # per MiB

# --- one GPU -------------------------------------------------------------------------------------------------------

GIB = 2**30
LLAMA_8B: dict[str, Any] = {  # from its config.json
    "name": "Llama-3.1-8B",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
SMOLLM2: dict[str, Any] = {  # the default model, the measured one
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
}
NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)  # per weight: its code, and doubly quantised scales
RESERVED = GIB  # for CUDA's context and libraries, and torch's allocator; an assumption
KV_SHARE, ADAPTER_SHARE = 0.7, 0.1  # of the free memory after loading the base, as in the server
UNIT_BYTES = 2  # per number of a bf16 rank row


def row_bytes(config: dict[str, Any]) -> int:
    """Return the bytes of one rank row in bf16 on all linears."""
    return sum(UNIT_BYTES * (inputs + outputs) for inputs, outputs in linear_shapes(config).values())


def kv_bytes(config: dict[str, Any], width: int) -> int:
    """Return the bytes of one token's keys and values, numbers of `width` bytes."""
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return int(config["num_hidden_layers"] * 2 * config["num_key_value_heads"] * head * width)


def base_bytes(config: dict[str, Any]) -> int:
    """Return the bytes of the NF4 base: linears in four bits, embeddings and head in bf16."""
    weights = sum(inputs * outputs for inputs, outputs in linear_shapes(config).values())
    embeddings = config["vocab_size"] * config["hidden_size"] * (1 if config["tie_word_embeddings"] else 2)
    return round(weights * NF4_BYTES + 2 * embeddings)


def job_bytes(config: dict[str, Any], rank: int) -> int:
    """Return the bytes of a job with AdamW: adapter, gradients and two moments in fp32, without activations."""
    return 16 * rank * sum(inputs + outputs for inputs, outputs in linear_shapes(config).values())


def gpu(config: dict[str, Any], memory: int) -> dict[str, Any]:
    """Divide a GPU's memory, in bytes, as the server does by default; return JSON values."""
    free = memory - RESERVED - base_bytes(config)
    rows = int(free * ADAPTER_SHARE) // row_bytes(config)
    kv = int(free * KV_SHARE)
    return {
        "memory": memory,
        "base": base_bytes(config),
        "free": free,
        "kv_tokens": {"bfloat16": kv // kv_bytes(config, 2), "fp8": kv // kv_bytes(config, 1)},
        "adapters": {str(rank): rows // rank for rank in (8, 16, 32, 64)},
        "left": free - kv - int(free * ADAPTER_SHARE),
        "job": {str(rank): job_bytes(config, rank) for rank in (8, 16, 32, 64)},
    }


# --- many replicas -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """Times of operations, in seconds, and a replica's limits."""

    step_seconds: float
    token_seconds: float
    prompt_seconds: float
    load_seconds: float
    device_adapters: int = 64
    most_requests: int = 32  # as in deploy/ray


@dataclass(frozen=True)
class Demand:
    """The load."""

    adapters: int = 10_000
    exponent: float = 1.0
    clients_per_replica: int = 16
    requests_per_client: int = 30
    output_tokens: int = 64
    seed: int = 0


def cost_of(comparison: dict[str, Any], load_seconds: float) -> Cost:
    """Derive costs from a result of `python -m loadtest bench` and the time of a load."""
    cells = {case: comparison["cells"][case]["lorakeet"] for case in ("one", "eight", "whole")}
    one, eight = (1 / cells["one"]["decode"]["median"], 8 / cells["eight"]["decode"]["median"])
    token = (eight - one) / 7
    case = next(case for case in comparison["cases"] if case["name"] == "whole")
    requests, tokens = case["requests"], case["output_tokens"]
    whole = requests * tokens / cells["whole"]["whole"]["median"]
    return Cost(
        step_seconds=one - token,
        token_seconds=token,
        prompt_seconds=(whole - (tokens - 1) * eight) / requests,
        load_seconds=load_seconds,
    )


@dataclass
class _Replica:
    """One server: waiting and running requests, and resident adapters."""

    requests: int = 0
    held: OrderedDict[int, int] = field(
        default_factory=OrderedDict
    )  # adapter -> its requests, least recently used first
    loading: deque["_Request"] = field(default_factory=deque)
    prompts: deque["_Request"] = field(default_factory=deque)
    running: list["_Request"] = field(default_factory=list)
    stepping: bool = False
    load_in_progress: bool = False  # whether an adapter is being loaded


@dataclass(eq=False)
class _Request:
    adapter: int
    left: int
    repeats: int  # further requests of its client
    asked: float = 0.0
    resident: bool = True


class _Simulation:
    """Replicas, their clients, and the clock."""

    def __init__(self, replicas: int, routing: Routing, cost: Cost, demand: Demand) -> None:
        self.cost, self.demand, self.routing = cost, demand, routing
        self.replicas = [_Replica() for _ in range(replicas)]
        self.holders: dict[int, set[int]] = {}  # adapter -> replicas
        self.random = random.Random(demand.seed)
        weights = ((rank + 1) ** -demand.exponent for rank in range(demand.adapters))
        self.popularity = list(accumulate(weights))
        self.now = 0.0
        self.events: list[tuple[float, int, Any]] = []
        self.number = count()  # of events, to order those of one time
        self.finished: list[tuple[float, _Request, float]] = []  # end, request, seconds to the first token
        self.first: dict[_Request, float] = {}

    def run(self) -> None:
        """Run until all clients have all their answers."""
        clients = self.demand.clients_per_replica * len(self.replicas)
        for _ in range(clients):
            self.ask(self.demand.requests_per_client - 1)
        while self.events:
            self.now, _, (action, place) = heapq.heappop(self.events)
            action(place)

    def ask(self, repeats: int) -> None:
        adapter = bisect_left(self.popularity, self.random.random() * self.popularity[-1])
        request = _Request(adapter, self.demand.output_tokens, repeats, self.now)
        place = self.route(adapter)
        replica = self.replicas[place]
        replica.requests += 1
        if adapter in replica.held:
            replica.held.move_to_end(adapter)
            replica.held[adapter] += 1
            replica.prompts.append(request)
            self.start_step(place)
        else:
            request.resident = False
            replica.loading.append(request)
            self.start_load(place)

    def route(self, adapter: int) -> int:
        if self.routing == "queue":
            two = [self.random.randrange(len(self.replicas)) for _ in range(2)]
            return min(two, key=lambda place: self.replicas[place].requests)

        def has_room(place: int) -> bool:
            return self.replicas[place].requests < self.cost.most_requests

        if holders := [place for place in self.holders.get(adapter, ()) if has_room(place)]:
            return min(holders, key=lambda place: (self.replicas[place].requests, place))
        free = [place for place in range(len(self.replicas)) if has_room(place)] or range(len(self.replicas))
        fewest = min(len(self.replicas[place].held) for place in free)
        return self.random.choice([place for place in free if len(self.replicas[place].held) == fewest])

    def start_load(self, place: int) -> None:
        """Start the next load, if there is room for it."""
        replica = self.replicas[place]
        while replica.loading and not replica.load_in_progress:
            adapter = replica.loading[0].adapter
            if adapter in replica.held:  # loaded for another request
                self.enqueue_prompt(place)
                continue
            if len(replica.held) >= self.cost.device_adapters:
                idle = next((one for one, users in replica.held.items() if not users), None)
                if idle is None:
                    return
                del replica.held[idle]
                self.holders[idle].discard(place)
            replica.load_in_progress = True
            self.holders.setdefault(adapter, set()).add(place)  # from now on other requests are routed here
            self.schedule(self.cost.load_seconds, self.finish_load, place)

    def finish_load(self, place: int) -> None:
        replica = self.replicas[place]
        replica.load_in_progress = False
        replica.held[replica.loading[0].adapter] = 0
        self.enqueue_prompt(place)
        self.start_load(place)

    def enqueue_prompt(self, place: int) -> None:
        replica = self.replicas[place]
        request = replica.loading.popleft()
        replica.held[request.adapter] += 1
        replica.held.move_to_end(request.adapter)
        replica.prompts.append(request)
        self.start_step(place)

    def start_step(self, place: int) -> None:
        """Start a step: the oldest waiting prompt, if any, and a token of each running request."""
        replica = self.replicas[place]
        if replica.stepping or not (replica.prompts or replica.running):
            return
        replica.stepping = True
        seconds = 0.0
        if replica.prompts:
            replica.running.append(replica.prompts.popleft())
            seconds += self.cost.prompt_seconds
        seconds += self.cost.step_seconds + len(replica.running) * self.cost.token_seconds
        self.schedule(seconds, self.finish_step, place)

    def finish_step(self, place: int) -> None:
        replica = self.replicas[place]
        replica.stepping = False
        finished = []
        for request in replica.running:
            if request.left == self.demand.output_tokens:
                self.first[request] = self.now - request.asked
            request.left -= 1
            if not request.left:
                finished.append(request)
        replica.running = [request for request in replica.running if request.left]
        for request in finished:
            replica.requests -= 1
            replica.held[request.adapter] -= 1
            self.finished.append((self.now, request, self.first.pop(request)))
        self.start_load(place)
        self.start_step(place)
        for request in finished:
            if request.repeats:
                self.ask(request.repeats - 1)

    def schedule(self, seconds: float, action: Any, place: int) -> None:
        heapq.heappush(self.events, (self.now + seconds, next(self.number), (action, place)))


def simulate(replicas: int, routing: Routing, cost: Cost, demand: Demand) -> dict[str, float]:
    """Return tokens per second, the share of requests with a resident adapter, and TTFT, of warm replicas.

    The first third of the answers, which warms the replicas, and the last tenth are not counted.
    """
    simulation = _Simulation(replicas, routing, cost, demand)
    simulation.run()
    done = simulation.finished
    counted = done[len(done) // 3 : -len(done) // 10]
    seconds = counted[-1][0] - done[len(done) // 3 - 1][0]
    first = sorted(wait for _, _, wait in counted)
    return {
        "tokens_per_second": len(counted) * demand.output_tokens / seconds,
        "resident": sum(request.resident for _, request, _ in counted) / len(counted),
        "ttft_p50": first[len(first) // 2],
        "ttft_p99": first[len(first) * 99 // 100],
    }


def measure(comparison: Path, demand: Demand, replicas: tuple[int, ...] = REPLICAS) -> dict[str, Any]:
    """Calculate and simulate; return JSON values."""
    measured = json.loads(comparison.read_text())
    size = 4 * 16 * sum(inputs + outputs for inputs, outputs in linear_shapes(SMOLLM2).values())
    loads = {"disk": size / 2**20 * DISK_SECONDS, "store": STORE_SECONDS}
    costs = {where: cost_of(measured, seconds) for where, seconds in loads.items()}
    return {
        "gpus": {str(size): gpu(LLAMA_8B, size * GIB) for size in (24, 80, 140)},
        "source": comparison.name,
        "costs": {where: asdict(cost) for where, cost in costs.items()},
        "demand": asdict(demand),
        "replicas": {
            f"{where}, {routing}": {str(many): simulate(many, routing, cost, demand) for many in replicas}
            for where, cost in costs.items()
            for routing in ROUTINGS
        },
    }


def table(result: dict[str, Any]) -> Table:
    """Return the simulation as a table for the terminal."""
    shown = Table(
        "Replicas", title="Tokens/s (of one replica: x), share of requests that found their adapter, P99 TTFT"
    )
    columns = result["replicas"]
    for name in columns:
        shown.add_column(name, justify="right")
    for many in next(iter(columns.values())):
        cells = []
        for rows in columns.values():
            row, one = rows[many], rows[min(rows, key=int)]
            speed = f"{row['tokens_per_second']:.0f} ({row['tokens_per_second'] / one['tokens_per_second']:.1f}x)"
            cells.append(f"{speed}, {row['resident']:.0%}, {row['ttft_p99']:.2f} s")
        shown.add_row(many, *cells)
    return shown


def markdown(result: dict[str, Any]) -> list[str]:
    """Return the two tables of docs/capacity.md."""
    columns = result["gpus"].values()
    ranks = next(iter(columns))["adapters"]
    cards = [
        ["", *(f"{size} GiB" for size in result["gpus"])],
        ["base", *(_gib(one["base"]) for one in columns)],
        ["free", *(_gib(one["free"]) for one in columns)],
        ["KV cache in bf16, tokens", *(f"{one['kv_tokens']['bfloat16']:,}" for one in columns)],
        ["KV cache in fp8, tokens", *(f"{one['kv_tokens']['fp8']:,}" for one in columns)],
        *([f"adapters of rank {rank}, bf16", *(f"{one['adapters'][rank]:,}" for one in columns)] for rank in ranks),
        ["left for jobs, merged weights, activations", *(_gib(one["left"]) for one in columns)],
    ]
    rows = result["replicas"].values()
    replicas = [
        ["Replicas", *(f"{name.partition(', ')[0]}: by {name.partition(', ')[2]}" for name in result["replicas"])]
    ]
    for many in next(iter(rows)):
        cells = [many]
        for row in rows:
            speed = row[many]["tokens_per_second"] / row["1"]["tokens_per_second"]
            cells.append(f"{speed:.1f}x, {row[many]['resident']:.0%}, {row[many]['ttft_p99']:.1f} s")
        replicas.append(cells)
    return [
        "\n".join(
            f"| {' | '.join(line)} |" for line in [lines[0], ["---"] + ["---:"] * (len(lines[0]) - 1), *lines[1:]]
        )
        for lines in (cards, replicas)
    ]


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
