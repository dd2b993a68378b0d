"""What a replica measures, for Prometheus: by adapter, for a bounded number of them."""

from __future__ import annotations

import asyncio
import collections
import logging
import re
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from orchestrator.errors import RaypeftError

from ..engines.engine import Figures
from .metric_files import EVERY_S, MetricFiles, merged
from .replies import Usage

_log = logging.getLogger("ray.serve")

OTHER = "other"
"""The label of adapters beyond the bound, and of names that nothing here has."""
ENSEMBLE = "ensemble"
"""The label of all weighted sums of adapters: whoever asks makes up as many as he likes."""
MAX_ADAPTERS = 100
"""Adapters with series of their own."""

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_CREATED = re.compile(r"(# (HELP|TYPE) )?\w+_created[ {]")
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 150)
_GAPS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)


@dataclass
class Timing:
    """One request, from its arrival to the last byte."""

    route: str
    label: str | None = None
    """The adapter's label; None until it is known what answers."""
    tenant: str = ""
    usage: Usage = field(default_factory=Usage)
    began: float = field(default_factory=time.perf_counter)
    first: float | None = None
    """When the first token came."""
    broke: int | None = None
    """The status that a stream would have had, had it not begun with 200."""

    def token(self, num_tokens: int) -> None:
        """So many tokens of the answer came."""
        self.usage.completion_tokens += num_tokens
        if self.first is None and num_tokens:
            self.first = time.perf_counter()


