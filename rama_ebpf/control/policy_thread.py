"""The one thread that changes the policy: the event loop never waits for a lock, a disk or the kernel's tables.

What workers ask for is done in the order in which it came, each worker has a share of the queue and a rate, and no
caller can make it longer than it is.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import queue
import threading
from collections.abc import Callable
from typing import Any, Final, TypeVar

from ..core.errors import RamaError

__all__ = ["PolicyThread", "QueueFull"]

log = logging.getLogger("rama_ebpf")

T = TypeVar("T")

_QUEUE: Final = 1024


class QueueFull(RamaError):
    """More changes wait than there is room for."""

    kind = "queue_full"


class PolicyThread:
    """A context manager. Its thread is not waited for at the end if it is held up: the process may end without it."""

    def __init__(self) -> None:
        self._work: queue.Queue[Callable[[], None] | None] = queue.Queue(_QUEUE)
        self._thread = threading.Thread(target=self._run, name="policy", daemon=True)

    def __enter__(self) -> PolicyThread:
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        try:
            self._work.put_nowait(None)
        except queue.Full:
            return
        self._thread.join(1)

    def submit(self, work: Callable[[], T]) -> asyncio.Future[T]:
        """Have ``work`` done after all that was submitted before; what it returns or raises is the future's. Cancelled
        before its turn, it is not done. Raises :class:`QueueFull`."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        context = contextvars.copy_context()

        def once() -> None:
            if future.cancelled():
                return
            try:
                result = context.run(work)
            except BaseException as error:  # noqa: BLE001  # it is its caller's
                tell(_fail, future, error)
            else:
                tell(_succeed, future, result)

        def tell(how: Callable[..., None], *args: Any) -> None:
            try:
                loop.call_soon_threadsafe(how, *args)
            except RuntimeError:
                log.debug("the event loop has ended before the policy thread")

        try:
            self._work.put_nowait(once)
        except queue.Full:
            raise QueueFull(f"{_QUEUE} changes of the policy wait already") from None
        return future

    async def run(self, work: Callable[[], T]) -> T:
        """Have ``work`` done, and wait for it. Raises what it raises, or :class:`QueueFull`."""
        return await self.submit(work)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()


def _succeed(future: asyncio.Future[T], result: T) -> None:
    if not future.done():
        future.set_result(result)


def _fail(future: asyncio.Future[T], error: BaseException) -> None:
    if not future.done():
        future.set_exception(error)
