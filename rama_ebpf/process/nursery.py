"""The one owner of all long-running work on the supervisor's event loop.

Work that nobody watches dies unseen: so nothing is created beside the nursery, and whatever ends with an error is
logged and counted. What must go on is started again, after a growing pause.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from types import TracebackType
from typing import Any, Final, TypeVar

from ..core.errors import RamaError

__all__ = ["BackOff", "Nursery"]

log = logging.getLogger("rama_ebpf.supervisor")

T = TypeVar("T")

_FIRST_PAUSE: Final = 1.0
_LAST_PAUSE: Final = 60.0


class BackOff:
    """Pauses between attempts, in seconds: ``first``, then each twice the one before up to ``last``."""

    def __init__(self, first: float, last: float) -> None:
        self._first = first
        self._last = last
        self._pause = 0.0

    def fail(self) -> float:
        """Return the pause after one more failure."""
        self._pause = min(max(self._pause * 2, self._first), self._last)
        return self._pause

    def succeed(self) -> None:
        """Begin anew."""
        self._pause = 0.0


class Nursery:
    """An async context manager; what is under way when its block ends is cancelled and waited for.

    ``failures`` counts, by name, what ended with an error; several may count together.
    """

    def __init__(self, failures: Counter[str] | None = None) -> None:
        self.failures: Counter[str] = Counter() if failures is None else failures
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closing = False

    async def __aenter__(self) -> Nursery:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing = True
        while self._tasks:
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks, timeout=1)  # again: a task may have swallowed it

    def start(self, name: str, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run ``work`` once. If it fails that is logged and counted, also if somebody awaits the task."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def keep(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        """Run ``work`` again and again whenever it fails, until it returns."""
        self.start(name, self._keep(name, work))

    async def _keep(self, name: str, work: Callable[[], Awaitable[None]]) -> None:
        back_off = BackOff(_FIRST_PAUSE, _LAST_PAUSE)
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            try:
                await work()
            except Exception as error:
                if loop.time() - began > _LAST_PAUSE:
                    back_off.succeed()
                pause = back_off.fail()
                self.failures[name] += 1
                told = None if isinstance(error, OSError | RamaError) else error
                log.error("%s failed, and starts again in %g s: %s", name, pause, error, exc_info=told)
                await asyncio.sleep(pause)
            else:
                return

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.failures[task.get_name()] += 1
            told = None if isinstance(error, OSError | RamaError) else error
            log.error("%s failed: %s", task.get_name(), error, exc_info=told)
