"""The last hour of the server's metrics in memory, sampled every few seconds."""

import time
from collections import deque
from collections.abc import Collection, Mapping

from adapters.peft_format.sizes import device_bytes
from adapters.storage.store import AdapterStore
from server.client.engine import EngineClient
from server.metrics import PREFIX, Metrics
from server.repeat import run_periodically

SAMPLE_SECONDS = 5.0  # between samples
MINUTE_SAMPLES = int(60 / SAMPLE_SECONDS)  # for rates of training, which is counted by steps, and these may take long
MAX_SAMPLES = int(3600 / SAMPLE_SECONDS)
# Rates per second -> their counters.
_RATES = {
    "generation_tokens_per_second": "generation_tokens_total",
    "prompt_tokens_per_second": "prompt_tokens_total",
}
_SLOW_RATES = {
    "trained_tokens_per_second": "finetune_trained_tokens_total",
    "training_share": "finetune_busy_seconds_total",
}
_GAUGES = {"requests_running": "num_requests_running", "requests_waiting": "num_requests_waiting"}
_SHARES = {"kv_usage": "kv_cache_usage_perc", "state_usage": "state_cache_usage_perc"}
_ERRORS = "request_success_total"
_STEPS, _STEP_ADAPTERS = "engine_step_adapters_count", "engine_step_adapters_sum"
_COUNTERS = [*_RATES.values(), *_SLOW_RATES.values()]
_METRICS = [*_COUNTERS, *_GAUGES.values(), *_SHARES.values(), _ERRORS, _STEPS, _STEP_ADAPTERS]
COLUMNS = (
    *("time", *_RATES, *_SLOW_RATES, *_GAUGES, *_SHARES, "adapters_per_step", "errors", "engine_restarts"),
    *("adapters_on_device", "adapters_in_host_memory", "adapter_device_bytes", "adapter_host_bytes"),
)

Sample = dict[str, float | None]


class History:
    """Samples of one server, oldest first. Counts (`errors`, `engine_restarts`) are since the previous sample."""

    def __init__(self, metrics: Metrics, engine: EngineClient, store: AdapterStore) -> None:
        self._metrics = metrics
        self._engine = engine
        self._store = store
        self._samples: deque[Sample] = deque(maxlen=MAX_SAMPLES)
        self._registry = metrics.registry.restricted_registry([PREFIX + name for name in _METRICS])
        self._previous: deque[tuple[float, dict[str, float]]] = deque(maxlen=MINUTE_SAMPLES)
        self._pid: int | None = None
        self._sizes: dict[str, int] = {}  # digest -> bytes on the device

    async def run(self) -> None:
        """Sample until cancelled."""

        async def sample() -> None:
            self.sample()

        await run_periodically(sample, SAMPLE_SECONDS, "sampling the server's history")

    def sample(self) -> None:
        """Take one sample."""
        now, values = time.time(), self._values()
        self._previous = self._previous or deque([(now, values)], maxlen=MINUTE_SAMPLES)
        (minute_ago, first), (last_time, before) = self._previous[0], self._previous[-1]
        self._previous.append((now, values))
        passed, minute = max(now - last_time, 1e-3), max(now - minute_ago, 1e-3)
        increase = {name: values[name] - before[name] for name in values}
        slow = {column: (values[name] - first[name]) / minute for column, name in _SLOW_RATES.items()}
        steps = increase[_STEPS]
        restarted = self._pid is not None and self._engine.pid not in (None, self._pid)
        self._pid = self._engine.pid or self._pid
        tiers = {tier: {digest for digest, at in self._metrics.resident if at == tier} for tier in ("device", "host")}
        sizes = self._bytes(tiers["device"] | tiers["host"])
        self._samples.append(
            {
                "time": round(now, 3),
                **{column: round(increase[name] / passed, 3) for column, name in _RATES.items()},
                "trained_tokens_per_second": round(slow["trained_tokens_per_second"], 3),
                "training_share": round(min(1.0, slow["training_share"]), 3),  # jobs that share a pass count it each
                **{column: values[name] for column, name in _GAUGES.items()},
                **{column: round(values[name], 4) for column, name in _SHARES.items()},
                "adapters_per_step": round(increase[_STEP_ADAPTERS] / steps, 2) if steps else None,
                "errors": increase[_ERRORS],
                "engine_restarts": float(restarted),
                "adapters_on_device": len(tiers["device"]),
                "adapters_in_host_memory": len(tiers["host"]),
                "adapter_device_bytes": sum(sizes[digest] for digest in tiers["device"]),
                "adapter_host_bytes": sum(sizes[digest] for digest in tiers["host"]),
            }
        )

    def since(self, after: float) -> dict[str, list[float | None]]:
        """Return the samples newer than `after` (Unix time), as columns."""
        samples = [sample for sample in self._samples if (sample["time"] or 0) > after]
        return {column: [sample[column] for sample in samples] for column in COLUMNS}

    def _values(self) -> dict[str, float]:
        """Return the metrics' values by name without prefix; of finished requests, those that failed."""
        values = dict.fromkeys(_METRICS, 0.0)
        for metric in self._registry.collect():
            for sample in metric.samples:
                name = sample.name.removeprefix(PREFIX)
                if name in values and sample.labels.get("finished_reason", "error") == "error":
                    values[name] = sample.value
        return values

    def _bytes(self, digests: Collection[str]) -> Mapping[str, int]:
        """Return the adapters' sizes in bytes on the device, which are also their sizes in host memory."""
        self._sizes = {digest: size for digest, size in self._sizes.items() if digest in digests}
        if (new := set(digests) - self._sizes.keys()) and (info := self._engine.info) is not None:
            rows = {version.digest: version.receipt["rows"] for version in self._store.all_versions()}
            self._sizes |= {digest: device_bytes(rows.get(digest, {}), info.linears) for digest in new}
        return self._sizes
