"""The supervisor: starts workers, replaces those that die, drains and reloads."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any, Final

from ..core.errors import PeerClosed, RamaError
from .channel import Channel, Handler, send_line
from .plan import Json, Plan
from .shared import SharedTable

__all__ = ["Supervisor", "WorkersFailed"]

log = logging.getLogger("rama_ebpf.supervisor")

_QUIET_SECONDS: Final = 10.0
"""How long, during a reload, an old worker may take until it accepts no more: meanwhile nobody accepts."""
_GRACE_SECONDS: Final = 5.0
"""How long a worker has to end after its drain's deadline, or a cut, before it is killed."""
_LEAVE_SECONDS: Final = 1.0
"""How long a worker may be without its channel: it closes it last of all."""
_WATCH_SECONDS: Final = 1.0
_FIRST_BACK_OFF: Final = 0.1
_LAST_BACK_OFF: Final = 10.0
_STABLE_SECONDS: Final = 10.0
"""A worker that served for so long and then died is replaced at once; one that dies sooner after a growing pause."""


async def _nothing() -> None:
    """What is done where nobody wants anything done."""


class WorkersFailed(RamaError):
    """The workers did not come up; the text is the first one's own."""

    kind = "workers_failed"


class _Worker:
    """One worker process as the supervisor sees it."""

    def __init__(
        self,
        plan: Plan,
        number: int,
        identity: str,
        process: subprocess.Popen[bytes],
        column: int,
        *,
        first: bool,
        held: bool,
    ) -> None:
        self.plan = plan
        self.held = held
        """Whether it waits to be told to accept: its plan is not in force yet."""
        self.number = number
        self.identity = identity
        self.process = process
        self.column = column
        self.first = first
        """Whether it was started with its plan, and not as a replacement."""
        self.channel = Channel()
        self.started = self.heard = time.monotonic()
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.stopping = False
        self.draining = asyncio.Event()
        """Set when it accepts no more."""

    @property
    def served(self) -> bool:
        return self.ready.done() and self.ready.exception() is None

    @property
    def pid(self) -> int:
        return self.process.pid

    def signal(self, number: int) -> None:
        if not self.ended.done():
            self.process.send_signal(number)


