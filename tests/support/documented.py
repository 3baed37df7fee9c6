"""Every documented metric of the server, for tests of files that use their names."""

from prometheus_client.core import Metric

from server.finetune.metrics import TrainingMetrics
from server.metrics import PREFIX, Metrics

_PARTS = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum")}


def documented() -> list[Metric]:
    """Our own metrics, including those of fine-tuning."""
    metrics = Metrics()
    TrainingMetrics(metrics.registry)
    return [metric for metric in metrics.registry.collect() if metric.name.startswith(PREFIX)]


def series_names(metric: Metric) -> list[str]:
    """Names of its series in Prometheus."""
    return [metric.name + part for part in _PARTS.get(metric.type, ("",))]