class Metrics:
    """The series of one replica.

    Args:
        replica: its id, a label of every series: what one proxy serves for several replicas stays apart.
        figures: what the engine does just now.
        served: the adapters that the endpoint serves; series of others are dropped.
        files: where replicas find one another's series; None: each shows its own.
    """

    def __init__(
        self,
        replica: str = "",
        figures: Callable[[], Figures] = Figures,
        served: Callable[[], Collection[str]] | None = None,
        max_adapters: int = MAX_ADAPTERS,
        files: MetricFiles | None = None,
        num_replicas: Callable[[], int] = lambda: 1,
    ) -> None:
        self._files, self._num_replicas = files, num_replicas
        self._replica, self._served, self._max_adapters = replica, served, max_adapters
        self._labels: set[str] = set()
        self._under_way: collections.Counter[str] = collections.Counter()
        self._tenants: set[str] = set()
        self.registry = CollectorRegistry()
        by_adapter = ["replica", "adapter"]
        self._requests = Counter(
            "raypeft_requests",
            "Requests that ended.",
            [*by_adapter, "route", "status"],
            registry=self.registry,
        )
        self._prompt = Counter(
            "raypeft_prompt_tokens", "Tokens of prompts.", by_adapter, registry=self.registry
        )
        self._completion = Counter(
            "raypeft_completion_tokens", "Tokens of answers.", by_adapter, registry=self.registry
        )
        self._seconds = Histogram(
            "raypeft_request_seconds",
            "From arrival to the last byte.",
            by_adapter,
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._first = Histogram(
            "raypeft_first_token_seconds",
            "From arrival to the first token.",
            by_adapter,
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._gap = Histogram(
            "raypeft_token_seconds",
            "Between two tokens of one answer, on average over the answer.",
            by_adapter,
            buckets=_GAPS,
            registry=self.registry,
        )
        self._running = Gauge(
            "raypeft_requests_running", "Requests under way or waiting.", by_adapter, registry=self.registry
        )
        self._tenant_tokens = Counter(
            "raypeft_tenant_tokens",
            "Tokens of prompts and answers.",
            ["replica", "tenant"],
            registry=self.registry,
        )
        self._tenant_refused = Counter(
            "raypeft_tenant_refused",
            "Requests beyond a rate, a budget or a queue.",
            ["replica", "tenant"],
            registry=self.registry,
        )
        self.registry.register(_EngineFigures(replica, figures))

    @property
    def replica(self) -> str:
        """Its id; "" where it has none."""
        return self._replica

    def begin(self, timing: Timing, adapter: str) -> None:
        """An adapter answers from now on, until `end`."""
        timing.label = self._label(adapter)
        self._under_way[timing.label] += 1
        self._running.labels(self._replica, timing.label).inc()

    def end(self, timing: Timing, status: int) -> None:
        """A request is over.

        Args:
            status: the HTTP status; 499 where the client hung up.
        """
        label = timing.label
        adapter = OTHER if label is None else label
        status = timing.broke or status
        self._requests.labels(self._replica, adapter, timing.route, str(status)).inc()
        if timing.tenant:
            tenant = self._tenant(timing.tenant)
            if status == 429:
                self._tenant_refused.labels(self._replica, tenant).inc()
            spent = timing.usage.prompt_tokens + timing.usage.completion_tokens
            if label is not None:
                self._tenant_tokens.labels(self._replica, tenant).inc(spent)
        if label is None:
            return
        mine = (self._replica, label)
        self._under_way[label] -= 1
        self._running.labels(*mine).dec()
        self._prompt.labels(*mine).inc(timing.usage.prompt_tokens)
        self._completion.labels(*mine).inc(timing.usage.completion_tokens)
        now = time.perf_counter()
        if status == 200:
            self._seconds.labels(*mine).observe(now - timing.began)
        if timing.first is not None:
            self._first.labels(*mine).observe(timing.first - timing.began)
            if status == 200 and timing.usage.completion_tokens > 1:
                self._gap.labels(*mine).observe((now - timing.first) / (timing.usage.completion_tokens - 1))

    def text(self) -> str:
        """All series, as Prometheus reads them."""
        self._forget()
        lines = generate_latest(self.registry).decode().splitlines(keepends=True)
        # When each counter was made says nothing here, and would be a third of all series.
        return "".join(line for line in lines if not _CREATED.match(line))

    async def whole_text(self) -> str:
        """Those of all replicas."""
        if self._files is None or self._num_replicas() < 2:
            return self.text()
        try:
            return merged([self.text(), *await asyncio.to_thread(self._files.others)])
        except (RaypeftError, OSError) as error:
            _log.warning("metrics of other replicas not read: %s", error)
            return self.text()

    async def share(self) -> None:
        """Writes the series down for other replicas to show, for as long as this one runs."""
        if self._files is None:
            return
        try:
            while True:
                if self._num_replicas() > 1:
                    try:
                        await asyncio.to_thread(self._files.write, self.text())
                    except (RaypeftError, OSError) as error:
                        _log.warning("metrics not written down: %s", error)
                await asyncio.sleep(EVERY_S)
        finally:
            with suppress(RaypeftError, OSError):
                self._files.remove()

    def _label(self, adapter: str) -> str:
        if ":" in adapter:
            return ENSEMBLE
        if adapter not in self._labels:
            if len(self._labels) >= self._max_adapters:
                self._forget()
            if len(self._labels) >= self._max_adapters:
                return OTHER
            self._labels.add(adapter)
        return adapter

    def _tenant(self, tenant: str) -> str:
        if tenant not in self._tenants and len(self._tenants) >= self._max_adapters:
            return OTHER
        self._tenants.add(tenant)
        return tenant

    def _forget(self) -> None:
        """Drops the series of adapters that are served no more and answer nothing."""
        if self._served is None:
            return
        served = frozenset(self._served())
        for label in self._labels - served:
            mine = {"replica": self._replica, "adapter": label}
            if self._under_way[label] > 0:
                continue
            self._labels.discard(label)
            for metric in (
                self._requests, self._prompt, self._completion, self._seconds, self._first, self._gap, self._running
            ):  # fmt: skip
                metric.remove_by_labels(mine)


class _EngineFigures(Collector):
    """The engine's figures, read when somebody looks."""

    def __init__(self, replica: str, figures: Callable[[], Figures]) -> None:
        self._replica, self._figures = replica, figures

    def collect(self) -> Iterator[Metric]:
        """The metrics of the engine."""
        now = self._figures()
        for name, text, value in (
            ("batch_running", "Sequences of the batch.", now.running),
            ("batch_waiting", "Sequences that wait for a place in the batch.", now.waiting),
            ("batch_places", "Places of the batch.", now.max_running),
            ("batch_occupancy", "Share of the batch's places that are taken.", now.running / max(1, now.max_running)),
            ("adapters_loaded", "Adapters that are loaded.", now.loaded),
            ("adapter_slots", "Adapters that can be loaded at once; 0: no bound.", now.slots),
        ):  # fmt: skip
            gauge = GaugeMetricFamily(f"raypeft_{name}", text, labels=["replica"])
            gauge.add_metric([self._replica], value)
            yield gauge
        for name, text, value in (
            ("engine_prompt_tokens", "Tokens of all prompts that the engine took.", now.prompt_tokens),
            ("prefix_cache_hit_tokens", "Those of them that the prefix cache had.", now.cached_tokens),
        ):
            counter = CounterMetricFamily(f"raypeft_{name}", text, labels=["replica"])
            counter.add_metric([self._replica], value)
            yield counter
