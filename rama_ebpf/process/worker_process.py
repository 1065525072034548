"""A worker process as the supervisor sees it, and how one is made."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Collection, Sequence
from typing import Annotated, Final

import msgspec
from msgspec import Meta

from ..core.errors import RamaError
from ..core.interpreter import module_command
from ..kernel.confine import Confinement
from ..kernel.denials import DenialCounts
from .channel import Channel
from .exit_watch import exit_watch
from .nursery import Nursery
from .plan import Json, Plan
from .shared import SharedTable
from .ways import SharedBoard

__all__ = ["WorkerFactory", "WorkerObserver", "WorkerProcess", "WorkersFailed", "outcome"]

log = logging.getLogger("rama_ebpf.supervisor")

_LEAVE_SECONDS: Final = 5.0
"""How long a worker may be without its channel: it closes it last of all."""
_OOM_SCORE: Final = "300"
"""oom_score_adj of workers: when memory runs out they go before whoever holds the gate (proc(5))."""


class WorkersFailed(RamaError):
    """The workers did not come up; the text is the first one's own."""

    kind = "workers_failed"


class _Failed(msgspec.Struct, forbid_unknown_fields=True):
    text: Annotated[str, Meta(max_length=65536)]


class _Drained(msgspec.Struct, forbid_unknown_fields=True):
    cut: Annotated[int, Meta(ge=0, le=2**32)]
    seconds: Annotated[float, Meta(ge=0, le=2**32)]


class _Ready(msgspec.Struct, forbid_unknown_fields=True):
    seccomp: bool = False
    landlock: Annotated[int, Meta(ge=0, le=1000)] = 0
    listener: Annotated[int, Meta(ge=0, le=2**20)] | None = None


class _Nothing(msgspec.Struct, forbid_unknown_fields=True):
    pass


class WorkerProcess:
    """One worker process.

    ``superseded`` is set when a newer plan is in force: what it asks is answered by that plan, or not at all.
    """

    def __init__(self, plan: Plan, number: int, identity: str, process: subprocess.Popen[bytes], column: int) -> None:
        loop = asyncio.get_running_loop()
        self.plan = plan
        self.number = number
        self.identity = identity
        self.process = process
        self.column = column
        self.channel = Channel()
        self.started = self.heard = time.monotonic()
        self.ready: asyncio.Future[None] = loop.create_future()
        """Done when it could serve; with :class:`WorkersFailed` when it never will."""
        self.released: asyncio.Future[None] = loop.create_future()
        """Done when it accepts no more on what a later plan keeps, or has ended."""
        self.closed: asyncio.Future[None] = loop.create_future()
        """Done when it has closed its listening sockets, or has ended."""
        self.ended: asyncio.Future[int] = loop.create_future()
        self.gone: asyncio.Future[None] = loop.create_future()
        """Done when it has ended and everybody has been told so."""
        self.superseded = False
        self.confinement = Confinement(seccomp=False, landlock=0)
        """What it said of its sandbox when it was ready."""
        self.said_goodbye = False
        """Whether it has drained: nothing is lost with it any more."""
        self.given_up = False
        """Whether it was killed for not ending in time."""

    @property
    def served(self) -> bool:
        return self.ready.done() and self.ready.exception() is None

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def silent_for(self) -> float:
        """For how many seconds its event loop has not been heard to turn."""
        return time.monotonic() - self.heard

    def signal(self, number: int) -> None:
        """Send a signal unless it has ended."""
        if not self.ended.done():
            self.process.send_signal(number)

    def stop(self, *, linger: float, drain: float, kept: Collection[str] = ()) -> None:
        """Have it accept for ``linger`` seconds more, but at once no more on the listeners ``kept`` by a later plan;
        close its listening sockets, and end when its connections have, or after ``drain`` seconds."""
        if self.served:
            self.channel.notify("drain", {"linger": linger, "seconds": drain, "kept": list(kept)})
        else:
            self.signal(signal.SIGTERM)

    def fail(self, text: str) -> None:
        """It will never serve, if it did not before."""
        if not self.ready.done():
            self.ready.set_exception(WorkersFailed(text))
            self.ready.exception()  # a replacement's failure is logged by its end; nobody else awaits it


class WorkerObserver:
    """A part of the server that has to know of workers. What it does not care for does nothing."""

    def spawned(self, pid: int) -> None:
        """A process was started, and has not been told yet what to do."""

    def started(self, worker: WorkerProcess) -> None:
        """Its channel is about to open: say who answers what it asks."""

    def serving(self, worker: WorkerProcess) -> None:
        """It accepts connections from now on, or again."""

    def silent(self, worker: WorkerProcess) -> None:
        """Its event loop does not turn: it does not accept for now."""

    def ended(self, worker: WorkerProcess) -> None:
        """It is no more. Its replacement, which has the same identity, starts after this."""


