"""The workers of one plan. One that dies is replaced by its own plan's, for as long as that plan is wanted."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Collection
from typing import Any, Final

from ..core.errors import PeerClosed
from .channel import RequestFailed
from .nursery import BackOff, Nursery
from .plan import Plan
from .worker_process import WorkerFactory, WorkerProcess, WorkersFailed, outcome

__all__ = ["Generation"]

log = logging.getLogger("rama_ebpf.supervisor")

_GRACE_SECONDS: Final = 1.5
"""How long a worker has to end after its drain's deadline, or a cut, before it is killed."""
_FIRST_BACK_OFF: Final = 0.1
_LAST_BACK_OFF: Final = 10.0
_STABLE_SECONDS: Final = 10.0
"""A worker that served for so long and then died is replaced at once; one that dies sooner after a growing pause."""


class Generation:
    """As many workers as ``plan`` wants. ``name`` and ``index`` tell it from all others that live at the same time."""

    def __init__(self, plan: Plan, name: str, index: int, factory: WorkerFactory, nursery: Nursery) -> None:
        self.plan = plan
        self.index = index
        self._name = name
        self.restarts = 0
        self._factory = factory
        self._nursery = nursery
        self._workers: dict[int, WorkerProcess] = {}
        self._missing_since: dict[int, float] = {}
        self._failures: dict[int, WorkersFailed] = {}
        self._opened = False
        self._started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._retired: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def workers(self) -> list[WorkerProcess]:
        """Those that are processes now, by number."""
        return [worker for _, worker in sorted(self._workers.items())]

    @property
    def serving(self) -> list[WorkerProcess]:
        """Those that serve now."""
        return [worker for worker in self.workers if worker.served and not worker.ended.done()]

    @property
    def restarting_since(self) -> float | None:
        """Since when (CLOCK_MONOTONIC) fewer workers serve than the plan wants; None if all do."""
        return min(self._missing_since.values(), default=None)

    def supersede(self, by_newer: bool) -> None:
        """A newer plan is in force, or not after all."""
        for worker in self._workers.values():
            worker.superseded = by_newer

    async def start(self, cancelled: asyncio.Future[None]) -> None:
        """Start all and wait until each could serve, or until ``cancelled`` is done. Raises :class:`WorkersFailed` if
        one could not; then all have ended."""
        for number in range(self.plan.workers):
            self._missing_since[number] = time.monotonic()
            self._nursery.start(f"worker {number}", self._hold(number))
        await asyncio.wait((self._started, cancelled), return_when=asyncio.FIRST_COMPLETED)
        if self._started.done() and self._started.exception() is not None:
            await self.stop(linger=0, drain=0, cut=cancelled)
            self._started.result()

    def open(self) -> None:
        """Have all accept, and their replacements as soon as they can."""
        self._opened = True
        for worker in self.serving:
            self._open(worker)

    def _open(self, worker: WorkerProcess) -> None:
        worker.channel.notify("open")
        for observer in self._factory.observers:
            observer.serving(worker)

    async def pause(self, seconds: float) -> None:
        """Have all serve what waits for them and accept no more, their replacements neither, until :meth:`open`.

        Raises :class:`WorkersFailed` if one does not say within so many seconds that it does; some may accept then.
        """
        self._opened = False
        for worker in self.serving:
            try:
                async with asyncio.timeout(seconds):
                    await worker.channel.request("pause")
            except PeerClosed:
                continue  # it has ended
            except (TimeoutError, RequestFailed):
                text = f"worker {worker.number} (pid {worker.pid}) does not let go of its queue"
                raise WorkersFailed(text) from None

    async def release(self, seconds: float) -> None:
        """Wait until none accepts any more on what a later plan keeps, after :meth:`retire`, but not for longer."""
        if releasing := [worker.released for worker in self._workers.values()]:
            await asyncio.wait(releasing, timeout=seconds)

    async def stop_listening(self) -> None:
        """Wait until all have closed their listening sockets, after :meth:`retire`."""
        if closing := [worker.closed for worker in self._workers.values()]:
            await asyncio.wait(closing)

    def retire(self, *, linger: float, drain: float, kept: Collection[str] = ()) -> None:
        """Have all accept for ``linger`` seconds more, but not on the listeners ``kept`` by a later plan, and then
        drain for ``drain``; none is replaced any more."""
        if not self._retired.done():
            self._retired.set_result(None)
        for worker in self._workers.values():
            worker.stop(linger=linger, drain=drain, kept=kept)

    async def stop(self, *, linger: float, drain: float, cut: asyncio.Future[None]) -> None:
        """Retire, and wait until all have ended, which they do a little after ``linger`` + ``drain`` seconds; at once
        when ``cut`` is done."""
        self.retire(linger=linger, drain=drain)
        pending = {worker.ended for worker in self._workers.values()}
        deadline = time.monotonic() + linger + drain + _GRACE_SECONDS
        while pending and not cut.done() and (left := deadline - time.monotonic()) > 0:
            either: list[asyncio.Future[Any]] = [*pending, cut]
            await asyncio.wait(either, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            pending = {ending for ending in pending if not ending.done()}
        if cut.done() and pending:
            for worker in self._workers.values():
                worker.channel.notify("cut")
            _, pending = await asyncio.wait(pending, timeout=_GRACE_SECONDS)
        for worker in self._workers.values():
            if not worker.ended.done() and not worker.given_up:
                worker.given_up = True
                if worker.said_goodbye:
                    log.debug("worker %d (pid %d) has drained and is slow to end: killed", worker.number, worker.pid)
                else:
                    log.error("worker %d (pid %d) does not end: killed", worker.number, worker.pid)
                worker.signal(signal.SIGKILL)
        if pending:
            await asyncio.wait(pending)

    # -- each worker ---------------------------------------------------------------------------------------------

    async def _hold(self, number: int) -> None:
        """Have a worker of this number, one after the other, until the plan is retired."""
        back_off = BackOff(_FIRST_BACK_OFF, _LAST_BACK_OFF)
        while not self._retired.done():
            try:
                worker = self._factory.spawn(self.plan, number, f"{number}g{self._name}")
            except OSError as error:
                if not self._started.done():
                    self._fail(number, WorkersFailed(f"worker {number} cannot be started: {error}"))
                    return
                pause = back_off.fail()
                log.error("worker %d cannot be started: %s; tried again in %.1f s", number, error, pause)
                await self._pause(pause)
                continue
            self._workers[number] = worker
            if await self._watch(worker):
                return
            age = time.monotonic() - worker.started
            pause = 0.0 if age >= _STABLE_SECONDS else back_off.fail()
            if not pause:
                back_off.succeed()
            why = "" if worker.served else f": {worker.ready.exception()}"
            log.error(
                "worker %d (pid %d) ended with %s after %.1f s%s; its replacement starts in %.1f s",
                *(number, worker.pid, outcome(worker.ended.result()), age, why, pause),
            )
            await self._pause(pause)
            self.restarts += not self._retired.done()

    async def _watch(self, worker: WorkerProcess) -> bool:
        """Wait for the end of a worker; return whether no other is to take its place."""
        either: list[asyncio.Future[Any]] = [worker.ready, worker.ended]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if worker.served:
            self._missing_since.pop(worker.number, None)
            if self._retired.done():
                worker.stop(linger=0, drain=0)
            elif self._opened:
                self._open(worker)
            self._decide()
        await asyncio.wait((worker.gone,))
        if self._workers.get(worker.number) is worker:
            del self._workers[worker.number]
        failure = worker.ready.exception()
        if isinstance(failure, WorkersFailed) and (not self._started.done() or self._failures):
            self._fail(worker.number, failure)
            return True
        if self._retired.done():
            return True
        self._missing_since[worker.number] = time.monotonic()
        return False

    def _fail(self, number: int, failure: WorkersFailed) -> None:
        """The start has failed."""
        self._failures[number] = failure
        self._decide()

    def _decide(self) -> None:
        """Say how the start went when that is known: with the first worker's failure, not the quickest one's."""
        undecided = self._missing_since.keys() - self._failures.keys()
        if self._started.done():
            return
        if not self._missing_since:
            self._started.set_result(None)
        elif self._failures and min(self._failures) < min(undecided, default=self.plan.workers):
            self._started.set_exception(self._failures[min(self._failures)])
            self._started.exception()

    async def _pause(self, seconds: float) -> None:
        await asyncio.wait((self._retired,), timeout=seconds)
