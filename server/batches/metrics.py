"""What batches count, in the server's registry."""

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge

from server.batches.store import Status
from server.metrics import PREFIX


class BatchMetrics:
    """Batches by status, and the ends of their requests."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._batches = Gauge(f"{PREFIX}batches", "Batches", ["status"], registry=registry)
        text = "Requests of batches by how they ended: completed, failed, expired or cancelled"
        self._requests = Counter(f"{PREFIX}batch_requests", text, ["outcome"], registry=registry)

    def batches(self, counts: Mapping[Status, int]) -> None:
        """How many batches are in each status, to be said before every scrape."""
        for status, count in counts.items():
            self._batches.labels(status).set(count)

    def ended(self, outcome: str) -> None:
        """A request has its answer, or will get none."""
        self._requests.labels(outcome).inc()
