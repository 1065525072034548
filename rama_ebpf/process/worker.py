"""A worker: loads the application, gives up its privileges, serves.

Started as ``python -m rama_ebpf.process.worker FD`` by the supervisor; FD is its end of the channel, whose first line
says everything else.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Final, cast

from ..core.errors import PeerClosed, RamaError
from ..core.event_loop import run_loop
from ..core.json_lines import JsonFormatter
from ..core.log_lines import LineHandler, SecondFormatter
from ..kernel.confine import Confinement
from ..kernel.privileges import UserIds, die_with_parent, drop_privileges, give_up_capabilities, raise_descriptor_limit
from ..metrics.directory import ENVIRONMENT as METRICS_ENVIRONMENT
from ..metrics.directory import open_files, use_identity
from ..services.resolver import DnsResolver
from ..services.tcp import TcpServer
from .channel import Channel, receive_line, send_line
from .context import Application, WorkerContext, load_application
from .sandbox import Sandbox, enter
from .shared import SharedTable

__all__ = ["main"]

log = logging.getLogger("rama_ebpf.worker")

_HEARTBEAT_SECONDS: Final = 0.5

# What the standard library imports only when it is needed: after the change of user the files may be out of reach,
# where the package is installed under a home directory.
_MOST_WAYS: Final = 500
"""How many ways are told apart in metrics."""
_LAZY_IMPORTS: Final = ("encodings.idna", "stringprep", "unicodedata", "concurrent.futures.thread", "traceback")


def main() -> int:
    """Serve until the supervisor says otherwise; return the exit code."""
    channel = socket.socket(fileno=int(sys.argv[1]))
    channel.set_inheritable(False)
    # The terminal sends these to every process of the group, the last one to who writes from the background; only the
    # supervisor acts on them.
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTSTP, signal.SIGTTOU):
        signal.signal(number, signal.SIG_IGN)
    try:
        order = cast("Mapping[str, Any]", receive_line(channel))
    except PeerClosed:
        return 0
    handler = LineHandler(sys.stderr)
    if order["log_format"] == "json":
        handler.setFormatter(JsonFormatter({"worker": order["worker"]}))
    else:
        text = f"%(asctime)s %(levelname)s worker {order['worker']} %(name)s: %(message)s"
        handler.setFormatter(SecondFormatter(text))
    logging.basicConfig(level=str(order["log_level"]).upper(), handlers=[handler])
    try:
        worker = _Worker(order)
        worker.prepare()
    except Exception as error:  # an application may fail to load in any way; the supervisor tells it
        if isinstance(error, (RamaError, OSError)):
            text = str(error)
        else:
            text = f"{type(error).__name__}: {error} (the worker's log has the traceback)"
            log.exception("cannot load %s", order["target"])
        with contextlib.suppress(OSError):  # the supervisor has gone as well: nobody is left to tell
            send_line(channel, {"topic": "failed", "body": {"text": text}})
        return 1
    # What is there now stays. A full collection that walks it takes 10 ms and more, in which all clients wait.
    gc.collect()
    gc.freeze()
    return run_loop(worker.run(channel))


class _Worker:
    def __init__(self, order: Mapping[str, Any]) -> None:
        self._order = order
        self._channel = Channel()
        self._servers: list[TcpServer] = []
        self._stop: asyncio.Event | None = None
        self._cutting: asyncio.Event | None = None
        self._kept: frozenset[str] = frozenset()
        self._linger_seconds = self._drain_seconds = 0.0
        observe = _lookup_observer()
        self._context = WorkerContext(
            worker=order["worker"],
            workers=order["workers"],
            params=order["params"],
            secret=bytes.fromhex(order["secret"]),
            shared=_shared_table(order),
            listeners={row["name"]: tuple(index for index, _ in row["sockets"]) for row in order["listeners"]},
            fds=order["fds"],
            channel=self._channel,
            resolver=DnsResolver(observe=observe),
            observe_lookups=observe,
            observe_refusal=_refusal_observer(),
            observe_check=_check_observer(),
            observe_way=_way_observer(),
        )
        self._application: Application | None = None
        self._confinement: Confinement | None = None

    def prepare(self) -> None:
        """Do what needs privileges, then give them up."""
        raise_descriptor_limit()
        use_identity(self._order["identity"])
        open_files(self._context.listeners)
        for name in _LAZY_IMPORTS:
            importlib.import_module(name)
        for fd in (*self._context.fds.values(), *self._order["held"], self._order["shared"][0]):
            os.set_inheritable(fd, False)
        self._application = load_application(self._order["target"], self._order["directory"], self._context)
        missing = self._context.listeners.keys() - self._application.services.keys()
        if missing:
            raise RamaError(f"{self._order['target']} makes no service for the listener {', '.join(sorted(missing))}")
        if self._order["user"] is not None:
            drop_privileges(UserIds(*self._order["user"]))
        else:
            give_up_capabilities()
        die_with_parent()
        self._confinement = enter(Sandbox(self._order["sandbox"]), self._order["read"], self._order["write"])
        if not self._confinement.seccomp:
            for fd in self._order["held"]:  # with these, and all system calls, whoever takes us over opens the gate
                os.close(fd)

    async def run(self, channel: socket.socket) -> int:
        assert self._application is not None
        application = self._application
        self._stop = asyncio.Event()
        self._cutting = asyncio.Event()
        self._channel.on("open", self._open)
        self._channel.on("pause", self._pause)
        self._channel.on("drain", self._drain)
        self._channel.on("cut", self._cut)
        await self._channel.open(channel)
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, self._stop.set)
        application.start()
        for row in self._order["listeners"]:
            for _, fd in row["sockets"]:
                self._servers.append(self._server(row["name"], socket.socket(fileno=fd), application))
        background = {asyncio.create_task(self._listen()), asyncio.create_task(self._heartbeat())}
        assert self._confinement is not None
        told = {name: getattr(self._confinement, name) for name in ("seccomp", "landlock", "listener")}
        self._channel.notify("ready", told)
        await self._stop.wait()
        await self._close_listeners()
        application.drain()
        started = time.monotonic()
        cut = sum(await asyncio.gather(*(server.drain(self._drain_seconds) for server in self._servers)))
        self._channel.notify("drained", {"cut": cut, "seconds": time.monotonic() - started})
        application.close()
        self._context.resolver.close()
        for task in background:
            task.cancel()
        await asyncio.gather(*background, return_exceptions=True)
        await self._channel.close()
        return 0

    async def _close_listeners(self) -> None:
        """Close them when the time to linger is over. Closed, not only left alone: or else clients would still be let
        into a queue that nobody serves."""
        assert self._cutting is not None
        for server in self._servers:
            if server.name in self._kept:  # its queue is served by those who come after us
                server.stop_accepting()
        self._channel.notify("released")
        if self._linger_seconds:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._cutting.wait(), self._linger_seconds)
        for server in self._servers:
            server.accept_waiting()
            server.stop_accepting()
            server.listener.close()
        assert self._confinement is not None
        if self._confinement.seccomp:
            for fd in self._order["held"]:  # those who listen hold the gate, and we no longer do
                os.close(fd)
        self._channel.notify("draining")

    def _open(self, _body: Mapping[str, object]) -> None:
        """The revision that we belong to is in force."""
        assert self._stop is not None
        assert self._confinement is not None
        if self._confinement.listener is not None:
            # The server has it. Who had it here, and the ioctl(2) for it, could allow himself what is refused.
            os.close(self._confinement.listener)
            self._confinement = replace(self._confinement, listener=None)
        if not self._stop.is_set():
            for server in self._servers:
                server.start()

    def _pause(self, _body: Mapping[str, object]) -> None:
        """Serve what waits, and accept no more until told to open again: the queues may become another server's."""
        for server in self._servers:
            server.accept_waiting()
            server.stop_accepting()

    def _server(self, name: str, listener: socket.socket, application: Application) -> TcpServer:
        listener.set_inheritable(False)
        listener.setblocking(False)
        on_accept = application.on_accept
        return TcpServer(
            listener,
            application.services[name],
            on_accept=None if on_accept is None else lambda: on_accept(name),
            on_pause=_pause_counter(name),
            name=name,
        )

    def _drain(self, body: Mapping[str, object]) -> None:
        assert self._stop is not None
        if not self._stop.is_set():
            self._linger_seconds = float(cast("float", body["linger"]))
            self._kept = frozenset(cast("list[str]", body["kept"]))
        self._drain_seconds = float(cast("float", body["seconds"]))
        self._stop.set()

    def _cut(self, _body: Mapping[str, object]) -> None:
        assert self._stop is not None
        assert self._cutting is not None
        self._linger_seconds = self._drain_seconds = 0.0
        self._cutting.set()
        self._stop.set()
        assert self._application is not None
        self._application.drain()  # what goes on without us is not cut
        for server in self._servers:
            server.cut("shutdown")

    async def _listen(self) -> None:
        await self._channel.run()
        # The supervisor has gone, and with it the gate that it holds: serving on would serve unguarded.
        log.error("the supervisor has ended: stopping at once")
        os._exit(1)

    async def _heartbeat(self) -> None:
        while True:
            self._channel.notify("alive")
            await asyncio.sleep(_HEARTBEAT_SECONDS)


