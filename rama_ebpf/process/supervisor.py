"""The supervisor: one plan in force at a time, and the orders in which plans begin, follow each other and end.

docs/process.md has these orders in words.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from ..core.errors import PeerClosed, RamaError
from ..kernel.denials import DenialCounts
from .channel import RequestFailed
from .generation import Generation
from .nursery import Nursery
from .plan import Json, Plan
from .ways import SharedBoard
from .worker_process import WorkerFactory, WorkerObserver, WorkerProcess

__all__ = ["Revision", "Supervisor", "WorkerCounts"]

log = logging.getLogger("rama_ebpf.supervisor")

_ANSWER_SECONDS: Final = 5.0
_WATCH_SECONDS: Final = 0.25
_SILENT_SECONDS: Final = 1.25
"""Workers are heard twice a second; one that is silent for so long does not accept."""
_RELEASE_SECONDS: Final = 2.0
"""How long we wait for a busy worker to leave a queue to those who come after it."""
_RELOAD_LINGER: Final = 2.5
"""How long workers of an earlier plan accept what its gate let in: a lost segment of a handshake is sent again after
1 s (RFC 6298, section 2.1)."""


class Revision(Protocol):
    """A plan, and what else comes into force with it: listeners, policy. Nothing of it is in force when it is made."""

    @property
    def plan(self) -> Plan: ...

    async def enter(self) -> None:
        """All workers of the plan could serve: put it into force in place of the one before. Raises RamaError or
        OSError; then the one before is in force as if nothing had been tried."""

    async def abandon(self) -> None:
        """It will not come into force, and its workers have ended: give up what was prepared."""

    async def superseded(self) -> None:
        """Another is in force, and no worker of this one listens any more."""

    def stop(self) -> None:
        """The server stops: close our own listening sockets. New connections are still judged."""

    async def leave(self) -> None:
        """The server stops, and no worker listens any more."""


@dataclass(frozen=True, slots=True)
class WorkerCounts:
    """How many workers the plan in force wants, and how many of them serve. ``since`` is how many seconds ago the first
    of the missing ones went missing, None if none is."""

    expected: int
    serving: int
    since: float | None


class Supervisor:
    """Runs the workers of a revision until it is told to stop.

    ``prepare`` makes the revision for SIGHUP; if it raises a RamaError, or the new workers do not come up, the old
    ones serve on. ``observers`` are told of workers. ``on_ready`` is called once when all workers serve,
    ``on_stopping`` when it is to stop: it returns for how many seconds workers accept at least; and ``on_left`` at the
    end when none listens any more. ``restarts`` and ``reloads`` are counted on from. ``series`` goes
    into the identities of workers: it tells them from those of other supervisors that share their metrics. ``denials``
    counts what their sandboxes refuse.
    """

    def __init__(
        self,
        revision: Revision,
        nursery: Nursery,
        *,
        prepare: Callable[[], Awaitable[Revision]] | None = None,
        observers: Sequence[WorkerObserver] = (),
        on_ready: Callable[[], None] = lambda: None,
        on_stopping: Callable[[], float] = lambda: 0.0,
        denials: DenialCounts | None = None,
        on_left: Callable[[], None] = lambda: None,
        series: str = "",
        restarts: int = 0,
        reloads: int = 0,
    ) -> None:
        self.nursery = nursery
        self.reloads = reloads
        self.reloading = asyncio.Lock()
        """Held while revisions change: whoever else holds it has none change."""
        self._series = series
        self.yielding = False
        """Whether somebody else serves already, and we are only there in case it does not go on."""
        self._handed_over: float | None = None
        self._on_left = on_left
        self._revision = revision
        self._prepare = prepare
        self._on_ready = on_ready
        self._on_stopping = on_stopping
        self._ended_restarts = restarts
        loop = asyncio.get_running_loop()
        self._stopping: asyncio.Future[None] = loop.create_future()
        self._cutting: asyncio.Future[None] = loop.create_future()
        self._hangup = asyncio.Event()
        # Room for a few earlier configurations that still drain.
        self._factory = WorkerFactory(max(8, 4 * revision.plan.workers), observers, nursery, denials)
        self._generations: list[Generation] = []
        self._in_force: Generation | None = None
        self._silent: set[WorkerProcess] = set()

    @property
    def plan(self) -> Plan:
        """The one in force."""
        return self._revision.plan

    @property
    def board(self) -> SharedBoard:
        """The health of ways, which all workers share."""
        return self._factory.board

    @property
    def stopping(self) -> asyncio.Future[None]:
        """Done when it has been told to stop, or to leave the service to somebody else."""
        return self._stopping

    @property
    def cutting(self) -> asyncio.Future[None]:
        """Done when connections are to end at once."""
        return self._cutting

    @property
    def hung_up(self) -> bool:
        """Whether a reload was asked for that has not begun."""
        return self._hangup.is_set()

    @property
    def restarts(self) -> int:
        """How many workers have been replaced."""
        return self._ended_restarts + sum(generation.restarts for generation in self._generations)

    @property
    def pids(self) -> dict[int, int]:
        """The process ids of the workers of the plan in force, by number."""
        return {} if self._in_force is None else {worker.number: worker.pid for worker in self._in_force.workers}

    @property
    def serving(self) -> list[WorkerProcess]:
        """The workers of the plan in force that serve."""
        return [] if self._in_force is None else self._in_force.serving

    @property
    def counts(self) -> WorkerCounts:
        """How the workers of the plan in force are."""
        generation = self._in_force
        if generation is None:
            return WorkerCounts(self.plan.workers, 0, None)
        since = generation.restarting_since
        serving = sum(worker not in self._silent for worker in generation.serving)
        return WorkerCounts(self.plan.workers, serving, None if since is None else time.monotonic() - since)

    def stop(self) -> None:
        """Drain and end; a second call cuts. SIGTERM and SIGINT do this. After :meth:`hand_over` the first call gives
        the drain the deadline that it has without one."""
        if self.yielding and not self._stopping.done():
            self.hand_over(self.plan.drain)
            return
        if self._handed_over is not None and self._handed_over > self.plan.drain:
            self._handed_over = self.plan.drain
            asyncio.get_running_loop().call_later(self.plan.drain, self.cut)
            return
        for future in (self._stopping, self._cutting):
            if not future.done():
                future.set_result(None)
                return

    def cut(self) -> None:
        """End all connections now, if the server drains."""
        if self._stopping.done() and not self._cutting.done():
            self._cutting.set_result(None)

    async def pause(self, seconds: float) -> None:
        """Have workers serve what waits for them and accept no more, for somebody else who goes on with their sockets.
        Raises :class:`WorkersFailed` if one does not, for so many seconds; :meth:`resume` undoes it in any case."""
        assert self._in_force is not None
        await self._in_force.pause(seconds)

    def resume(self) -> None:
        """Accept again, after :meth:`pause`."""
        if self._in_force is not None and not self._stopping.done():
            self._in_force.open()

    def hand_over(self, drain: float) -> None:
        """Somebody else serves now, with the sockets that the workers have after :meth:`pause`: :meth:`run` has them
        close these at once, drain for so many seconds, and end."""
        if not self._stopping.done():
            self._handed_over = drain
            self._stopping.set_result(None)

    def hang_up(self) -> None:
        """Reload when the start, or the reload that runs, is over. SIGHUP does this."""
        self._hangup.set()

    async def ask(self, topic: str, body: Json | None = None) -> dict[str, Json]:
        """Ask every worker that has served, those that drain too; return the answers by identity.

        A worker that ends meanwhile, or is silent for 5 s, is left out.
        """
        workers = [worker for generation in self._generations for worker in generation.serving]

        async def one(worker: WorkerProcess) -> Json | None:
            with contextlib.suppress(PeerClosed, RequestFailed, TimeoutError):
                async with asyncio.timeout(_ANSWER_SECONDS):
                    return await worker.channel.request(topic, body)
            return None

        answers = await asyncio.gather(*map(one, workers))
        return {worker.identity: answer for worker, answer in zip(workers, answers, strict=True) if answer is not None}

    async def run(self) -> None:
        """Serve until :meth:`stop`. Raises :class:`WorkersFailed` if the first workers do not come up, or what
        :meth:`Revision.enter` raises."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop)
        loop.add_signal_handler(signal.SIGHUP, self.hang_up)
        self.nursery.keep("the watch over workers", self._watch)
        try:
            await self._start()
            if not self._stopping.done():
                # Those that came while we started are answered now, with one reload.
                self.nursery.keep("reloading", self._reload_when_asked)
                await asyncio.wait((self._stopping,))
            await self._stop()
        finally:
            if not self._stopping.done():
                self._stopping.set_result(None)
            for generation in self._generations:
                generation.retire(linger=0, drain=0)
                for worker in generation.workers:
                    worker.signal(signal.SIGKILL)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                loop.remove_signal_handler(number)

    def close(self) -> None:
        """Give up what workers share, when all have ended."""
        self._factory.close()

    # -- start and stop ------------------------------------------------------------------------------------------

    def _new_generation(self, plan: Plan) -> Generation:
        used = {generation.index for generation in self._generations}
        # The lowest that is free: a worker's files of metrics are named for it, and their number is to stay bounded.
        index = next(index for index in range(len(used) + 1) if index not in used)
        generation = Generation(plan, f"{index}{self._series}", index, self._factory, self.nursery)
        self._generations.append(generation)
        return generation

    def _forget(self, generation: Generation) -> None:
        self._generations.remove(generation)
        self._ended_restarts += generation.restarts

    async def _start(self) -> None:
        generation = self._in_force = self._new_generation(self._revision.plan)
        await generation.start(self._stopping)
        if self._stopping.done():
            return
        await self._revision.enter()
        generation.open()
        self._on_ready()

    async def _stop(self) -> None:
        linger, drain = self.plan.linger, self.plan.drain
        if self._handed_over is None:
            linger = max(linger, self._on_stopping())
            log.info("stopping: connections have %g s to end (a second signal cuts them)", drain)
        else:
            linger, drain = 0.0, self._handed_over
        generations = list(self._generations)
        self._revision.stop()
        for generation in generations:
            generation.retire(linger=linger, drain=drain)
        self.nursery.start("closing the listeners", self._leave(generations))
        await asyncio.gather(
            *(generation.stop(linger=linger, drain=drain, cut=self._cutting) for generation in generations)
        )
        await self._leave(generations)

    async def _leave(self, generations: Sequence[Generation]) -> None:
        for generation in generations:
            await generation.stop_listening()
        await self._revision.leave()
        self._on_left()

    # -- reload --------------------------------------------------------------------------------------------------

    async def _reload_when_asked(self) -> None:
        while not self._stopping.done():
            await self._hangup.wait()
            async with self.reloading:
                if self._stopping.done():
                    return
                self._hangup.clear()  # all that came meanwhile are one
                try:
                    await self._reload()
                except (RamaError, OSError) as error:
                    log.error("reload failed, the old configuration stays: %s", error)
                else:
                    log.info("reloaded")

    async def reload(self) -> None:
        """Start workers of a new revision and, when all could serve, put it into force and drain those of the old one.

        Raises :class:`RamaError` or OSError if it cannot be made, its workers do not come up, or it cannot enter;
        then nothing has changed.
        """
        async with self.reloading:
            await self._reload()

    async def _reload(self) -> None:
        if self._prepare is None:
            raise RamaError("nothing to reload here")
        old_generation, old_revision = self._in_force, self._revision
        assert old_generation is not None
        revision = await self._prepare()
        generation = None
        try:
            if revision.plan.workers >= self._factory.room:
                raise RamaError("workers of earlier configurations still drain: try again later")
            generation = self._new_generation(revision.plan)
            await generation.start(self._stopping)
            if self._stopping.done():
                raise RamaError("the server stops")
            old_generation.supersede(True)
            await revision.enter()
        except BaseException:
            old_generation.supersede(False)
            if generation is not None:
                await generation.stop(linger=0, drain=0, cut=self._stopping)
                self._forget(generation)
            await revision.abandon()
            raise
        self._revision, self._in_force = revision, generation
        self.reloads += 1
        kept = old_revision.plan.shared_with(revision.plan)
        old_generation.retire(linger=_RELOAD_LINGER, drain=revision.plan.drain, kept=kept)
        if kept:
            await old_generation.release(_RELEASE_SECONDS)
        generation.open()
        self.nursery.start("an earlier revision", self._retire(old_revision, old_generation, revision.plan.drain))

    async def _retire(self, revision: Revision, generation: Generation, drain: float) -> None:
        self.nursery.start("closing its listeners", self._supersede(revision, generation))
        await generation.stop(linger=_RELOAD_LINGER, drain=drain, cut=self._cutting)
        self._forget(generation)

    @staticmethod
    async def _supersede(revision: Revision, generation: Generation) -> None:
        await generation.stop_listening()
        await revision.superseded()

    # -- watching ------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Tell of workers whose event loop does not turn; kill those that do not for a plan's ``watchdog`` seconds."""
        while True:
            before = time.monotonic()
            await asyncio.sleep(_WATCH_SECONDS)
            late = time.monotonic() - before - _WATCH_SECONDS
            workers = [worker for generation in self._generations for worker in generation.serving]
            self._silent.intersection_update(workers)
            for worker in [worker for generation in self._generations for worker in generation.workers]:
                worker.heard += late  # while we did not run ourselves nobody could be heard
                if worker.silent_for > worker.plan.watchdog:
                    log.error("worker %d (pid %d) hangs: silent for %.0f s", *self._silence(worker))
                    worker.signal(signal.SIGKILL)
            for worker in workers:
                # One that has drained is silent while its interpreter ends.
                is_silent = worker.silent_for > _SILENT_SECONDS and not worker.closed.done()
                if is_silent != (worker in self._silent):
                    self._tell(worker, is_silent)

    def _tell(self, worker: WorkerProcess, is_silent: bool) -> None:
        if is_silent:
            self._silent.add(worker)
            log.warning("worker %d (pid %d) does not answer for %.1f s", *self._silence(worker))
        else:
            self._silent.discard(worker)
            log.info("worker %d (pid %d) answers again", worker.number, worker.pid)
        if worker.superseded:
            return
        for observer in self._factory.observers:
            (observer.silent if is_silent else observer.serving)(worker)

    @staticmethod
    def _silence(worker: WorkerProcess) -> tuple[int, int, float]:
        return worker.number, worker.pid, worker.silent_for
