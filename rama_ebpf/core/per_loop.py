"""What there is one of for each event loop."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

__all__ = ["PerLoop"]

T = TypeVar("T")


class PerLoop(Generic[T]):
    """Called, returns the one of the running event loop; ``make`` makes it at the first call. It goes with the loop.

    A :class:`weakref.WeakKeyDictionary` does the same at four times the cost, and this is asked for each connection.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._made: dict[int, tuple[weakref.ref[asyncio.AbstractEventLoop], T]] = {}

    def __call__(self) -> T:
        return self.of(asyncio.get_running_loop())

    def of(self, loop: asyncio.AbstractEventLoop) -> T:
        """The one of ``loop``, which runs. Who has the loop need not ask who runs: in Python 3.11 a system call."""
        key = id(loop)
        found = self._made.get(key)
        if found is None:
            # The entry goes before another loop can have the same id.
            found = self._made[key] = (weakref.ref(loop, lambda _: self._made.pop(key)), self._make())
        return found[1]