class WorkerFactory:
    """Makes worker processes, at most ``columns`` at once, and looks after them until they have ended."""

    def __init__(
        self,
        columns: int,
        observers: Sequence[WorkerObserver],
        nursery: Nursery,
        denials: DenialCounts | None = None,
    ) -> None:
        self.observers = observers
        self._nursery = nursery
        self._denials = denials
        self._secret = secrets.token_bytes(32)
        self._columns = columns
        self._shared_fd = SharedTable.create(columns)
        self._shared = SharedTable(self._shared_fd, columns, None, self._secret)
        self._free_columns = set(range(columns))

    @property
    def board(self) -> SharedBoard:
        """The health of ways."""
        return self._shared.board()

    @property
    def room(self) -> int:
        """How many more processes there may be."""
        return len(self._free_columns)

    def close(self) -> None:
        """Give up the shared counts, when all workers have ended."""
        os.close(self._shared_fd)

    def spawn(self, plan: Plan, number: int, identity: str) -> WorkerProcess:
        """Start one worker of a plan and look after it. Raises OSError, as for want of processes or memory."""
        if not self._free_columns:
            raise OSError("too many workers of earlier configurations still drain")
        ours, theirs = socket.socketpair()
        listeners = [(listener.name, listener.for_worker(number, plan.workers)) for listener in plan.listeners]
        fds = {theirs.fileno(), self._shared_fd, *plan.fds.values()}
        fds.update(sock.fileno() for _, sockets in listeners for _, sock in sockets)
        try:
            with theirs, plan.held() as held:
                fds.update(held)
                # A fresh interpreter and not a fork of this one: see docs/process.md.
                process = subprocess.Popen(
                    module_command("rama_ebpf.process.worker", str(theirs.fileno())),
                    stdin=subprocess.DEVNULL,
                    pass_fds=tuple(fds),
                    env={**os.environ, **plan.environment},
                    process_group=0,  # a terminal's Ctrl-C is for us alone
                )
        except BaseException:
            ours.close()
            raise
        column = min(self._free_columns)
        self._free_columns.discard(column)
        worker = WorkerProcess(plan, number, identity, process, column)
        order: Json = {
            "worker": number,
            "identity": identity,
            "workers": plan.workers,
            "target": plan.target,
            "directory": plan.directory,
            "params": plan.params,
            "secret": self._secret.hex(),
            "shared": (self._shared_fd, self._columns, column),
            "listeners": [
                {"name": name, "sockets": [(index, sock.fileno()) for index, sock in sockets]}
                for name, sockets in listeners
            ],
            "fds": plan.fds,
            "held": list(held),
            "user": None if plan.user is None else (plan.user.uid, plan.user.gid),
            "sandbox": plan.sandbox.value,
            "read": plan.read,
            "write": plan.write,
            "log_level": plan.log_level,
            "log_format": plan.log_format,
        }
        self._nursery.start(f"the care for worker {number}", self._look_after(worker, ours, order))
        return worker

    async def _look_after(self, worker: WorkerProcess, sock: socket.socket, order: Json) -> None:
        channel = worker.channel
        channel.on("ready", lambda body: self._ready(worker, body), _Ready)
        channel.on("failed", lambda body: worker.fail(body.text), _Failed)
        channel.on("released", lambda body: _settle(worker.released), _Nothing)
        channel.on("draining", lambda body: _settle(worker.closed), _Nothing)
        channel.on("drained", lambda body: self._drained(worker, body), _Drained)
        channel.on("alive", lambda body: self._alive(worker), _Nothing)
        try:
            with exit_watch(worker.pid, lambda: worker.ended.set_result(worker.process.wait())):
                try:
                    _make_likely_victim(worker.pid)
                    for observer in self.observers:
                        observer.spawned(worker.pid)
                        observer.started(worker)
                    await channel.open(sock)
                    channel.send_first(order)
                    await channel.run()  # until it ends, its last words included
                finally:
                    await self._end(worker)
        finally:
            await channel.close()
            sock.close()
            self._ended(worker)

    async def _end(self, worker: WorkerProcess) -> None:
        """Wait for the end of a worker that does not speak to us any more."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(worker.ended), _LEAVE_SECONDS if worker.closed.done() else 1)
            return
        if worker.said_goodbye:
            log.debug("worker %d (pid %d) has drained and takes its time to end: killed", worker.number, worker.pid)
        else:
            log.error("worker %d (pid %d) has left its channel: killed", worker.number, worker.pid)
        worker.signal(signal.SIGKILL)
        await worker.ended

    def _ended(self, worker: WorkerProcess) -> None:
        if not worker.ended.done():  # cancelled: nobody is left to wait for it
            worker.process.kill()
            worker.ended.set_result(worker.process.wait())
        self._shared.wipe(worker.column)
        self._free_columns.add(worker.column)
        worker.fail(f"worker {worker.number} ended with {outcome(worker.ended.result())} before it served")
        for observer in self.observers:
            try:
                observer.ended(worker)
            except OSError as error:  # the others have to know, and it has to be replaced
                log.error("worker %d has ended, and not all could be put away: %s", worker.number, error)
        for future in (worker.released, worker.closed, worker.gone):
            _settle(future)

    def _ready(self, worker: WorkerProcess, body: _Ready) -> None:
        if worker.ready.done():
            raise ValueError("ready twice")
        worker.confinement = Confinement(body.seccomp, body.landlock)
        if body.listener is not None and self._denials is not None:
            try:
                self._denials.follow("worker", worker.pid, body.listener)
            except OSError as error:
                log.warning("what the sandbox of worker %d refuses is not counted: %s", worker.number, error)
        worker.started = time.monotonic()
        worker.ready.set_result(None)
        log.debug("worker %d serves (pid %d)", worker.number, worker.pid)

    @staticmethod
    def _drained(worker: WorkerProcess, body: _Drained) -> None:
        worker.said_goodbye = True
        log.info("worker %d drained: %d connections cut after %.1f s", worker.number, body.cut, body.seconds)

    @staticmethod
    def _alive(worker: WorkerProcess) -> None:
        worker.heard = time.monotonic()


def outcome(code: int) -> str:
    """Say how a process ended, by its exit code or the negative number of a signal."""
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _make_likely_victim(pid: int) -> None:
    try:
        with open(f"/proc/{pid}/oom_score_adj", "w", encoding="ascii") as file:
            file.write(_OOM_SCORE)
    except OSError as error:
        log.debug("worker with pid %d keeps its OOM score: %s", pid, error)
