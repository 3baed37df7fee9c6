"""Metrics under another prefix: vLLM's, say."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.registry import Collector


class Renamed(Collector):
    """A registry's metrics with `new` in place of the `old` prefix."""

    def __init__(self, registry: CollectorRegistry, old: str, new: str) -> None:
        self._registry = registry
        self._old = old
        self._new = new

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            if metric.name.startswith(self._old):
                metric.name = self._renamed(metric.name)
                metric.samples = [sample._replace(name=self._renamed(sample.name)) for sample in metric.samples]
            yield metric

    def _renamed(self, name: str) -> str:
        return self._new + name.removeprefix(self._old)
