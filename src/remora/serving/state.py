"""The state that all requests share, and the metrics for Prometheus."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import prometheus_client
from prometheus_client.core import GaugeMetricFamily

from remora.config import ServeConfig
from remora.serving.engine import Batch, Engine


class Metrics:
    """Counters and histograms in Prometheus' format."""

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
        # Of the process itself, from /proc: it gives no figures where there is none.
        prometheus_client.ProcessCollector(registry=self._registry)

    def watch(self, engine: Engine) -> None:
        """Read the engine's queue and generations whenever metrics are asked for."""
        self._registry.register(_EngineCollector(engine))

    def batch(self, batch: Batch) -> None:
        """Count a batch."""
        self.texts.labels(batch.adapter).inc(batch.num_texts)
        self.batch_requests.observe(batch.num_requests)
        self.batch_seconds.observe(batch.seconds)

    def write(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return prometheus_client.generate_latest(self._registry)


class _EngineCollector:
    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[GaugeMetricFamily]:
        yield GaugeMetricFamily(
            "remora_queue_texts", "Texts that wait.", value=self._engine.num_waiting
        )
        info = GaugeMetricFamily(
            "remora_adapter_info", "Adapters that are served.", labels=["adapter", "sha256"]
        )
        for name, generation in self._engine.generations.items():
            info.add_metric([name, generation.sha256], 1)
        yield info


@dataclass(kw_only=True)
class State:
    """The state that all requests share."""

    config: ServeConfig
    token: bytes | None
    engine: Engine
    metrics: Metrics
    reload: Callable[[str], bool]  # an adapter's folder; whether there was something new
    reloading: asyncio.Lock = field(default_factory=asyncio.Lock)
    is_draining: bool = False
    num_in_flight: int = field(default=0, init=False)
