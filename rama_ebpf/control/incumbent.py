"""This server as one that another follows, or that has followed another: what is whose, and from when.

Until the other serves nothing of ours is gone, so each step can be undone: programs are put back into their links,
listeners into the steering, and workers accept again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..core.client import SourceLengths
from ..core.errors import RamaError
from ..kernel.instance import ServerLock
from ..metrics.directory import MetricsDirectory
from ..policy.rule import IPNetwork, PolicyError, RuleSet, Settings
from ..policy.store import PolicyStore
from ..process import Nursery, Supervisor
from ..process.service_manager import notify
from .guard import Guard
from .listeners import Listeners
from .options import DaemonOptions
from .policy_host import PolicyHost
from .policy_thread import PolicyThread
from .predecessor import Seniors
from .socket import ControlServer
from .succession import Estate, HandedListener, ServerChannel

__all__ = ["Duties", "Parts", "ServedIncumbent", "metrics_directory"]

log = logging.getLogger("rama_ebpf")

_PAUSE_SECONDS: Final = 5.0
_SETTLE_SECONDS: Final = 10.0
_FOREVER: Final = 10 * 365 * 86400.0


class Duties:
    """What a server does by the clock as long as it is the one that serves. ``work`` is all of it, by name."""

    def __init__(self, nursery: Nursery, work: Callable[[], dict[str, Callable[[], Awaitable[None]]]]) -> None:
        self._nursery = nursery
        self._work = work
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin, or begin again."""
        if self._task is None:
            self._task = self._nursery.start("the server's duties", self._run())

    async def _run(self) -> None:
        async with Nursery(self._nursery.failures) as nursery:
            for name, work in self._work().items():
                nursery.keep(name, work)
            await asyncio.Event().wait()

    async def stop(self) -> None:
        """End all of it."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait((self._task,))
            self._task = None


@dataclass(frozen=True, slots=True)
class Parts:
    """What a server consists of that changes hands."""

    options: Callable[[], DaemonOptions]
    host: PolicyHost
    lock: ServerLock
    listeners: Listeners
    guard: Guard
    supervisor: Supervisor
    control: Callable[[], ControlServer]
    seniors: Seniors
    thread: PolicyThread
    metrics: MetricsDirectory | None
    metrics_listener: Callable[[], socket.socket | None]
    duties: Duties
    put_settings: Callable[[DaemonOptions], None]
    """Have egress policy and limits be those of some options."""
    on_change: Callable[[], None]


@dataclass(frozen=True, slots=True)
class _PolicyBefore:
    """The part of the policy that a configuration may say, as it was before another server changed it."""

    token: int
    lengths: SourceLengths
    failsafe: list[IPNetwork]
    ruleset: RuleSet
    settings: Settings

    @classmethod
    def of(cls, store: PolicyStore, known: _PolicyBefore | None = None) -> _PolicyBefore:
        """``known`` is as it was a moment ago: a large set is not read again while nobody gets in."""
        token = store.set_token()
        ruleset = store.ruleset() if known is None or known.token != token else known.ruleset
        return cls(token, store.source_lengths(), store.failsafe(), ruleset, store.settings())

    def put_back(self, store: PolicyStore) -> None:
        """Raises PolicyError or OSError."""
        store.set_source_lengths(self.lengths)
        if store.failsafe() != self.failsafe:
            store.set_failsafe(self.failsafe)
        if store.set_token() != self.token and store.ruleset() != self.ruleset:
            store.replace(self.ruleset, origin="the upgrade was undone", must_be_kept=False)
        if store.settings() != self.settings:
            store.set_settings(self.settings)


class ServedIncumbent:
    """See :class:`~.successor.Incumbent`. ``serves`` says whether this server speaks for the instance."""

    def __init__(self, parts: Parts, series: str, nursery: Nursery) -> None:
        self._parts = parts
        self._series = series
        self._nursery = nursery
        self._before: _PolicyBefore | None = None
        self._heir: ServerChannel | None = None
        self.serves = True
        self.retired = False
        """Whether another server serves in our place, for good."""
        self.may_hand_over = False
        """Whether this server is established: ready, and past its own upgrade."""

    @property
    def stopping(self) -> asyncio.Future[None]:
        return self._parts.supervisor.stopping

    def refusal(self) -> str:
        parts = self._parts
        if parts.host.gate is None:
            return f"only a gate in the kernel can be handed over, and there is none: {parts.host.why_local}"
        if os.getpid() == 1:
            return (
                "this server is process 1: when it ends, so does its container. Start the new version in another one, "
                "or restart"
            )
        if not self.may_hand_over:
            return "the server is not ready yet, or its own upgrade is not over: try again in a few seconds"
        if not self.serves or self.stopping.done():
            return "the server stops"
        return ""

    def notice(self) -> str:
        """Say who will be cut, as there may not be more servers at once; empty if nobody is."""
        oldest, most = self._oldest(), self._parts.options().max_generations
        if oldest is None:
            return ""
        return f"process {oldest} still drains and is cut when the new one serves: at most {most} servers live at once"

    def _oldest(self) -> int | None:
        live, most = self._parts.seniors.live, self._parts.options().max_generations
        return live[0].pid if len(live) + 2 > most else None

    @contextlib.asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        async with self._parts.supervisor.reloading:
            yield

    async def stand_by(self) -> None:
        parts, loop = self._parts, asyncio.get_running_loop()
        limit = loop.time() + _SETTLE_SECONDS
        while not parts.listeners.settled:  # the workers before a reload listen for a moment
            if loop.time() > limit:
                raise RamaError("workers of an earlier configuration still listen: try again")
            await asyncio.sleep(0.05)
        await parts.guard.rest()
        self._before = await asyncio.to_thread(_PolicyBefore.of, parts.host.store)

    def estate(self) -> Estate:
        parts = self._parts
        gate = parts.host.gate
        assert gate is not None
        used = {self._series, *(senior.series for senior in parts.seniors.live)}
        series = next(name for name in ("", *(f"u{number}" for number in range(1, 99))) if name not in used)
        supervisor = parts.supervisor
        return Estate(
            {
                "series": series,
                "own_series": self._series,
                "restarts": supervisor.restarts,
                "reloads": supervisor.reloads,
                "losses": dict(parts.guard.losses),
                "metrics": None if parts.metrics is None else str(parts.metrics.path),
            },
            gate.attachments.handed(),
            parts.lock.fileno(),
            parts.control().listener,
            dict(gate.maps),
            tuple(HandedListener(at, sockets) for at, sockets in parts.listeners.handed()),
            parts.metrics_listener(),
            parts.seniors.live,
        )

    async def pause(self) -> None:
        parts = self._parts
        self.serves = False
        self.own(False)
        await parts.duties.stop()
        parts.control().pause()
        parts.listeners.is_ours = False
        self._before = await asyncio.to_thread(_PolicyBefore.of, parts.host.store, self._before)
        await parts.supervisor.pause(_PAUSE_SECONDS)

    async def resume(self) -> None:
        parts = self._parts
        gate = parts.host.gate
        assert gate is not None
        await self._undo("programs", asyncio.to_thread(gate.attachments.update))
        if not self.serves:
            self.own(True)
            self._heir = None
            parts.listeners.take_back()
            before, self._before = self._before, None
            if before is not None:
                await self._undo("policy", parts.thread.run(lambda: before.put_back(parts.host.store)))
            await self._undo("settings", self._put_settings())
            parts.supervisor.yielding = False
            parts.supervisor.resume()
            parts.listeners.reopen_gate()
            parts.lock.name_us()
            notify(f"MAINPID={os.getpid()}")
            self.serves = True
            if not self.stopping.done():
                await self._undo("control socket", parts.control().resume())
                parts.duties.start()
        parts.guard.wake()
        with contextlib.suppress(RamaError, OSError):
            await parts.guard.probe()  # what could not be put back is said, and tried again
        parts.on_change()

    @staticmethod
    async def _undo(what: str, step: Awaitable[object]) -> None:
        """Whatever fails, the rest is undone."""
        try:
            await step
        except (PolicyError, RamaError, OSError) as error:
            log.error("upgrade: the %s cannot be put back: %s", what, error)

    async def _put_settings(self) -> None:
        self._parts.put_settings(self._parts.options())

    def own(self, owns: bool) -> None:
        """Whether the end of this server is the end of gate, listeners and files: not while two servers have them."""
        parts = self._parts
        if parts.host.gate is not None:
            parts.host.gate.is_ours = owns
        parts.listeners.owns = parts.control().owns = owns
        if parts.metrics is not None:
            parts.metrics.leave = not owns

    def yield_to(self, pid: int, channel: ServerChannel) -> None:
        parts = self._parts
        self._heir = channel
        parts.supervisor.yielding = True
        notify(f"MAINPID={pid}")
        if self._oldest() is not None:
            parts.seniors.cut(parts.seniors.live[0])

    def retire(self, channel: ServerChannel, pid: int) -> None:
        parts = self._parts
        self.retired = True
        if parts.supervisor.hung_up:  # it came after the other had read the configuration
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGHUP)
        limit = parts.options().upgrade_drain
        drain = _FOREVER if limit is None else limit
        when = "when its connections have" if limit is None else f"in {limit:g} s at the latest"
        log.info("another server has taken over: this one, process %d, ends %s", os.getpid(), when)
        parts.supervisor.hand_over(drain)
        self._nursery.start("the care for the server after us", self._obey(channel))

    async def _obey(self, channel: ServerChannel) -> None:
        """Do what the one that serves says of our drain. If it goes, there is nobody to say so any more."""
        async with contextlib.aclosing(channel.messages()) as messages:
            async for message in messages:
                if "stop" in message:
                    self._parts.supervisor.stop()
                if "cut" in message:
                    self._parts.supervisor.cut()
        self._parts.supervisor.stop()

    def left(self) -> None:
        """No worker of ours listens any more."""
        if self._heir is not None:
            gate = self._parts.host.gate
            if gate is not None:
                gate.attachments.release(but_egress=True)
            self._heir.tell(closed=True)


def metrics_directory(estate: Estate | None) -> MetricsDirectory:
    """The directory for workers' metrics: that of the server before, if it has one."""
    path = None if estate is None else estate.facts.get("metrics")
    return MetricsDirectory() if not isinstance(path, str) else MetricsDirectory(adopted=Path(path))
