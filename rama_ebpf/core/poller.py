"""Which sockets can be read or written: one epoll instance, edge-triggered, beside the event loop's own.

A socket is registered once for its whole life, whoever waits for it: first a stream's reader and writer, later the
relay. Its watcher is told of *changes* (epoll(7), EPOLLET), so it tries first and waits only after EAGAIN. The event
loop sees one readable descriptor, the epoll's; one wake-up of it serves many sockets with one epoll_wait(2), and costs
no registration, handle or time-out per wait.
"""

from __future__ import annotations

import asyncio
import logging
import select
import weakref
from collections.abc import Callable
from typing import Final

from .per_loop import PerLoop

__all__ = ["READABLE", "SPECIAL", "WRITABLE", "Poller", "Watcher"]

log = logging.getLogger(__name__)

Watcher = Callable[[int], None]
"""Called with the events (EPOLLIN, …) of its socket."""

READABLE: Final[int] = select.EPOLLIN
WRITABLE: Final[int] = select.EPOLLOUT
SPECIAL: Final[int] = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR | select.EPOLLPRI
"""The peer has ended its stream or reset it, or has sent urgent data."""

_ALWAYS: Final = select.EPOLLRDHUP | select.EPOLLET
# The kernel wakes who polls for urgent data with every byte that comes, so the two go together.
_READS: Final = _ALWAYS | select.EPOLLIN | select.EPOLLPRI
_READS_AND_WRITES: Final = _READS | WRITABLE
_EVENTS_PER_WAKE: Final = 256


class Poller:
    """The sockets of one event loop. It holds one descriptor for as long as there is the loop.

    To be made in that loop. Raises OSError if there is no descriptor to be had.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        loop = asyncio.get_running_loop()
        self._loop = weakref.ref(loop)  # the poller goes with its loop
        loop.add_reader(self._epoll.fileno(), self._run)
        self._watchers: dict[int, Watcher] = {}
        self._masks: dict[int, int] = {}

    @staticmethod
    def current() -> Poller:
        """Return the poller of the running event loop; the first call makes it."""
        return _current()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop that it belongs to. Who has the poller need not ask who runs: in Python 3.11 that is a system
        call."""
        loop = self._loop()
        assert loop is not None
        return loop

    def add(self, fd: int, watcher: Watcher, *, writes: bool = False) -> None:
        """Let ``watcher`` be told when there are bytes, the peer's end, a reset, or urgent data, and with ``writes``
        when there is room; at once if there is any of it now.

        Room is asked for later by most (:meth:`want_writes`): every new socket has some, and to be told so is a
        wake-up for nothing. Raises OSError if the kernel watches no more sockets (epoll(7), max_user_watches).
        """
        mask = _READS_AND_WRITES if writes else _READS
        self._epoll.register(fd, mask)
        self._watchers[fd] = watcher
        self._masks[fd] = mask

    def replace(self, fd: int, watcher: Watcher) -> None:
        """Let another watcher be told from now on. What the one before has been told is not told again."""
        self._watchers[fd] = watcher

    def watch(self, fd: int, *, reads: bool, writes: bool) -> None:
        """Say what is told besides the peer's end and resets; what is so now is told once more."""
        mask = (_READS if reads else _ALWAYS) | (WRITABLE if writes else 0)
        self._epoll.modify(fd, mask)
        self._masks[fd] = mask

    def want_writes(self, fd: int) -> None:
        """Tell of room, too, from now on: after the first EAGAIN of a write. No room that comes meanwhile is missed."""
        mask = self._masks[fd]
        if not mask & WRITABLE:
            self._epoll.modify(fd, mask | WRITABLE)
            self._masks[fd] = mask | WRITABLE

    def remove(self, fd: int) -> None:
        """Forget a socket that stays open."""
        del self._watchers[fd], self._masks[fd]
        self._epoll.unregister(fd)

    def closing(self, fd: int) -> None:
        """Forget a socket whose only descriptor is closed next: that ends the kernel's watch as well (epoll(7)). Where
        somebody holds a copy of the descriptor, its events are nobody's, and are dropped."""
        del self._watchers[fd], self._masks[fd]

    def fileno(self) -> int:
        """The descriptor of the epoll instance."""
        return self._epoll.fileno()

    def _run(self) -> None:
        watchers = self._watchers
        for fd, events in self._epoll.poll(0, _EVENTS_PER_WAKE):
            watcher = watchers.get(fd)
            if watcher is None:
                continue  # an earlier event of this batch has ended it
            try:
                watcher(events)
            except Exception:
                # A bug must not take the events of the other sockets with it: an edge comes only once.
                log.exception("watcher of descriptor %d failed", fd)


_current: Final = PerLoop(Poller)
