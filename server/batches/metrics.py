"""Prometheus metrics of batches."""

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge

from server.batches.store import Status
from server.metrics import PREFIX


class BatchMetrics:
    """Batches by status, and their requests by outcome."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._batches = Gauge(f"{PREFIX}batches", "Batches", ["status"], registry=registry)
        text = "Requests of batches by how they ended: completed, failed, expired or cancelled"
        self._requests = Counter(f"{PREFIX}batch_requests", text, ["outcome"], registry=registry)

    def batches(self, counts: Mapping[Status, int]) -> None:
        """Set the number of batches in each status; call it before every scrape."""
        for status, count in counts.items():
            self._batches.labels(status).set(count)

    def ended(self, outcome: str) -> None:
        """Count a request that was answered, or will not be."""
        self._requests.labels(outcome).inc()
