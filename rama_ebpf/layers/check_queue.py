"""Checks of passwords in a few threads, shared fairly between sources.

Sources that have not failed lately come first, each in turn; those that have come behind them, each in turn, but
every eighth check is theirs, so that somebody who mistyped behind a NAT of guessers gets in as well. A check whose
client has gone is dropped. What finds no room or no time is :class:`~rama_ebpf.core.errors.Busy`: ours, never a
strike.
"""

from __future__ import annotations

import asyncio
import functools
import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

from ..core.errors import Busy
from ..core.shares import Held, SourceShare

__all__ = ["CheckQueue"]

_SUSPECT_SECONDS: Final = 600.0
_MAX_SUSPECTS: Final = 65536
_SUSPECTS_TURN: Final = 8
_NICENESS: Final = 4
"""Above the process's own. The event loop gets 71 % of a CPU that they share. With 10 a check of 0.1 s took 13 s on a
busy host."""


@dataclass(eq=False, slots=True)
class _Wait:
    source: Hashable
    check: Callable[[], bool]
    future: asyncio.Future[bool]


_Line = OrderedDict[Hashable, deque[_Wait]]


class CheckQueue:
    """Runs blocking checks in ``threads`` threads; their memory is so many times that of one check.

    As many checks of one source wait as ``share`` lets in, ``total`` altogether, each up to ``longest`` seconds. When
    all room is taken, the source that has most waiting loses its newest. ``observe`` is called with the outcome of each
    check: ``right``, ``wrong``, ``busy``, or ``dropped`` where its client has left.
    """

    def __init__(
        self,
        *,
        threads: int = 1,
        share: SourceShare | None = None,
        total: int = 1024,
        longest: float = 30.0,
        observe: Callable[[str], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if threads < 1 or total < 1 or longest <= 0:
            raise ValueError("threads, total and longest must be above 0")
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="auth", initializer=_give_way)
        self._threads = threads
        self._share = SourceShare(Held.CHECKS) if share is None else share
        self._total = total
        self._longest = longest
        self._observe: Final[Callable[[str], None]] = observe or (lambda _outcome: None)
        self._clock = clock
        self._clean: _Line = OrderedDict()
        self._suspect: _Line = OrderedDict()
        self._failed_at: OrderedDict[Hashable, float] = OrderedDict()
        self._running = 0
        self._turn = 0
        self.waiting = 0
        """How many checks wait."""
        self.refused = 0
        """How many were refused for want of room or time."""

    async def run(self, source: Hashable, check: Callable[[], bool]) -> bool:
        """Return what ``check`` returns. Raises :class:`Busy`, or what it raises; cancelled, it is dropped."""
        wait = _Wait(source, check, asyncio.get_running_loop().create_future())
        self._enter(wait)
        self._pump()
        try:
            async with asyncio.timeout(self._longest):
                correct = await wait.future
        except TimeoutError:
            raise self._busy(f"not checked within {self._longest:g} s") from None
        except asyncio.CancelledError:
            self._observe("dropped")
            raise
        else:
            self._observe("right" if correct else "wrong")
            return correct
        finally:
            self._drop(wait)

    def failed(self, source: Hashable) -> None:
        """Note that ``source`` gave a wrong password: for 10 minutes others come first."""
        self._failed_at[source] = self._clock()
        self._failed_at.move_to_end(source)
        if len(self._failed_at) > _MAX_SUSPECTS:
            self._failed_at.popitem(last=False)
        line = self._clean.pop(source, None)
        if line is not None:
            self._suspect[source] = line

    def _is_suspect(self, source: Hashable) -> bool:
        return self._clock() - self._failed_at.get(source, float("-inf")) < _SUSPECT_SECONDS

    def _busy(self, why: str) -> Busy:
        self.refused += 1
        self._observe("busy")
        return Busy(f"password {why}: {self.waiting} checks wait", retry_after=2.0)

    def _enter(self, wait: _Wait) -> None:
        source = wait.source
        line = self._clean.get(source) or self._suspect.get(source)
        if self._share.limit and line is not None and len(line) >= self._share.limit:
            self.refused += 1
            self._observe("busy")
            raise self._share.refusal()
        if self.waiting >= self._total:
            self._make_room(0 if line is None else len(line), suspect=self._is_suspect(source))
        line = self._clean.get(source) or self._suspect.get(source)
        if line is None:
            line = deque()
            (self._suspect if self._is_suspect(source) else self._clean)[source] = line
        line.append(wait)
        self.waiting += 1

    def _make_room(self, mine: int, *, suspect: bool) -> None:
        """Refuse the newest check of the source that has most waiting, of suspects first. Raises :class:`Busy`."""
        longest = max(self._suspect.values(), key=len, default=deque[_Wait]())
        if suspect or not longest:
            longest = max((longest, *self._clean.values()), key=len) if not suspect else longest
            if len(longest) <= mine + 1:
                raise self._busy("finds no room")
        victim = longest[-1]
        self._drop(victim)
        victim.future.set_exception(self._busy("had to give its place away"))

    def _drop(self, wait: _Wait) -> None:
        for sources in (self._clean, self._suspect):
            line = sources.get(wait.source)
            if line is not None and wait in line:
                line.remove(wait)
                self.waiting -= 1
                if not line:
                    del sources[wait.source]

    def _next(self) -> _Wait | None:
        self._turn += 1
        first, second = self._clean, self._suspect
        if self._turn % _SUSPECTS_TURN == 0:
            first, second = second, first
        sources = first or second
        if not sources:
            return None
        source, line = next(iter(sources.items()))
        wait = line.popleft()
        self.waiting -= 1
        if line:
            sources.move_to_end(source)
        else:
            del sources[source]
        return wait

    def _pump(self) -> None:
        while self._running < self._threads and (wait := self._next()) is not None:
            try:
                running = asyncio.get_running_loop().run_in_executor(self._pool, wait.check)
            except RuntimeError as error:  # no thread can be started
                wait.future.set_exception(self._busy(f"cannot be checked ({error})"))
                continue
            self._running += 1
            running.add_done_callback(functools.partial(self._done, wait))

    def _done(self, wait: _Wait, running: asyncio.Future[bool]) -> None:
        self._running -= 1
        error = None if running.cancelled() else running.exception()
        if not wait.future.done():
            if error is not None:
                wait.future.set_exception(error)
            elif running.cancelled():
                wait.future.cancel()
            else:
                wait.future.set_result(running.result())
        self._pump()


def _give_way() -> None:
    # The event loop goes first: a thread of Linux has a niceness of its own.
    thread = threading.get_native_id()
    os.setpriority(os.PRIO_PROCESS, thread, min(19, os.getpriority(os.PRIO_PROCESS, thread) + _NICENESS))
