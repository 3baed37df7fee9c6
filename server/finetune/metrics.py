"""Prometheus metrics of fine-tuning: jobs by status, progress, and use of the device."""

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.finetune.jobs import Status
from server.messages.training import TrainingStep
from server.metrics import PREFIX


class _Jobs(Collector):
    """Jobs by status, as last counted."""

    def __init__(self) -> None:
        self.counts: Mapping[Status, int] = {}

    def collect(self) -> Iterator[Metric]:
        family = GaugeMetricFamily(f"{PREFIX}finetune_jobs", "Fine-tuning jobs", labels=["status"])
        for status, count in self.counts.items():
            family.add_metric([status], count)
        yield family


class TrainingMetrics:
    """Counters over all jobs, and gauges of running jobs."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._jobs = _Jobs()
        registry.register(self._jobs)

        def counter(name: str, text: str) -> Counter:
            return Counter(f"{PREFIX}finetune_{name}", text, registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"{PREFIX}finetune_{name}", text, ["job"], registry=registry)

        self._steps = counter("steps", "Optimiser steps")
        self._tokens = counter("trained_tokens", "Tokens trained on")
        self._busy = counter("busy_seconds", "Device time spent on training")
        self._yielded = counter("yielded_seconds", "Time in which a running job left the device to requests")
        self._running = [
            (gauge("loss", "Training loss of the last step"), lambda step: step.metrics.train_loss),
            (gauge("learning_rate", "Learning rate of the last step"), lambda step: step.learning_rate),
            (gauge("gradient_norm", "Norm of the last step's gradient, before clipping"), lambda step: step.grad_norm),
            (
                gauge("device_share", "Share of the last step's time that training had the device"),
                lambda step: step.busy_seconds / step.seconds if step.seconds else 0.0,
            ),
        ]

    def jobs(self, counts: Mapping[Status, int]) -> None:
        """Set the number of jobs in each status; call it before every scrape."""
        self._jobs.counts = counts

    def step(self, step: TrainingStep, tokens: int) -> None:
        """Count an optimiser step over `tokens`."""
        self._steps.inc()
        self._tokens.inc(tokens)
        self._busy.inc(step.busy_seconds)
        self._yielded.inc(max(0.0, step.seconds - step.busy_seconds))
        for gauge, value in self._running:
            number = value(step)
            gauge.labels(step.id).set(float("nan") if number is None else number)

    def ended(self, job_id: str) -> None:
        """Remove the series of a job that no longer runs."""
        for gauge, _ in self._running:
            gauge.remove_by_labels({"job": job_id})
