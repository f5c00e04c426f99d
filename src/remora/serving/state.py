"""What the routes share, and what is counted for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import prometheus_client
from prometheus_client.core import GaugeMetricFamily

from remora.config import ServeConfig
from remora.serving.engine import Batch, Engine


class Metrics:
    """What is counted, in Prometheus' format."""

    def __init__(self) -> None:
        self._registry = prometheus_client.CollectorRegistry()
        kwargs: dict[str, Any] = {"registry": self._registry}
        self.requests = prometheus_client.Counter(
            "remora_requests", "Requests answered.", ["route", "status"], **kwargs
        )
        self.seconds = prometheus_client.Histogram(
            "remora_request_seconds", "Time from headers to answer.", ["route"], **kwargs
        )
        self.texts = prometheus_client.Counter(
            "remora_texts", "Texts classified.", ["adapter"], **kwargs
        )
        self.batch_requests = prometheus_client.Histogram(
            "remora_batch_requests",
            "Requests computed together.",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            **kwargs,
        )
        self.batch_seconds = prometheus_client.Histogram(
            "remora_batch_seconds", "Time to compute a batch.", **kwargs
        )
        self.reloads = prometheus_client.Counter(
            "remora_reloads", "Adapters read again.", ["adapter", "result"], **kwargs
        )
        prometheus_client.ProcessCollector(registry=self._registry)

    def watch(self, engine: Engine) -> None:
        """Read the queue and the generations whenever metrics are asked for."""
        metrics = self

        class _State:
            def collect(self) -> Iterator[GaugeMetricFamily]:
                yield GaugeMetricFamily(
                    "remora_queue_texts", "Texts that wait.", value=engine.num_waiting
                )
                info = GaugeMetricFamily(
                    "remora_adapter_info", "Adapters that are served.", labels=["adapter", "sha256"]
                )
                for name, generation in engine.generations.items():
                    info.add_metric([name, generation.sha256], 1)
                yield info

        metrics._registry.register(_State())

    def batch(self, batch: Batch) -> None:
        """Count a batch."""
        self.texts.labels(batch.adapter).inc(batch.num_texts)
        self.batch_requests.observe(batch.num_requests)
        self.batch_seconds.observe(batch.seconds)

    def write(self) -> bytes:
        """Return all figures as text."""
        return prometheus_client.generate_latest(self._registry)


@dataclass(kw_only=True)
class State:
    """What the routes have to do with, and what the process has to know of them."""

    config: ServeConfig
    token: bytes | None
    engine: Engine
    metrics: Metrics
    reload: Callable[[str], bool]
    is_draining: bool = False
    num_in_flight: int = field(default=0, init=False)
