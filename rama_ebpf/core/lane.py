"""The callback path: a task stands aside while callbacks on the poller do its work, and comes back for what must wait.

A task, a future and a timer for each message cost more than the message. So what decides at once is done where the
poller tells of bytes: read, decide, write. The task of the connection is parked meanwhile; it is resumed with an
outcome as soon as something must wait: a layer that is asynchronous, a password, a name, a pending connect, a body, a
peer that takes nothing, an error that is to be told in order. Whoever parks owns a :class:`~.deadline.Deadline` and
starts it before; callbacks prolong it, and when it expires, or the connection is cut, the task is cancelled where it
is parked.

While callbacks have a stream, no task may read it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar, cast

from .socket_stream import SocketStream

__all__ = ["Lane"]

T = TypeVar("T")


class Lane(Generic[T]):
    """Where one task is parked. Outcomes are of type ``T``."""

    __slots__ = ("_outcome", "_parked", "_streams", "open")

    def __init__(self) -> None:
        self.open = False
        """Whether callbacks have the connection: a task is parked, and was not resumed yet."""
        self._parked: asyncio.Future[None] | None = None
        self._outcome: T | None = None
        self._streams: list[SocketStream] = []

    def lend(self, stream: SocketStream, watcher: Callable[[int], None]) -> None:
        """Let ``watcher`` be told of the events of ``stream`` (:mod:`.poller`) until :meth:`take_back`, or until the
        task goes on. Raises OSError if the kernel watches no more sockets."""
        stream.tell(watcher)
        self._streams.append(stream)

    def take_back(self, stream: SocketStream) -> None:
        """Callbacks have done with a stream."""
        stream.tell(None)
        self._streams.remove(stream)

    async def park(self, begin: Callable[[], None]) -> T:
        """Call ``begin``, the first callback, and wait for the outcome. The streams are the task's again then, also
        when it is cancelled."""
        self._outcome = None
        self.open = True
        try:
            begin()
            if self.open:
                self._parked = asyncio.get_running_loop().create_future()
                await self._parked
            return cast("T", self._outcome)
        finally:
            self.open = False
            self._parked = None
            for stream in self._streams:
                stream.tell(None)
            self._streams.clear()

    def resume(self, outcome: T) -> None:
        """Let the task go on with ``outcome``; callbacks must do nothing more."""
        self._outcome = outcome
        self.open = False
        if self._parked is not None and not self._parked.done():
            self._parked.set_result(None)
