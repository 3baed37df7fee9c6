"""Every metric of the server as it is documented, for tests of what uses their names."""

from prometheus_client.core import Metric

from server.finetune.metrics import TrainingMetrics
from server.metrics import PREFIX, Metrics

_PARTS = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum")}


def documented() -> list[Metric]:
    """Our own metrics, those of fine-tuning among them."""
    metrics = Metrics()
    TrainingMetrics(metrics.registry)
    return [metric for metric in metrics.registry.collect() if metric.name.startswith(PREFIX)]


def series_names(metric: Metric) -> list[str]:
    """Names under which Prometheus stores it."""
    return [metric.name + part for part in _PARTS.get(metric.type, ("",))]
