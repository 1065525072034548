"""How many connections or requests are served at once, altogether or per source."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Hashable
from typing import Any

from ..core.client import HasExtensions
from ..core.errors import LimitExceeded
from ..core.service import Service
from .source import Key

__all__ = ["ConcurrencyExceeded", "ConcurrencyLimitLayer"]


class ConcurrencyExceeded(LimitExceeded):
    """As many as allowed are being served already."""

    kind = "concurrency_limit"


class ConcurrencyLimitLayer:
    """Serves at most ``limit`` (at least 1) inputs at once for each ``key``, or altogether without one.

    What comes above that waits up to ``wait`` seconds for its turn, first come first served, and at most ``queue``
    wait per key (default: ``limit``); with ``wait`` 0 it is refused at once. A place is held until the service
    returns, so a tunnel counts for as long as it lives. Raises :class:`ConcurrencyExceeded`.

    The count is this process's own: with N workers the host serves up to N times as many.
    """

    def __init__(self, limit: int, *, key: Key | None = None, wait: float = 0.0, queue: int | None = None) -> None:
        if limit < 1:
            raise ValueError(f"limit must be at least 1, not {limit}")
        self.limit = limit
        self._key = key
        self._wait = wait
        self._queue = (limit if queue is None else queue) if wait > 0 else 0
        self._live: dict[Hashable, int] = {}
        self._waiting: dict[Hashable, deque[asyncio.Future[None]]] = {}

    @property
    def live(self) -> int:
        """How many are being served, over all keys."""
        return sum(self._live.values())

    def __call__(self, inner: Service[Any, Any]) -> Service[Any, Any]:
        async def serve(input: HasExtensions) -> Any:
            key = None if self._key is None else self._key(input)
            live = self._live.get(key, 0)
            if live < self.limit:
                self._live[key] = live + 1
            else:
                await self._wait_for_place(key)
            try:
                return await inner(input)
            finally:
                self._release(key)

        return serve

    async def _wait_for_place(self, key: Hashable) -> None:
        waiting = self._waiting.get(key)
        if len(waiting or ()) >= self._queue:
            raise ConcurrencyExceeded(f"{self.limit} are being served and {len(waiting or ())} wait")
        if waiting is None:
            waiting = self._waiting[key] = deque()
        place = asyncio.get_running_loop().create_future()
        waiting.append(place)
        try:
            async with asyncio.timeout(self._wait):
                await place
        except BaseException as error:
            if place.done() and not place.cancelled():
                self._release(key)  # the place came in the very moment in which we gave up: hand it on
            elif place in waiting:
                self._forget(key, waiting, place)
            if isinstance(error, TimeoutError):
                raise ConcurrencyExceeded(f"no place within {self._wait} s: {self.limit} are being served") from error
            raise

    def _forget(self, key: Hashable, waiting: deque[asyncio.Future[None]], place: asyncio.Future[None]) -> None:
        waiting.remove(place)
        if not waiting:
            del self._waiting[key]

    def _release(self, key: Hashable) -> None:
        waiting = self._waiting.get(key)
        while waiting:
            place = waiting[0]
            self._forget(key, waiting, place)
            if not place.done():
                place.set_result(None)  # the count stays: the place changes hands
                return
        live = self._live[key] - 1
        if live:
            self._live[key] = live
        else:
            del self._live[key]
