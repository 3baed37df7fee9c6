"""What one GPU holds, by arithmetic; and how throughput grows with replicas, by simulation.

The arithmetic is the server's own (tests hold it equal): rank rows, KV blocks, the numbers that a job keeps.

The simulation's model of cost, all of it from committed measurements of the default model on two CPU cores:

- A step that decodes b sequences takes `step_seconds + b * token_seconds`: a line through the decode speeds of one
  request and of eight on eight adapters.
- A prompt takes `prompt_seconds` of its replica's time, between steps: the whole requests' time less their decoding.
- An adapter that is not on the device is loaded, one at a time per replica, in `load_seconds`, beside the steps; its
  request waits, and others go on. A replica's device holds `device_adapters`, the least recently used go first, and
  those in use stay. A load from disk is measured; one from an object store is assumed to take a second.

Clients ask one after the other, a fixed number for each replica, so that the load grows with the replicas. Adapters are
drawn by Zipf's law. Requests are routed in one of two ways:

- residency: to the least busy of the replicas that hold the adapter. When none does, or these have `most_requests`
  each, to the one that holds the fewest adapters of those with room. This is what Ray Serve's multiplexing does.
- queue: to the less busy of two replicas drawn at random ("power of two choices"), whatever they hold.

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

# --- one GPU -------------------------------------------------------------------------------------------------------

GIB = 2**30
LLAMA_8B: dict[str, Any] = {  # of its config.json
    "name": "Llama-3.1-8B",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
NF4_BYTES = 1 / 2 + 1 / 64 + 4 / (64 * 256)  # a weight: its code, and scales quantised once more
RESERVED = GIB  # for CUDA's context and libraries, and what torch's allocator leaves over; an assumption
KV_SHARE, ADAPTER_SHARE = 0.7, 0.1  # of what is free once the base is loaded, as the server divides it
UNIT_BYTES = 2  # a number of a bf16 rank row


def row_bytes(config: dict[str, Any]) -> int:
    """One rank row in bf16 on all linears."""
    return sum(UNIT_BYTES * (inputs + outputs) for inputs, outputs in linear_shapes(config).values())


def kv_bytes(config: dict[str, Any], width: int) -> int:
    """Keys and values of one token, of `width` bytes each."""
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return int(config["num_hidden_layers"] * 2 * config["num_key_value_heads"] * head * width)


def base_bytes(config: dict[str, Any]) -> int:
    """The NF4 base: its linears in four bits, embeddings and head in bf16."""
    weights = sum(inputs * outputs for inputs, outputs in linear_shapes(config).values())
    embeddings = config["vocab_size"] * config["hidden_size"] * (1 if config["tie_word_embeddings"] else 2)
    return round(weights * NF4_BYTES + 2 * embeddings)


def job_bytes(config: dict[str, Any], rank: int) -> int:
    """Numbers that a job with AdamW keeps: adapter, gradients and two moments in fp32. Activations come on top."""
    return 16 * rank * sum(inputs + outputs for inputs, outputs in linear_shapes(config).values())


def gpu(config: dict[str, Any], memory: int) -> dict[str, Any]:
    """What a card of so many bytes holds, divided as the server does unless told otherwise."""
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
    """Seconds that things take, and how much a replica holds."""

    step_seconds: float
    token_seconds: float
    prompt_seconds: float
    load_seconds: float
    device_adapters: int = 64
    most_requests: int = 32  # as deploy/ray has it


@dataclass(frozen=True)
class Demand:
    """What is asked for."""

    adapters: int = 10_000
    exponent: float = 1.0
    clients_per_replica: int = 16
    requests_per_client: int = 30
    output_tokens: int = 64
    seed: int = 0


def cost_of(comparison: dict[str, Any], load_seconds: float) -> Cost:
    """From a result of `python -m loadtest bench`, and the time of a load."""
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
    """One server: what waits, what runs (tokens left for each request), which adapters it holds."""

    requests: int = 0
    held: OrderedDict[int, int] = field(default_factory=OrderedDict)  # adapter -> requests that use it, oldest first
    loading: deque["_Request"] = field(default_factory=deque)
    prompts: deque["_Request"] = field(default_factory=deque)
    running: list["_Request"] = field(default_factory=list)
    stepping: bool = False
    coming: bool = False  # an adapter is being loaded


@dataclass(eq=False)
class _Request:
    adapter: int
    left: int
    repeats: int  # that its client makes after it
    asked: float = 0.0
    resident: bool = True


class _World:
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
        self.number = count()  # of an event: those of one moment happen in their order
        self.finished: list[tuple[float, _Request, float]] = []  # when, which, seconds to the first token
        self.first: dict[_Request, float] = {}

    def run(self) -> None:
        """Until every client has had all of its answers."""
        clients = self.demand.clients_per_replica * len(self.replicas)
        for _ in range(clients):
            self.ask(self.demand.requests_per_client - 1)
        while self.events:
            self.now, _, (what, place) = heapq.heappop(self.events)
            what(place)

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
            self.step(place)
        else:
            request.resident = False
            replica.loading.append(request)
            self.load(place)

    def route(self, adapter: int) -> int:
        if self.routing == "queue":
            two = [self.random.randrange(len(self.replicas)) for _ in range(2)]
            return min(two, key=lambda place: self.replicas[place].requests)

        def has_room(place: int) -> bool:
            return self.replicas[place].requests < self.cost.most_requests

        if at_home := [place for place in self.holders.get(adapter, ()) if has_room(place)]:
            return min(at_home, key=lambda place: (self.replicas[place].requests, place))
        free = [place for place in range(len(self.replicas)) if has_room(place)] or range(len(self.replicas))
        fewest = min(len(self.replicas[place].held) for place in free)
        return self.random.choice([place for place in free if len(self.replicas[place].held) == fewest])

    def load(self, place: int) -> None:
        """Begin the next load, if there is room for it."""
        replica = self.replicas[place]
        while replica.loading and not replica.coming:
            adapter = replica.loading[0].adapter
            if adapter in replica.held:  # somebody else's wish brought it
                self.arrived(place)
                continue
            if len(replica.held) >= self.cost.device_adapters:
                idle = next((one for one, users in replica.held.items() if not users), None)
                if idle is None:
                    return
                del replica.held[idle]
                self.holders[idle].discard(place)
            replica.coming = True
            self.holders.setdefault(adapter, set()).add(place)  # from now on others may follow
            self.at(self.cost.load_seconds, self.loaded, place)

    def loaded(self, place: int) -> None:
        replica = self.replicas[place]
        replica.coming = False
        replica.held[replica.loading[0].adapter] = 0
        self.arrived(place)
        self.load(place)

    def arrived(self, place: int) -> None:
        replica = self.replicas[place]
        request = replica.loading.popleft()
        replica.held[request.adapter] += 1
        replica.held.move_to_end(request.adapter)
        replica.prompts.append(request)
        self.step(place)

    def step(self, place: int) -> None:
        """Begin a step: the prompt that came first, if one waits, and a token of each that runs."""
        replica = self.replicas[place]
        if replica.stepping or not (replica.prompts or replica.running):
            return
        replica.stepping = True
        seconds = 0.0
        if replica.prompts:
            replica.running.append(replica.prompts.popleft())
            seconds += self.cost.prompt_seconds
        seconds += self.cost.step_seconds + len(replica.running) * self.cost.token_seconds
        self.at(seconds, self.stepped, place)

    def stepped(self, place: int) -> None:
        replica = self.replicas[place]
        replica.stepping = False
        over = []
        for request in replica.running:
            if request.left == self.demand.output_tokens:
                self.first[request] = self.now - request.asked
            request.left -= 1
            if not request.left:
                over.append(request)
        replica.running = [request for request in replica.running if request.left]
        for request in over:
            replica.requests -= 1
            replica.held[request.adapter] -= 1
            self.finished.append((self.now, request, self.first.pop(request)))
        self.load(place)
        self.step(place)
        for request in over:
            if request.repeats:
                self.ask(request.repeats - 1)

    def at(self, seconds: float, what: Any, place: int) -> None:
        heapq.heappush(self.events, (self.now + seconds, next(self.number), (what, place)))


def simulate(replicas: int, routing: Routing, cost: Cost, demand: Demand) -> dict[str, float]:
    """Tokens a second, the share of requests that found their adapter on the device, and first tokens, once warm.

    The first third of the answers warms the replicas, and the last clients' ends are not counted: what is, lies between
    the ends of the first third and of the last tenth.
    """
    world = _World(replicas, routing, cost, demand)
    world.run()
    done = world.finished
    counted = done[len(done) // 3 : -len(done) // 10]
    seconds = counted[-1][0] - done[len(done) // 3 - 1][0]
    first = sorted(wait for _, _, wait in counted)
    return {
        "tokens_per_second": len(counted) * demand.output_tokens / seconds,
        "resident": sum(request.resident for _, request, _ in counted) / len(counted),
        "ttft_p50": first[len(first) // 2],
        "ttft_p99": first[len(first) * 99 // 100],
    }


def measure(comparison: Path, loading: Path, demand: Demand, replicas: tuple[int, ...] = REPLICAS) -> dict[str, Any]:
    """Both halves of the page; JSON values."""
    measured = json.loads(comparison.read_text())
    loads = {"disk": json.loads(loading.read_text())["first_token_ms"]["load"] / 1e3, "store": STORE_SECONDS}
    costs = {where: cost_of(measured, seconds) for where, seconds in loads.items()}
    return {
        "gpus": {str(size): gpu(LLAMA_8B, size * GIB) for size in (24, 80, 140)},
        "sources": [comparison.name, loading.name],
        "costs": {where: asdict(cost) for where, cost in costs.items()},
        "demand": asdict(demand),
        "replicas": {
            f"{where}, {routing}": {str(many): simulate(many, routing, cost, demand) for many in replicas}
            for where, cost in costs.items()
            for routing in ROUTINGS
        },
    }


def table(result: dict[str, Any]) -> Table:
    """The simulation for a terminal."""
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
