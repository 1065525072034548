"""The child process that serves ``/metrics`` and ``/ready``: it parses what scrapers send and workers have written. So
it has no privileges, and a sandbox like theirs.

Started as ``python -m rama_ebpf.control.metrics_child CHANNEL LISTENER UID GID PARENT``. For each answer it asks the
server, over CHANNEL, for open files, which it could not open, and for what the server itself counts:
:mod:`..metrics.handover`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import mmap
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from ..core.event_loop import run_loop
from ..core.service import stack
from ..kernel.confine import NO_NETWORK, Confinement, confine
from ..kernel.privileges import UserIds, die_with_parent, drop_privileges, give_up_capabilities
from ..layers.concurrency import ConcurrencyLimitLayer
from ..layers.timeout import TimeoutLayer
from ..metrics.files import FilesSum
from ..metrics.handover import FILES_AT_ONCE, OWN, PACKET_BYTES
from ..services.http import Body, Headers, HttpServer, Request, Response
from ..services.tcp import TcpServer

__all__ = ["enter_sandbox"]

log = logging.getLogger("rama_ebpf.metrics")

_OWN_BYTES: Final = 64 * 1024 * 1024
_ANSWER_SECONDS: Final = 20.0
_ALIVE_SECONDS: Final = 5.0
_ALIVE: Final = json.dumps({"ask": False, "added": [], "alive": True}).encode()
_ADDRESS_BYTES: Final = 4 << 30  # most are reserved by threads and libraries, and never touched


class _Scraper:
    """Asks the server, and adds up. One at a time."""

    def __init__(self, channel: socket.socket) -> None:
        self.channel = channel
        self._files = FilesSum()
        self._lock = threading.Lock()

    def ask(self) -> tuple[Mapping[str, Any], list[Metric]]:
        """Return what the server says of itself, and the sums of all workers."""
        with self._lock:
            own: dict[str, Any] = {}
            files: list[tuple[str, int]] = []
            try:
                for name, fd in self._request(ask=True):
                    if name == OWN:
                        own = _read_json(fd)
                        os.close(fd)
                    else:
                        files.append((name, fd))
                metrics, added = self._files.add(files)
            finally:
                for _, fd in files:
                    os.close(fd)
            if added:
                list(self._request(ask=False, added=added))
            return own, metrics

    def _request(self, *, ask: bool, added: Sequence[str] = ()) -> Iterator[tuple[str, int]]:
        self.channel.send(json.dumps({"ask": ask, "added": list(added)}).encode())
        while True:
            data, fds, _, _ = socket.recv_fds(self.channel, PACKET_BYTES, FILES_AT_ONCE)
            if not data:
                os._exit(0)  # the server has ended
            message = json.loads(data)
            yield from zip(message["names"], fds, strict=True)
            if message["last"]:
                return


def _read_json(fd: int) -> dict[str, Any]:
    size = min(os.fstat(fd).st_size, _OWN_BYTES)
    with mmap.mmap(fd, size, prot=mmap.PROT_READ) as memory:
        found: dict[str, Any] = json.loads(memory[:])
    return found


class _Collected(Collector):
    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics


def _own_metrics(own: Mapping[str, Any]) -> Iterator[Metric]:
    for name, text, kind, samples in own["metrics"]:
        metric = Metric(name, text, kind)
        for sample, labels, value in samples:
            metric.add_sample(sample, labels, value)
        yield metric


class _Service:
    def __init__(self, scraper: _Scraper) -> None:
        self._scraper = scraper
        # One at a time, so that a scraper gone wild does not become the load. Connections are another matter: idle
        # ones must not keep a scraper out.
        self._scraping = asyncio.Semaphore(1)

    async def __call__(self, request: Request) -> Response:
        path = request.path.partition("?")[0]
        if path not in ("/metrics", "/ready"):
            return Response.text(404, "metrics are at /metrics\n")
        if request.method not in ("GET", "HEAD"):
            return Response(405, Headers([("Allow", "GET, HEAD")]))
        async with self._scraping:
            own, metrics = await asyncio.to_thread(self._scraper.ask)
        if path == "/ready":
            lines = [f"{what}: {why}\n" for what, why in own["unready"].items()]
            return Response.text(503, "".join(lines)) if lines else Response.text(200, "ready\n")
        encode, content_type = choose_encoder(request.headers.get("Accept") or "")
        registry = CollectorRegistry()
        registry.register(_Collected([*_own_metrics(own), *metrics]))
        text: bytes = await asyncio.to_thread(encode, registry)
        return Response(200, Headers([("Content-Type", content_type)]), Body.of(text))


async def _serve(listener: socket.socket, scraper: _Scraper) -> None:
    service = stack(ConcurrencyLimitLayer(256), TimeoutLayer(None, idle=20, total=300), HttpServer(_Service(scraper)))
    server = TcpServer(listener, service)
    server.start()
    while True:  # until it is killed
        await asyncio.sleep(_ALIVE_SECONDS)
        with contextlib.suppress(BlockingIOError):  # the server is stopped
            scraper.channel.send(_ALIVE, socket.MSG_DONTWAIT)


def enter_sandbox() -> Confinement:
    """Leave this process what serving on an open socket takes: no other files, no network. It has no privileges."""
    confinement = confine(closed=NO_NETWORK, listener=True)
    if confinement.missing:
        log.warning("no whole sandbox: %s", "; ".join(confinement.missing))
    return confinement


def main() -> None:
    channel, listener = (socket.socket(fileno=int(text)) for text in sys.argv[1:3])
    uid, gid, parent = map(int, sys.argv[3:6])
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTSTP, signal.SIGTTOU):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(
        level="INFO", format="%(asctime)s %(levelname)s metrics %(name)s: %(message)s", stream=sys.stderr
    )
    channel.settimeout(_ANSWER_SECONDS)
    listener.setblocking(False)
    for sock in (channel, listener):
        sock.set_inheritable(False)
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_BYTES, _ADDRESS_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if uid:
        drop_privileges(UserIds(uid, gid))
    else:
        give_up_capabilities()
    die_with_parent()
    if os.getppid() != parent:
        return  # it ended before we asked to be told
    confinement = enter_sandbox()
    if confinement.listener is not None:
        channel.send(json.dumps({"ask": False, "added": [], "listener": confinement.listener}).encode())
        channel.recv(PACKET_BYTES)  # the server has it
        os.close(confinement.listener)
    run_loop(_serve(listener, _Scraper(channel)))


if __name__ == "__main__":
    main()