def _shared_table(order: Mapping[str, Any]) -> SharedTable:
    fd, columns, own = order["shared"]
    return SharedTable(fd, columns, own, bytes.fromhex(order["secret"]))


def _pause_counter(listener: str) -> Callable[[], None] | None:
    if METRICS_ENVIRONMENT not in os.environ:
        return None
    from ..metrics.definitions import ACCEPT_PAUSES  # see there why so late

    return ACCEPT_PAUSES.labels(listener).inc


def _lookup_observer() -> Callable[[str, float], None] | None:
    if METRICS_ENVIRONMENT not in os.environ:
        return None

    def observe(outcome: str, seconds: float) -> None:
        from ..metrics.definitions import LOOKUP_SECONDS, LOOKUPS  # see there why so late

        LOOKUPS.labels(outcome).inc()
        if outcome != "cached":
            LOOKUP_SECONDS.observe(seconds)

    return observe


def _refusal_observer() -> Callable[[str], None] | None:
    if METRICS_ENVIRONMENT not in os.environ:
        return None

    def observe(held: str) -> None:
        from ..metrics.definitions import SOURCE_REFUSALS  # see there why so late

        SOURCE_REFUSALS.labels(held.removeprefix("source_")).inc()

    return observe


def _check_observer() -> Callable[[str], None] | None:
    if METRICS_ENVIRONMENT not in os.environ:
        return None

    def observe(outcome: str) -> None:
        from ..metrics.definitions import PASSWORD_CHECKS  # see there why so late

        PASSWORD_CHECKS.labels(outcome).inc()

    return observe


def _way_observer() -> Callable[[str, str], None] | None:
    if METRICS_ENVIRONMENT not in os.environ:
        return None
    ways: set[str] = set()

    def observe(way: str, outcome: str) -> None:
        from ..metrics.definitions import WAY_ATTEMPTS  # see there why so late

        if way not in ways and len(ways) >= _MOST_WAYS:
            way = "other"
        ways.add(way)
        WAY_ATTEMPTS.labels(way, outcome).inc()

    return observe


if __name__ == "__main__":
    sys.exit(main())
