"""One timer for all the waits of a task: a wait costs two assignments, and no timer of its own."""

from __future__ import annotations

import asyncio

__all__ = ["Deadline"]


class Deadline:
    """``start(seconds)`` before an await, ``stop()`` behind it: when the time is up, the task that called start is
    cancelled, and :meth:`expired` tells its ``except CancelledError`` so.

    As :func:`asyncio.timeout`, for who waits often and seldom in vain: the timer stays where it is and looks again when
    it fires. To be used by one task at a time; :meth:`close` it at the end.
    """

    __slots__ = ("_due", "_fired", "_loop", "_task", "_timer", "_when")

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self._loop = asyncio.get_running_loop() if loop is None else loop
        self._task: asyncio.Task[object] | None = None
        self._due = 0.0
        self._when = 0.0
        self._fired = False
        self._timer: asyncio.TimerHandle | None = None

    def start(self, seconds: float) -> None:
        """The running task has ``seconds`` from now; an earlier start is forgotten."""
        self._task = asyncio.current_task(self._loop)
        self.prolong(seconds)

    def prolong(self, seconds: float) -> None:
        """The task that called start has ``seconds`` from now; for callbacks that work in its place."""
        self._due = due = self._loop.time() + seconds
        if self._timer is None:
            self._arm(due)
        elif self._when > due:
            self._timer.cancel()
            self._arm(due)

    def stop(self) -> None:
        """It waits no more."""
        self._due = 0.0

    def hurry(self) -> None:
        """Let the time be up now, for a task that waits."""
        if self._due:
            self._due = self._loop.time()
            if self._timer is not None:
                self._timer.cancel()
            self._arm(self._due)

    def expired(self) -> bool:
        """Whether it was this that cancelled the task, and nobody else did as well; to be asked once, in ``except
        CancelledError``."""
        self._due = 0.0
        if not self._fired:
            return False
        self._fired = False
        assert self._task is not None
        return self._task.uncancel() == 0

    def close(self) -> None:
        """Let the timer go."""
        self._due = 0.0
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self._fired:
            self._task = None  # nor any cycle with what it holds

    def _arm(self, when: float) -> None:
        self._when = when
        self._timer = self._loop.call_at(when, self._look)

    def _look(self) -> None:
        self._timer = None
        if not self._due:
            return
        if self._loop.time() < self._due:
            self._arm(self._due)
            return
        assert self._task is not None
        self._due = 0.0
        self._fired = True
        self._task.cancel()
