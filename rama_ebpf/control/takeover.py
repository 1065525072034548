"""Following another server: what this one does from its start until what it was handed is its own.

docs/upgrade.md has the order. The other side of it is :mod:`.incumbent`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from ..core.address import SocketAddress
from ..kernel.instance import Instance, ServerLock
from ..process import Nursery
from ..services.tcp import bind_tcp
from .incumbent import Parts, ServedIncumbent
from .predecessor import Predecessor
from .succession import Estate

__all__ = ["Inherited", "TakeOver", "lock_and_estate"]

log = logging.getLogger("rama_ebpf")

_ALONE_SECONDS: Final = 5.0
_WORKERS_SECONDS: Final = 8.0
_PROBATION_SECONDS: Final = 5.0
"""For how long a server has to serve before the one before it lets go."""


@dataclass(frozen=True, slots=True)
class Inherited:
    """What is taken over, and from whom."""

    predecessor: Predecessor
    estate: Estate

    @property
    def facts(self) -> Mapping[str, Any]:
        """Counters that go on, and other plain things."""
        return self.estate.facts

    def metrics_listener(self, address: SocketAddress) -> socket.socket:
        """Where metrics are served: on the socket of the server before, if it had that address, too."""
        handed = self.estate.metrics
        if handed is None or SocketAddress.from_sockaddr(handed.getsockname()) != address:
            return bind_tcp(str(address.ip), address.port)
        self.estate.take("metrics")
        return handed


@contextlib.contextmanager
def lock_and_estate(instance: Instance, predecessor: Predecessor | None) -> Iterator[tuple[ServerLock, Estate | None]]:
    """Have the instance's lock, and what is handed over by who had it before. Raises
    :class:`~rama_ebpf.kernel.instance.InstanceBusy`, :class:`~.succession.UpgradeFailed`,
    :class:`~rama_ebpf.core.errors.PeerClosed` or OSError."""
    if predecessor is None:
        with ServerLock(instance, create=True) as lock:
            yield lock, None
        return
    estate = predecessor.estate(instance)
    with contextlib.closing(estate):
        estate.take("lock")
        with contextlib.closing(ServerLock.adopt(instance, estate.lock)) as lock:
            predecessor.at("programs")
            yield lock, estate


class TakeOver:
    """Takes over what ``inherited`` names, for the server that consists of ``parts``."""

    def __init__(self, inherited: Inherited, parts: Parts, incumbent: ServedIncumbent, nursery: Nursery) -> None:
        self._predecessor, self._estate = inherited.predecessor, inherited.estate
        self._parts = parts
        self._incumbent = incumbent
        self._nursery = nursery
        self._closed = asyncio.Event()
        """Set when no earlier server listens any more."""

    def serve(self) -> None:
        """We serve now, and speak for the instance. It is ours when the server before has let go of it."""
        predecessor, estate, parts = self._predecessor, self._estate, self._parts
        parts.lock.name_us()
        self._incumbent.serves = True
        estate.take("control")
        estate.take("seniors")
        self._nursery.start("taking over the control socket", parts.control().start(estate.control))
        parts.guard.losses.update(estate.facts.get("losses", {}))
        parts.seniors.add(estate.seniors)
        parts.seniors.add(
            [predecessor.follow(str(estate.facts.get("own_series", "")))], self._inherit, on_abort=_end_aborted
        )
        parts.duties.start()
        parts.host.store.keep()
        predecessor.channel.tell(serving=True, metrics=parts.metrics is not None)
        self._nursery.start("the first seconds", self._prove())

    def _inherit(self) -> None:
        """No earlier server listens any more, and none can go on: what was handed over is ours."""
        if not self._closed.is_set():
            self._closed.set()
            self._incumbent.own(True)
            self._parts.listeners.forget_adopted()
            self._incumbent.may_hand_over = True

    async def _prove(self) -> None:
        """Serve for some seconds; then the server before may go. If not all of our workers do, for half of that time
        (one may be killed by somebody, and is replaced), it takes over again."""
        supervisor, predecessor = self._parts.supervisor, self._predecessor
        await asyncio.wait((supervisor.stopping,), timeout=_PROBATION_SECONDS)
        limit = time.monotonic() + _WORKERS_SECONDS
        while not (proven := self._workers_prove()) and time.monotonic() < limit:
            await asyncio.wait((supervisor.stopping,), timeout=0.05)
            if supervisor.stopping.done():
                break
        counts = supervisor.counts
        if not proven and not supervisor.stopping.done():
            why = f"{counts.serving} of {counts.expected} workers serve, and {supervisor.restarts} were replaced"
            log.critical("upgrade: %s: process %d takes over again", why, predecessor.pid)
            predecessor.channel.tell(failed="probation", why=why)
            return
        predecessor.channel.tell(stable=True)

    def _workers_prove(self) -> bool:
        """Whether all workers serve, and have for half of the time in which we are to prove that we do."""
        serving, since = self._parts.supervisor.serving, time.monotonic() - _PROBATION_SECONDS / 2
        return len(serving) >= self._parts.options().workers and all(worker.started <= since for worker in serving)

    async def alone(self) -> None:
        """Wait until no earlier server listens on what we would take from under the gate, for some seconds at most."""
        if self._parts.host.served:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_ALONE_SECONDS):
                    await self._closed.wait()


def _end_aborted() -> None:
    log.critical("upgrade: the server before takes over again: this one ends")
    os._exit(1)
