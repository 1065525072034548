"""The smallest event loop: descriptors, and what is called when something happens to them."""

from __future__ import annotations

import select
from collections.abc import Callable

__all__ = ["Reactor"]


class Reactor:
    """One epoll instance, level-triggered."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}

    def add(self, fd: int, events: int, handler: Callable[[int], None]) -> None:
        """Call ``handler`` with the events of epoll(7), as long as there are any. Raises OSError."""
        self._epoll.register(fd, events)
        self._handlers[fd] = handler

    def change(self, fd: int, events: int) -> None:
        """Tell of other events."""
        self._epoll.modify(fd, events)

    def remove(self, fd: int) -> None:
        """Tell of it no more."""
        del self._handlers[fd]
        self._epoll.unregister(fd)

    def turn(self, seconds: float) -> None:
        """Wait until something happens, for at most so long, and call who is concerned."""
        for fd, events in self._epoll.poll(seconds, 256):
            handler = self._handlers.get(fd)
            if handler is not None:  # an earlier one has not removed it
                handler(events)

    def close(self) -> None:
        """Give the descriptor up."""
        self._epoll.close()
