"""The server's Prometheus metrics: one object around a registry of its own.

Names are vLLM's, under the prefix `lorakeet:` or the operator's own. There are two sources: the HTTP handlers, one
`RequestMetrics` per sequence, and the engine's `Stats`, gauges and *increments*, so that counters stay monotonic when
the engine restarts.

Adapters are labelled by name, after the name was resolved to a stored version, so unknown names make no series. At most
`top_adapters` names have series of their own; the least recently used one is folded into `other`.
"""

import time
from collections import Counter as Multiset
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from adapters.storage.versions import DEFAULT_TENANT
from server.messages.protocol import AdapterUse, Ready, Stats
from server.usage import AdapterUsage

FinishedReason = Literal["stop", "length", "abort", "error"]

OTHER = "other"
PREFIX = "lorakeet:"
USUAL_RANK = 16  # of the adapters that `max_gpu_lora_adapters` counts

_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160)
_BETWEEN_TOKENS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
_WHOLE_REQUEST = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920)
_QUEUE = (0.001, 0.01, 0.05, 0.1, *_WHOLE_REQUEST)
_STEP = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_COUNTS = (*range(9), 16, 32, 64, 128)


@dataclass
class _AdapterCounts:
    """All counts of one adapter name (or of `other`)."""

    digest: str = ""  # of the version last requested, by which the engine's reports find the name
    requests: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    loads: int = 0
    load_seconds: float = 0.0
    evictions: int = 0

    def add(self, other: "_AdapterCounts") -> None:
        for name in ("requests", "prompt_tokens", "generation_tokens", "loads", "load_seconds", "evictions"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


class _AdapterMetrics(Collector):
    """Per-adapter series, limited in number, made at scrape time."""

    def __init__(self, top: int) -> None:
        self.resident: dict[tuple[str, str], AdapterUse] = {}  # by digest and tier
        self.pinned: Sequence[tuple[str, str]] = ()  # (name, digest)
        self.room = 0  # adapters of `USUAL_RANK` that fit on the device
        self._top = top
        self._by_name: OrderedDict[str, _AdapterCounts] = OrderedDict()  # least recently used first
        self._names: dict[str, str] = {}  # digest -> name, for names in `_by_name`
        self._other = _AdapterCounts()
        self._in_flight: dict[str, Multiset[str]] = {}  # digest -> names of the open requests that use it

    def begin(self, name: str, digest: str) -> None:
        self._in_flight.setdefault(digest, Multiset())[name] += 1
        if name == OTHER:  # an adapter of this name shares the series of the rest
            self._other.requests += 1
            return
        counts = self._by_name.get(name)
        if counts is None:
            counts = self._by_name[name] = _AdapterCounts()
            if len(self._by_name) > self._top:
                oldest, gone = self._by_name.popitem(last=False)
                self._unlink(oldest, gone)
                self._other.add(gone)
        else:
            self._by_name.move_to_end(name)
        if counts.digest != digest:
            self._unlink(name, counts)
            counts.digest = digest
        self._names[digest] = name
        counts.requests += 1

    def end(self, name: str, digest: str) -> None:
        names = self._in_flight[digest]
        names[name] -= 1
        if not +names:
            del self._in_flight[digest]

    def by_name(self, name: str) -> _AdapterCounts:
        return self._by_name.get(name, self._other)

    def by_digest(self, digest: str) -> _AdapterCounts:
        return self.by_name(self._names.get(digest, OTHER))

    def forget(self, name: str) -> None:
        counts = self._by_name.pop(name, None)
        if counts is not None:
            self._unlink(name, counts)
            self._other.add(counts)

    def _unlink(self, name: str, counts: _AdapterCounts) -> None:
        if self._names.get(counts.digest) == name:  # another name may have the same version now
            del self._names[counts.digest]

    def collect(self) -> Iterator[Metric]:
        requests = _counter("lora_requests", "Requests that named the adapter")
        prompt = _counter("lora_prompt_tokens", "Prompt tokens of requests that named the adapter")
        generation = _counter("lora_generation_tokens", "Tokens generated with the adapter")
        loads = _counter("lora_adapter_loads", "Loads of the adapter onto the device")
        seconds = _counter("lora_adapter_load_seconds", "Seconds spent loading the adapter onto the device")
        evictions = _counter("lora_adapter_evictions", "Evictions of the adapter from the device")
        for name, counts in [*self._by_name.items(), (OTHER, self._other)]:
            requests.add_metric([name], counts.requests)
            prompt.add_metric([name], counts.prompt_tokens)
            generation.add_metric([name], counts.generation_tokens)
            loads.add_metric([name], counts.loads)
            seconds.add_metric([name], counts.load_seconds)
            evictions.add_metric([name], counts.evictions)
        yield from (requests, prompt, generation, loads, seconds, evictions)
        yield from self._residency()

    def _residency(self) -> Iterator[Metric]:
        loaded = _gauge(
            "lora_adapter_loaded",
            "Adapter versions held per memory tier, 0 or 1 for a named adapter; `other` has no rank",
            "adapter_name",
            "level",
            "pinned",
            "rank",
        )
        pinned = {digest for _, digest in self.pinned}
        per_series: Multiset[tuple[str, str, str, str]] = Multiset()
        per_tier: Multiset[str] = Multiset({"device": 0, "host": 0, "merged": 0})
        for use in self.resident.values():
            name = self._names.get(use.digest, OTHER)
            rank = "" if name == OTHER else str(use.rank)  # bounds the number of series
            per_series[name, use.tier, str(use.digest in pinned).lower(), rank] += 1
            per_tier[use.tier] += 1
        for labels, count in sorted(per_series.items()):
            loaded.add_metric(labels, count)
        yield loaded
        total = _gauge("num_loaded_lora_adapters", "Adapter versions held per memory tier", "level")
        for tier, count in per_tier.items():
            total.add_metric([tier], count)
        yield total
        on_device = len(self._on_device())
        yield GaugeMetricFamily(
            f"{PREFIX}num_gpu_loaded_lora_adapters", "Adapter versions held on the device, merged ones too", on_device
        )
        room = max(self.room, on_device)
        yield GaugeMetricFamily(
            f"{PREFIX}max_gpu_lora_adapters",
            f"Adapters of rank {USUAL_RANK} on every linear that the device holds, or those it holds if they are more",
            room,
        )
        yield self._requests_info(room)

    def _on_device(self) -> set[str]:
        return {use.digest for use in self.resident.values() if use.tier != "host"}

    def _requests_info(self, room: int) -> Metric:
        """The metric for the Kubernetes Gateway's inference extension: names in labels, the time as the value."""
        info = _gauge(
            "lora_requests_info",
            "Adapters resident on the device (running) or waited for, as comma-separated names; the value is the Unix "
            "time",
            "max_lora",
            "running_lora_adapters",
            "waiting_lora_adapters",
        )
        resident = self._on_device()
        waiting = {use.digest for use in self.resident.values() if use.waiting}
        waiting |= self._in_flight.keys() - resident  # the engine does not report adapters that it is still reading
        names = [(name, counts.digest) for name, counts in self._by_name.items()]
        names += [(name, digest) for digest, open_ in self._in_flight.items() for name in +open_]
        running = {name for name, digest in (*names, *self.pinned) if digest in resident}
        waited_for = {name for digest in waiting for name in +self._in_flight.get(digest, Multiset())}
        info.add_metric([str(room), ",".join(sorted(running)), ",".join(sorted(waited_for))], time.time())
        return info


class _PrefixedCollector(Collector):
    """A registry's metrics under another prefix, such as vLLM's."""

    def __init__(self, registry: CollectorRegistry, prefix: str) -> None:
        self._registry = registry
        self._prefix = prefix

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            if metric.name.startswith(PREFIX):
                metric.name = self._with_prefix(metric.name)
                metric.samples = [sample._replace(name=self._with_prefix(sample.name)) for sample in metric.samples]
            yield metric

    def _with_prefix(self, name: str) -> str:
        return self._prefix + name.removeprefix(PREFIX)


class Metrics:
    """All of the server's metrics, in `registry`; `render` writes them."""

    def __init__(
        self, top_adapters: int = 100, prefix: str = PREFIX.removesuffix(":"), *, top_tenants: int = 100
    ) -> None:
        """`top_adapters`, `top_tenants`: most series of their own; `prefix`: of metric names, before a colon."""
        disable_created_metrics()
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._exposed: Collector = self.registry
        if f"{prefix}:" != PREFIX:
            self._exposed = _PrefixedCollector(self.registry, f"{prefix}:")
        self.usage = AdapterUsage()
        self._adapters = _AdapterMetrics(top_adapters)
        self.resident: Mapping[tuple[str, str], AdapterUse] = self._adapters.resident  # by digest and tier
        self.registry.register(self._adapters)

        self._running = self._gauge("num_requests_running", "Sequences in the batch")
        self._waiting = self._gauge("num_requests_waiting", "Sequences waiting for a place in the batch")
        self._kv_usage = self._gauge("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1")
        self._state_usage = self._gauge("state_cache_usage_perc", "Share of state slots in use by sequences, 0 to 1")
        self._merged_bytes = self._gauge("merged_weight_bytes", "Device memory of adapters merged into the base")
        self._engine_up = self._gauge("engine_up", "1 while there is an engine process, else 0")
        self._cache_config = self._gauge(
            "cache_config_info", "The KV cache: tokens per block, and blocks", "block_size", "num_gpu_blocks"
        )
        self._pinned = self._gauge("num_pinned_lora_adapters", "Pinned adapter versions")
        self._pinned_bytes = self._gauge("pinned_lora_adapter_bytes", "Device memory of pinned adapters")
        self._prefix_queries = self._counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache")
        self._prefix_hits = self._counter("prefix_cache_hits", "Prompt tokens found in the prefix cache")
        self._preemptions = self._counter("num_preemptions", "Preemptions: sequences to be recomputed later")
        self._drafted = self._counter("spec_decode_num_draft_tokens", "Draft tokens computed")
        self._accepted = self._counter("spec_decode_num_accepted_tokens", "Draft tokens accepted")
        self._step_requests = self._histogram("engine_step_requests", "Sequences in one engine step", _COUNTS)
        self._step_adapters = self._histogram("engine_step_adapters", "Distinct adapters in one engine step", _COUNTS)
        self._step_seconds = self._histogram("engine_step_seconds", "Duration of one engine step", _STEP)
        self._load_seconds = self._histogram("lora_load_seconds", "Duration of one adapter load", _STEP)

        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens processed")
        self.generation_tokens = self._counter("generation_tokens", "Tokens generated")
        self.first_token = self._histogram("time_to_first_token_seconds", "Arrival to first token", _FIRST_TOKEN)
        self.inter_token = self._histogram("inter_token_latency_seconds", "Between two outputs", _BETWEEN_TOKENS)
        self.e2e = self._histogram("e2e_request_latency_seconds", "Arrival to last token", _WHOLE_REQUEST)
        self.queue_time = self._histogram("request_queue_time_seconds", "Arrival to first scheduled", _QUEUE)
        self._top_tenants = top_tenants
        self._tenants: set[str] = set()  # those with series of their own
        self.tenant_requests = Counter(f"{PREFIX}tenant_requests", "Sequences", ["tenant"], registry=self.registry)
        kinds = "Prompt tokens (prompt) and generated tokens (generation)"
        self.tenant_tokens = Counter(f"{PREFIX}tenant_tokens", kinds, ["tenant", "kind"], registry=self.registry)
        self.success = Counter(
            f"{PREFIX}request_success", "Finished sequences", ["finished_reason"], registry=self.registry
        )
        for reason in get_args(FinishedReason):
            self.success.labels(reason)

    def render(self) -> bytes:
        """Render all metrics in Prometheus's text format 0.0.4.

        In OpenMetrics, and in text format 1.0.0, the client library escapes the colon: `lorakeet_engine_up`.
        """
        return generate_latest(self._exposed)

    def set_pinned(self, versions: Sequence[tuple[str, str]], size: int) -> None:
        """Set the pinned adapter versions, as (name, digest), and their bytes on the device."""
        self._adapters.pinned = versions
        self._pinned.set(len(versions))
        self._pinned_bytes.set(size)

    def request(self, *adapters: tuple[str, str], tenant: str = "") -> "RequestMetrics":
        """Start the metrics of one sequence. `adapters`: (label, digest) of every stored version that it uses."""
        return RequestMetrics(self, self._adapters, adapters, tenant)

    def tenant_label(self, tenant: str) -> str:
        """Return the tenant's label: its name for the first `top_tenants` tenants, `other` for later ones."""
        label = tenant or DEFAULT_TENANT
        if label not in self._tenants:
            if len(self._tenants) >= self._top_tenants:
                return OTHER
            self._tenants.add(label)
        return label

    def adapter_deleted(self, name: str) -> None:
        """End the series of a deleted name; their sums are added to `other`."""
        self._adapters.forget(name)
        self.usage.forget(name)

    def add_engine_stats(self, stats: Stats) -> None:
        """Add one report of the engine."""
        self._running.set(stats.running)
        self._waiting.set(stats.waiting)
        self._kv_usage.set(stats.kv_usage)
        self._state_usage.set(stats.state_usage)
        for counter, count in (
            (self._prefix_queries, stats.prefix_queries),
            (self._prefix_hits, stats.prefix_hits),
            (self._preemptions, stats.preemptions),
            (self._drafted, stats.drafted_tokens),
            (self._accepted, stats.accepted_tokens),
        ):
            if count:  # mostly zero
                counter.inc(count)
        if stats.step_requests:  # a heartbeat is no step
            self._step_requests.observe(stats.step_requests)
            self._step_adapters.observe(stats.step_adapters)
            self._step_seconds.observe(stats.step_seconds)
        for digest in stats.evictions:
            self._adapters.by_digest(digest).evictions += 1
        for digest, seconds in stats.loads:
            self._load_seconds.observe(seconds)
            counts = self._adapters.by_digest(digest)
            counts.loads += 1
            counts.load_seconds += seconds
        for use in stats.adapters:
            if use.present:
                self._adapters.resident[use.digest, use.tier] = use
            else:
                self._adapters.resident.pop((use.digest, use.tier), None)
        if stats.merges is not None:
            self._merged_bytes.set(sum(report.bytes for report in stats.merges))

    def set_engine_process(self, alive: bool, info: Ready | None = None) -> None:
        """Set whether there is an engine process; without one, nothing runs and nothing is resident.

        `info`: its base, once the first engine is up.
        """
        self._engine_up.set(alive)
        if info is not None:
            self._cache_config.clear()
            self._cache_config.labels(info.block_size, info.num_blocks).set(1)
            rows = [info.pool_rows.get(kind, 0) for kind in {linear.kind for linear in info.linears.values()}]
            self._adapters.room = min(rows, default=0) // USUAL_RANK
        if not alive:
            for gauge in (self._running, self._waiting, self._kv_usage, self._state_usage, self._merged_bytes):
                gauge.set(0)
            self._adapters.resident.clear()

    def _gauge(self, name: str, help_text: str, *labels: str) -> Gauge:
        return Gauge(PREFIX + name, help_text, labels, registry=self.registry)

    def _counter(self, name: str, help_text: str) -> Counter:
        return Counter(PREFIX + name, help_text, registry=self.registry)

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(PREFIX + name, help_text, buckets=buckets, registry=self.registry)


class RequestMetrics:
    """The metrics of one sequence: `output` for each output of the engine, then `finish`, once."""

    def __init__(
        self, metrics: Metrics, adapters: _AdapterMetrics, used: Sequence[tuple[str, str]], tenant: str
    ) -> None:
        self._metrics = metrics
        self._adapters = adapters
        self._used = used
        self._usage = metrics.usage.begin(tenant, [name for name, _ in used])
        self._tenant = metrics.tenant_label(tenant)
        metrics.tenant_requests.labels(self._tenant).inc()
        self._arrived = time.monotonic()
        self._prompt_counted = False
        self._last_token: float | None = None
        for name, digest in used:
            adapters.begin(name, digest)

    def output(self, tokens: int, prompt_tokens: int, queue_seconds: float) -> None:
        """Count an output with `tokens` new tokens, possibly 0; prompt and queue time count with the first output."""
        now = time.monotonic()
        counts = [self._adapters.by_name(name) for name, _ in self._used]
        for usage in self._usage:
            usage.tokens += tokens + (0 if self._prompt_counted else prompt_tokens)
        if not self._prompt_counted:
            self._prompt_counted = True
            self._metrics.queue_time.observe(queue_seconds)
            self._metrics.prompt_tokens.inc(prompt_tokens)
            self._metrics.tenant_tokens.labels(self._tenant, "prompt").inc(prompt_tokens)
            for count in counts:
                count.prompt_tokens += prompt_tokens
        if not tokens:
            return
        if self._last_token is None:
            self._metrics.first_token.observe(now - self._arrived)
        else:
            self._metrics.inter_token.observe(now - self._last_token)
        self._last_token = now
        self._metrics.generation_tokens.inc(tokens)
        self._metrics.tenant_tokens.labels(self._tenant, "generation").inc(tokens)
        for count in counts:
            count.generation_tokens += tokens

    def finish(self, reason: FinishedReason) -> None:
        """Count the end of the sequence. `abort`: the client left; `error`: it failed or the engine died."""
        self._metrics.success.labels(reason).inc()
        if reason in ("stop", "length"):
            self._metrics.e2e.observe(time.monotonic() - self._arrived)
        for name, digest in self._used:
            self._adapters.end(name, digest)


def _counter(name: str, help_text: str) -> CounterMetricFamily:
    return CounterMetricFamily(PREFIX + name, help_text, labels=["adapter_name"])


def _gauge(name: str, help_text: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(PREFIX + name, help_text, labels=labels)
