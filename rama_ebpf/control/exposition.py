"""Serving metrics over HTTP, for Prometheus to scrape."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import socket
import stat
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO, Annotated

import msgspec
from msgspec import Meta
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from ..core.interpreter import module_command
from ..kernel.denials import DenialCounts
from ..kernel.privileges import UserIds
from ..kernel.suspended import is_stopped
from ..metrics.directory import ENDED, MetricsDirectory
from ..metrics.files import MAX_FILES, FilesSum
from ..metrics.handover import FILES_AT_ONCE, OWN, PACKET_BYTES
from ..process import Supervisor, WorkerObserver, WorkerProcess

__all__ = [
    "MetricsFiles",
    "MetricsServer",
    "denials_collector",
    "disagreements_collector",
    "feeds_collector",
    "guard_collector",
    "silent_rejects_collector",
    "supervisor_collector",
    "verdict_collector",
    "ways_collector",
]

log = logging.getLogger("rama_ebpf.metrics")

_LOOK_SECONDS = 0.25
_LOOKS_STOPPED = 3
_SILENT_SECONDS = 30.0
"""It is heard each 5 s; on a busy host later."""

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


def feeds_collector(rows: Callable[[], Iterable[Mapping[str, object]]]) -> Collector:
    """Collect ``rama_feed_networks``, ``rama_feed_age_seconds`` and ``rama_feed_trouble`` from a function that returns
    what is known of each feed in force."""

    def collect() -> Iterable[Metric]:
        networks = GaugeMetricFamily("rama_feed_networks", "Networks of a feed that are in force.", labels=("rule",))
        text = "How old the last good copy of a feed is."
        age = GaugeMetricFamily("rama_feed_age_seconds", text, labels=("rule",))
        text = "Whether a feed could not be had, or not be used, when it was read last."
        trouble = GaugeMetricFamily("rama_feed_trouble", text, labels=("rule",))
        for row in rows():
            labels = (str(row["rule"]),)
            networks.add_metric(labels, float(str(row["networks"])))
            if row["age"] is not None:
                age.add_metric(labels, float(str(row["age"])))
            trouble.add_metric(labels, float(row["trouble"] is not None))
        yield from (networks, age, trouble)

    return _Collector(collect)


def disagreements_collector(total: Callable[[], int]) -> Collector:
    """Collect ``rama_ebpf_gate_disagreements_total`` from a function that returns it."""

    def collect() -> Iterable[Metric]:
        text = "Times that the policy in the kernel was not what it was to be."
        yield CounterMetricFamily("rama_ebpf_gate_disagreements", text, value=total())

    return _Collector(collect)


def denials_collector(denials: DenialCounts) -> Collector:
    """Collect ``rama_ebpf_sandbox_denials_total``."""

    def collect() -> Iterable[Metric]:
        text = "System calls that a sandbox refused."
        family = CounterMetricFamily("rama_ebpf_sandbox_denials", text, labels=("role", "call"))
        for labels, count in sorted(denials.counts().items()):
            family.add_metric(labels, count)
        yield family

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


def ways_collector(states: Callable[[], Mapping[str, bool]]) -> Collector:
    """Collect which ways out are up, of 500 at most."""

    def collect() -> Iterable[Metric]:
        family = GaugeMetricFamily("rama_way_up", "1 if a way of the configuration is up.", labels=("way",))
        for name, is_up in itertools.islice(states().items(), 500):
            family.add_metric((name,), is_up)
        yield family

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


class _Request(msgspec.Struct, forbid_unknown_fields=True):
    ask: bool
    added: Annotated[list[Annotated[str, Meta(max_length=255)]], Meta(max_length=MAX_FILES)]
    listener: Annotated[int, Meta(ge=0, le=2**20)] | None = None
    alive: bool = False


class MetricsServer:
    """Has ``/metrics`` served on ``listener``: what the workers write to ``directory``, and what ``collectors`` add.
    And ``/ready``: 200, or 503 with a line for each thing that ``unready`` names.

    That is done by a child (:mod:`.metrics_child`), which becomes ``user``; ``adopt`` is told its process id, and
    ``denials`` counts what its sandbox refuses. Here files are only opened, and requests have a schema.
    """

    def __init__(
        self,
        listener: socket.socket,
        directory: MetricsDirectory,
        collectors: Iterable[Collector],
        unready: Callable[[], Mapping[str, str]],
        *,
        user: UserIds | None = None,
        adopt: Callable[[int], None] = lambda pid: None,
        denials: DenialCounts | None = None,
    ) -> None:
        self._denials = denials
        self._listener = listener
        self._directory = directory.path
        self._collectors = tuple(collectors)
        self._unready = unready
        self._user = user
        self._adopt = adopt
        self._files = FilesSum()  # for what it says of those that cannot be opened
        self._offered: set[str] = set()

    async def run(self) -> None:
        """Serve until cancelled. Raises RuntimeError when the child ends, or asks for what it may not."""
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        readable = asyncio.Event()
        process: subprocess.Popen[bytes] | None = None
        with ours:
            with theirs:
                process = self._spawn(theirs)
            try:
                ours.setblocking(False)
                self._adopt(process.pid)
                loop.add_reader(ours.fileno(), readable.set)
                heard, stopped = loop.time(), 0
                while True:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(_LOOK_SECONDS):
                            await readable.wait()
                            heard = loop.time()
                    readable.clear()
                    stopped = stopped + 1 if is_stopped(process.pid) else 0
                    if stopped >= _LOOKS_STOPPED or loop.time() - heard > _SILENT_SECONDS:
                        raise RuntimeError("the process that serves metrics is stopped, or hangs")
                    with contextlib.suppress(BlockingIOError):
                        while data := ours.recv(PACKET_BYTES):
                            await asyncio.to_thread(self._answer, ours, data, process.pid)
                        raise RuntimeError("the process that serves metrics has ended")
            finally:
                loop.remove_reader(ours.fileno())
                process.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(1)

    @property
    def listener(self) -> socket.socket:
        """The listening socket."""
        return self._listener

    def stop(self) -> None:
        """Close the listening socket."""
        self._listener.close()

    def _spawn(self, channel: socket.socket) -> subprocess.Popen[bytes]:
        user = self._user or UserIds(0, 0)
        fds = channel.fileno(), self._listener.fileno()
        return subprocess.Popen(
            module_command("rama_ebpf.control.metrics_child", *map(str, (*fds, user.uid, user.gid, os.getpid()))),
            stdin=subprocess.DEVNULL,
            pass_fds=fds,
            process_group=0,  # a terminal's Ctrl-C is for us alone
        )

    def _answer(self, channel: socket.socket, data: bytes, pid: int) -> None:
        """In a thread: remove what was added up, and pass what is to be. Raises RuntimeError."""
        try:
            request = msgspec.json.decode(data, type=_Request)
        except msgspec.DecodeError as error:
            raise RuntimeError(f"the process that serves metrics breaks its protocol: {error}") from error
        if request.alive:
            return
        if request.listener is not None and self._denials is not None:
            try:
                self._denials.follow("metrics", pid, request.listener)
            except OSError as error:
                log.warning("what the sandbox of the process that serves metrics refuses is not counted: %s", error)
        for name in self._offered.intersection(request.added):
            with contextlib.suppress(OSError):  # a directory, which stays until the end
                self._directory.joinpath(name).unlink()
        with contextlib.ExitStack() as held:
            files: list[tuple[str, int]] = []
            if request.ask:
                files.append((OWN, held.enter_context(self._own()).fileno()))
                files += self._opened(held)
                self._offered = {name for name, _ in files if ENDED in name}
            for at in range(0, max(1, len(files)), FILES_AT_ONCE):
                some = files[at : at + FILES_AT_ONCE]
                message = {"names": [name for name, _ in some], "last": at + FILES_AT_ONCE >= len(files)}
                try:
                    socket.send_fds(channel, [json.dumps(message).encode()], [fd for _, fd in some])
                except OSError as error:
                    raise RuntimeError(f"the process that serves metrics does not listen: {error}") from error

    @contextlib.contextmanager
    def _own(self) -> Iterator[IO[bytes]]:
        metrics = [
            (
                metric.name,
                metric.documentation,
                metric.type,
                [(row.name, row.labels, row.value) for row in metric.samples],
            )
            for collector in self._collectors
            for metric in collector.collect()
        ]
        with open(os.memfd_create("metrics", os.MFD_CLOEXEC), "w+b") as file:
            file.write(json.dumps({"metrics": metrics, "unready": dict(self._unready())}).encode())
            file.flush()
            yield file

    def _opened(self, held: contextlib.ExitStack) -> Iterator[tuple[str, int]]:
        for path in itertools.islice(sorted(self._directory.iterdir()), MAX_FILES):
            try:
                fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
                held.callback(os.close, fd)
                if not stat.S_ISREG(os.fstat(fd).st_mode):
                    raise ValueError("it is no regular file")
            except FileNotFoundError:
                continue  # of a worker that has ended
            except (OSError, ValueError) as error:
                self._files.complain(path.name, error)
                continue
            yield path.name, fd
