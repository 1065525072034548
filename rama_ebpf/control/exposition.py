"""Serving metrics over HTTP, for Prometheus to scrape."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterable, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from ..core.service import stack
from ..layers.concurrency import ConcurrencyLimitLayer
from ..layers.timeout import TimeoutLayer
from ..metrics.directory import MetricsDirectory
from ..metrics.files import FilesCollector
from ..process import Supervisor, WorkerObserver, WorkerProcess
from ..services.http import Body, Headers, HttpServer, Request, Response
from ..services.tcp import TcpServer

__all__ = [
    "MetricsFiles",
    "MetricsServer",
    "disagreements_collector",
    "guard_collector",
    "silent_rejects_collector",
    "supervisor_collector",
    "verdict_collector",
]

Verdicts = Callable[[], Mapping[tuple[str, str, str], int]]


class _Collector(Collector):
    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self._collect = collect

    def collect(self) -> Iterable[Metric]:
        return self._collect()


def verdict_collector(verdicts: Verdicts) -> Collector:
    """Collect ``rama_verdicts_total`` from a function that returns counts by (stage, rule, action)."""

    def collect() -> Iterable[Metric]:
        family = CounterMetricFamily("rama_verdicts", "Verdicts on connections.", labels=("stage", "rule", "action"))
        for labels, count in verdicts().items():
            family.add_metric(labels, count)
        yield family

    return _Collector(collect)


def silent_rejects_collector(total: Callable[[], int]) -> Collector:
    """Collect ``rama_silent_rejects_total`` from a function that returns it."""

    def collect() -> Iterable[Metric]:
        yield CounterMetricFamily("rama_silent_rejects", "Rejected connections that got no RST.", value=total())

    return _Collector(collect)


def disagreements_collector(total: Callable[[], int]) -> Collector:
    """Collect ``rama_ebpf_gate_disagreements_total`` from a function that returns it."""

    def collect() -> Iterable[Metric]:
        text = "Times that the policy in the kernel was not what it was to be."
        yield CounterMetricFamily("rama_ebpf_gate_disagreements", text, value=total())

    return _Collector(collect)


def supervisor_collector(supervisor: Supervisor) -> Collector:
    """Collect how many workers serve, were replaced and were reloaded."""

    def collect() -> Iterable[Metric]:
        counts = supervisor.counts
        yield GaugeMetricFamily("rama_workers", "Workers that serve.", value=counts.serving)
        yield GaugeMetricFamily("rama_workers_expected", "Workers that are wanted.", value=counts.expected)
        yield CounterMetricFamily("rama_worker_restarts", "Workers that were replaced.", value=supervisor.restarts)
        yield CounterMetricFamily("rama_reloads", "Reloads that succeeded.", value=supervisor.reloads)
        failures = CounterMetricFamily("rama_failures", "Failures of the server's own work.", labels=("work",))
        for name, count in supervisor.nursery.failures.items():
            failures.add_metric((name,), count)
        yield failures

    return _Collector(collect)


def guard_collector(losses: Mapping[str, int], unready: Callable[[], Mapping[str, str]]) -> Collector:
    """Collect whether the server is ready, how much is wrong, and what the gate had lost, by hook."""

    def collect() -> Iterable[Metric]:
        problems = len(unready())
        yield GaugeMetricFamily("rama_ready", "1 if the server is ready and guarded.", value=not problems)
        yield GaugeMetricFamily("rama_gate_problems", "What keeps the gate from guarding.", value=problems)
        family = CounterMetricFamily("rama_gate_losses", "What the gate had lost and was put back.", labels=("hook",))
        for hook, count in dict(losses).items():
            family.add_metric((hook,), count)
        yield family

    return _Collector(collect)


class MetricsFiles(WorkerObserver):
    """Keeps the files of workers in order."""

    def __init__(self, directory: MetricsDirectory) -> None:
        self._directory = directory

    def ended(self, worker: WorkerProcess) -> None:
        self._directory.worker_exited(worker.identity)


class MetricsServer:
    """Serves ``/metrics`` on ``listener``: what the workers write to ``directory``, and what ``collectors`` add. And
    ``/ready``: 200, or 503 with a line for each thing that ``unready`` names."""

    def __init__(
        self,
        listener: socket.socket,
        directory: MetricsDirectory,
        collectors: Iterable[Collector],
        unready: Callable[[], Mapping[str, str]],
    ) -> None:
        self._unready = unready
        self._registry = CollectorRegistry()
        self._registry.register(FilesCollector(directory.path))
        for collector in collectors:
            self._registry.register(collector)
        # A scrape reads every worker's files: one at a time, so that a scraper gone wild does not become the load.
        # Connections are another matter: idle ones must not keep a scraper out.
        self._scraping = asyncio.Semaphore(1)
        service = stack(ConcurrencyLimitLayer(256), TimeoutLayer(None, idle=20, total=300), HttpServer(self._answer))
        self._server = TcpServer(listener, service)
        self._listener = listener

    def start(self) -> None:
        """Start to serve, on the running event loop."""
        self._server.start()

    async def stop(self) -> None:
        """Stop, and close the listening socket."""
        await self._server.drain(0)
        self._listener.close()

    async def _answer(self, request: Request) -> Response:
        path = request.path.partition("?")[0]
        if path not in ("/metrics", "/ready"):
            return Response.text(404, "metrics are at /metrics\n")
        if request.method not in ("GET", "HEAD"):
            return Response(405, Headers([("Allow", "GET, HEAD")]))
        if path == "/ready":
            lines = [f"{what}: {why}\n" for what, why in self._unready().items()]
            return Response.text(503, "".join(lines)) if lines else Response.text(200, "ready\n")
        encode, content_type = choose_encoder(request.headers.get("Accept") or "")
        async with self._scraping:
            text: bytes = await asyncio.to_thread(encode, self._registry)
        return Response(200, Headers([("Content-Type", content_type)]), Body.of(text))
