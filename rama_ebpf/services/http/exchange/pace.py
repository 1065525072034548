"""Bounds how long a body is waited for, and how slowly a client may send one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from ..message.limits import HttpTimeouts

__all__ = ["Pace"]


class Pace:
    """Counts how long a body was waited for and how much came. Time in which nobody waited, because the other side
    of the proxy was slow, does not count against the sender.

    ``client``: a client sends the body, and the minimum rate holds. An upstream owes nobody a rate: it may have
    nothing to say for long.
    """

    def __init__(self, timeouts: HttpTimeouts, *, client: bool) -> None:
        self._timeouts = timeouts
        self._rate = timeouts.body_rate if client else 0.0
        self._waited = 0.0
        self.received = 0
        """Bytes of the body so far; the reader adds to it."""

    async def wait(self, read: Callable[[], Awaitable[None]]) -> None:
        """Await ``read()``. Raises TimeoutError if it takes too long, or the average has become too low."""
        limits = self._timeouts
        loop = asyncio.get_running_loop()
        before = loop.time()
        async with asyncio.timeout(limits.body):
            await read()
        self._waited += loop.time() - before
        if self._waited > limits.body_grace and self.received < self._rate * self._waited:
            raise TimeoutError(f"{self.received} bytes of a body in {self._waited:.0f} s of waiting")