class Supervisor:
    """Runs the workers of a plan until it is told to stop.

    ``handlers`` answer what workers ask over their channels, by topic. ``reload`` makes the plan for SIGHUP; if it
    raises a RamaError, or the new workers do not come up, the old ones serve on. So they do if ``on_prepare``, awaited
    before the old ones stop to accept, raises one. ``on_switch`` is awaited when no worker accepts, between the old
    plan and the new one: put into force there what goes with it; if it raises a RamaError workers of the old plan are
    started again. ``on_reloaded`` is told whether it succeeded, when no worker has a listening socket any more that
    only the other plan has. ``on_ready`` is called once when all
    workers serve. ``on_spawn`` is called with the process id of each new worker before it is told what to do,
    ``on_start`` with its identity and channel, ``on_exit`` with the identity of each worker that has ended, before its
    replacement, which has the same identity, starts. ``on_stopping`` is called when the drain begins: close the
    listening sockets there.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        handlers: dict[str, Handler] | None = None,
        reload: Callable[[], Plan] | None = None,
        on_prepare: Callable[[], Awaitable[None]] = _nothing,
        on_switch: Callable[[], Awaitable[None]] = _nothing,
        on_reloaded: Callable[[bool], None] = lambda succeeded: None,
        on_ready: Callable[[], None] = lambda: None,
        on_start: Callable[[str, Channel], None] = lambda identity, channel: None,
        on_spawn: Callable[[int], None] = lambda pid: None,
        on_exit: Callable[[str], None] = lambda identity: None,
        on_stopping: Callable[[], None] = lambda: None,
    ) -> None:
        self.plan = plan
        self.restarts = 0
        self.reloads = 0
        self._handlers = handlers or {}
        self._reload_plan = reload
        self._on_prepare = on_prepare
        self._on_switch = on_switch
        self._on_reloaded = on_reloaded
        self._on_ready = on_ready
        self._on_start = on_start
        self._on_spawn = on_spawn
        self._on_exit = on_exit
        self._on_stopping = on_stopping
        self._workers: set[_Worker] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = asyncio.Event()
        self._cutting = asyncio.Event()
        self._reloading = asyncio.Lock()
        self._hangups = 0
        self._serving = False
        self._coming: Plan | None = None
        self._generation = 0
        self._secret = secrets.token_bytes(32)
        self._columns = max(8, 4 * plan.workers)  # room for a few earlier configurations that still drain
        self._shared_fd = SharedTable.create(self._columns)
        self._shared = SharedTable(self._shared_fd, self._columns, None, self._secret)
        self._free_columns = set(range(self._columns))
        self._back_off: dict[int, float] = {}

    @property
    def pids(self) -> dict[int, int]:
        """The process ids of the workers that serve, by number."""
        return {worker.number: worker.pid for worker in self._workers if not worker.stopping}

    def stop(self) -> None:
        """Drain and end; a second call cuts. SIGTERM and SIGINT do this."""
        (self._cutting if self._stopping.is_set() else self._stopping).set()

    def broadcast(self, topic: str, body: Json) -> None:
        """Send a message to every worker that serves."""
        for worker in self._workers:
            if not worker.stopping:
                worker.channel.notify(topic, body)

    async def ask(self, topic: str, body: Json | None = None) -> dict[str, Json]:
        """Ask every worker that has served, those that drain too; return the answers by identity.

        A worker that ends meanwhile, or is silent for 5 s, is left out.
        """
        workers = [worker for worker in self._workers if worker.served]

        async def one(worker: _Worker) -> Json | None:
            with contextlib.suppress(PeerClosed, TimeoutError):
                async with asyncio.timeout(_GRACE_SECONDS):
                    return await worker.channel.request(topic, body)
            return None

        answers = await asyncio.gather(*map(one, workers))
        return {worker.identity: answer for worker, answer in zip(workers, answers, strict=True) if answer is not None}

    async def run(self) -> None:
        """Serve until :meth:`stop`. Raises :class:`WorkersFailed` if the first workers do not come up."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        loop.add_signal_handler(signal.SIGHUP, self.hang_up)
        watchdog = asyncio.create_task(self._watch())
        try:
            await self._start_all(self.plan)
            self._serving = True
            if not self._stopping.is_set():
                self._on_ready()
                self._answer_hangups()
            await self._stopping.wait()
            self._on_stopping()
            log.info("stopping: connections have %g s to end (a second signal cuts them)", self.plan.drain)
            await self._stop_workers(set(self._workers), self.plan.drain)
        finally:
            self._stopping.set()
            watchdog.cancel()
            for worker in self._workers:
                worker.signal(signal.SIGKILL)
            await asyncio.gather(watchdog, *self._tasks, return_exceptions=True)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                loop.remove_signal_handler(number)
            os.close(self._shared_fd)

    async def reload(self) -> None:
        """Start workers of a new plan and, when all serve, drain those of the old one.

        Raises :class:`RamaError` if the new plan cannot be made or its workers do not come up; then nothing changed.
        """
        if self._reload_plan is None:
            raise RamaError("nothing to reload here")
        async with self._reloading:
            succeeded = False
            try:
                self._coming = self._reload_plan()
                if self._coming.workers >= len(self._free_columns):
                    raise RamaError("workers of earlier configurations still drain: try again later")
                await self._take_over(self._coming)
                succeeded = True
            finally:
                self._coming = None
                self._on_reloaded(succeeded)

    async def _take_over(self, plan: Plan) -> None:
        """Change the plan. A connection is judged by the policy and served by the stack of one plan: the new workers
        are loaded, the old ones accept no more, then the policy changes, then the new ones accept."""
        await self._start_all(plan)
        if self._stopping.is_set():
            return
        try:
            await self._on_prepare()
        except RamaError:
            await self._stop_workers({worker for worker in self._workers if worker.plan is plan}, 0)
            raise
        old = {worker for worker in self._workers if worker.plan is not plan and not worker.stopping}
        self._spawn_task(self._stop_workers(old, plan.drain))
        await self._quiet(old)
        try:
            await self._on_switch()
        except RamaError:
            await self._stop_workers({worker for worker in self._workers if worker.plan is plan}, 0)
            await self._start_all(self.plan)
            raise
        self.plan = plan
        self.reloads += 1
        for worker in self._workers:
            self._let_accept(worker)

    async def _quiet(self, workers: set[_Worker]) -> None:
        """Return when none of them accepts any more; one that does not come to say so is killed."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_QUIET_SECONDS):
                for worker in workers:
                    await worker.draining.wait()
        for worker in workers:
            if not worker.draining.is_set():
                log.error("worker %d (pid %d) does not stop accepting: killed", worker.number, worker.pid)
                worker.signal(signal.SIGKILL)
                await worker.draining.wait()

    def _let_accept(self, worker: _Worker) -> None:
        if worker.held and worker.served and not worker.stopping and worker.plan is self.plan:
            worker.held = False
            worker.channel.notify("serve")

    # -- starting ------------------------------------------------------------------------------------------------

    async def _start_all(self, plan: Plan) -> None:
        self._generation += 1
        workers = [self._spawn(plan, number, first=True) for number in range(plan.workers)]
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            for worker in workers:
                either: list[asyncio.Future[Any]] = [worker.ready, stopping]
                await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
                if worker.ready.done():
                    worker.ready.result()
        except WorkersFailed:
            await self._stop_workers(set(workers), 0)
            raise
        finally:
            stopping.cancel()

    def _spawn(self, plan: Plan, number: int, *, first: bool) -> _Worker:
        ours, theirs = socket.socketpair()
        listeners = [(listener.name, listener.for_worker(number, plan.workers)) for listener in plan.listeners]
        column = min(self._free_columns)
        self._free_columns.discard(column)
        fds = {theirs.fileno(), self._shared_fd, *plan.fds.values()}
        fds.update(sock.fileno() for _, sockets in listeners for _, sock in sockets)
        with theirs:
            # A fresh interpreter and not a fork of this one: see docs/process.md.
            process = subprocess.Popen(
                [sys.executable, "-m", "rama_ebpf.process.worker", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=tuple(fds),
                env={**os.environ, **plan.environment},
            )
        self._on_spawn(process.pid)
        held = plan is not self.plan
        worker = _Worker(plan, number, f"{number}g{self._generation}", process, column, first=first, held=held)
        # The channel is empty and the order fits into its buffer: this does not block.
        send_line(
            ours,
            {
                "worker": number,
                "identity": worker.identity,
                "held": held,
                "judged": "verdict" in self._handlers,
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
                "user": None if plan.user is None else (plan.user.uid, plan.user.gid),
                "sandbox": plan.sandbox.value,
                "drain": plan.drain,
                "log_level": plan.log_level,
            },
        )
        self._workers.add(worker)
        self._spawn_task(self._look_after(worker, ours))
        return worker

    def _spawn_task(self, coroutine: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the supervisor itself failed", exc_info=error)

    # -- looking after -------------------------------------------------------------------------------------------

    async def _look_after(self, worker: _Worker, sock: socket.socket) -> None:
        """Listen to a worker until it ends, then replace it unless it was told to end."""
        channel = worker.channel
        for topic, handler in self._handlers.items():
            channel.on(topic, handler)
        self._on_start(worker.identity, channel)
        channel.on("ready", lambda body: self._ready(worker))
        channel.on("failed", lambda body: self._failed(worker, str(body["text"])))
        channel.on("draining", lambda body: worker.draining.set())
        channel.on("drained", lambda body: log.info("worker %d drained: %s", worker.number, _drained(body)))
        channel.on("alive", lambda body: setattr(worker, "heard", time.monotonic()))
        with _exit_watch(worker):
            await channel.open(sock)
            await channel.run()  # until it ends, its last words included
            await self._ending(worker)
            await channel.close()
        self._workers.discard(worker)
        worker.draining.set()
        self._shared.wipe(worker.column)
        self._free_columns.add(worker.column)
        code = worker.ended.result()
        self._failed(worker, f"worker {worker.number} ended with {_outcome(code)} before it served")
        self._on_exit(worker.identity)
        if not worker.stopping and not self._stopping.is_set() and (worker.served or not worker.first):
            await self._replace(worker, code)

    async def _ending(self, worker: _Worker) -> None:
        """Wait for the end of a worker that does not speak to us any more."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(worker.ended), _LEAVE_SECONDS)
            return
        log.error("worker %d (pid %d) has left its channel: killed", worker.number, worker.pid)
        worker.signal(signal.SIGKILL)
        await worker.ended

    def _ready(self, worker: _Worker) -> None:
        worker.started = time.monotonic()
        if not worker.ready.done():
            worker.ready.set_result(None)
            log.debug("worker %d serves (pid %d)", worker.number, worker.pid)
            self._let_accept(worker)  # its plan may have come into force since it was started

    def _failed(self, worker: _Worker, text: str) -> None:
        if not worker.ready.done():
            worker.ready.set_exception(WorkersFailed(text))
            worker.ready.exception()  # a replacement's failure is logged by its end; nobody else awaits it

    async def _replace(self, worker: _Worker, code: int) -> None:
        age = time.monotonic() - worker.started
        last = self._back_off.get(worker.number, 0.0)
        pause = 0.0 if age >= _STABLE_SECONDS else min(max(last * 2, _FIRST_BACK_OFF), _LAST_BACK_OFF)
        self._back_off[worker.number] = pause
        why = "" if worker.served else f": {worker.ready.exception()}"
        log.error(
            "worker %d (pid %d) ended with %s after %.1f s%s; its replacement starts in %.1f s",
            *(worker.number, worker.pid, _outcome(code), age, why, pause),
        )
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), pause)
        # What is in force now, or about to be: nothing of an earlier plan comes back.
        if not self._stopping.is_set() and (worker.plan is self.plan or worker.plan is self._coming):
            self.restarts += 1
            self._spawn(worker.plan, worker.number, first=False)

    async def _watch(self) -> None:
        """Kill workers whose event loop has not turned for a plan's ``watchdog`` seconds."""
        while True:
            before = time.monotonic()
            await asyncio.sleep(_WATCH_SECONDS)
            late = time.monotonic() - before - _WATCH_SECONDS
            for worker in self._workers:
                worker.heard += late  # while we did not run ourselves nobody could be heard
                silent = time.monotonic() - worker.heard
                if silent > worker.plan.watchdog:
                    log.error("worker %d (pid %d) hangs: silent for %.0f s", worker.number, worker.pid, silent)
                    worker.signal(signal.SIGKILL)

    def hang_up(self) -> None:
        """Reload, as SIGHUP asks for: after the start, and once for all that ask while a reload waits to begin."""
        self._hangups += 1
        if self._hangups == 1:
            self._answer_hangups()

    def _answer_hangups(self) -> None:
        if self._serving and self._hangups:
            self._spawn_task(self._on_hangups())

    async def _on_hangups(self) -> None:
        while self._hangups and not self._stopping.is_set():
            asked = self._hangups
            try:
                await self.reload()
            except RamaError as error:
                log.error("reload failed, the old configuration stays: %s", error)
            else:
                log.info("reloaded")
            self._hangups = min(self._hangups - asked, 1)

    # -- stopping ------------------------------------------------------------------------------------------------

    async def _stop_workers(self, workers: set[_Worker], seconds: float) -> None:
        """Drain ``workers`` for up to ``seconds``, or until the second signal; kill what does not end then."""
        for worker in workers:
            worker.stopping = True
            if worker.served:
                worker.channel.notify("drain", {"seconds": seconds})
            else:
                worker.signal(signal.SIGTERM)
        cutting = asyncio.create_task(self._cutting.wait())
        deadline = time.monotonic() + seconds + _GRACE_SECONDS
        pending = {worker.ended for worker in workers}
        while pending and not cutting.done() and (left := deadline - time.monotonic()) > 0:
            either: list[asyncio.Future[Any]] = [*pending, cutting]
            await asyncio.wait(either, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            pending = {ending for ending in pending if not ending.done()}
        if cutting.done() and pending:
            for worker in workers:
                worker.channel.notify("cut")
            _, pending = await asyncio.wait(pending, timeout=_GRACE_SECONDS)
        cutting.cancel()
        for worker in workers:
            if not worker.ended.done():
                log.error("worker %d (pid %d) does not end: killed", worker.number, worker.pid)
                worker.signal(signal.SIGKILL)
        if pending:
            await asyncio.wait(pending)


def _drained(body: Json) -> str:
    return f"{body['cut']} connections cut after {body['seconds']:.1f} s"


def _outcome(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


@contextlib.contextmanager
def _exit_watch(worker: _Worker) -> Iterator[None]:
    """Have ``worker.ended`` set when its process ends."""
    loop = asyncio.get_running_loop()
    fd = os.pidfd_open(worker.pid)

    def reap() -> None:
        loop.remove_reader(fd)
        worker.ended.set_result(worker.process.wait())

    loop.add_reader(fd, reap)
    try:
        yield
    finally:
        loop.remove_reader(fd)
        os.close(fd)
