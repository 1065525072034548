"""How many connections or requests are served at once, altogether or per source."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Hashable
from typing import Final

from ..core.adoption import AdoptedStream
from ..core.at_once import NOTHING, Entered
from ..core.client import Carrier
from ..core.counts import UNLIMITED, Counts, LocalCounts, SharesCounts
from ..core.errors import LimitExceeded
from ..core.first_bytes import FirstBytes
from ..core.service import Output, Service, check_key
from .source import Key

__all__ = ["ConcurrencyExceeded", "ConcurrencyLimitLayer"]

_POLL_SECONDS: Final = 0.05


class ConcurrencyExceeded(LimitExceeded):
    """As many as allowed are being served already."""

    kind = "concurrency_limit"


class ConcurrencyLimitLayer:
    """Serves at most ``limit`` (at least 1) inputs at once for each ``key``, or altogether without one.

    What comes above that waits up to ``wait`` seconds for its turn, first come first served, and at most ``queue``
    wait per key (default: ``limit``); with ``wait`` 0 it is refused at once. A place is held until the service
    returns, so a tunnel counts for as long as it lives. Raises :class:`ConcurrencyExceeded`.

    With ``shared`` the limit is one for all processes that share it, and exact; who waits is then first come first
    served within each process. Without it each process counts for itself.
    """

    def __init__(
        self,
        limit: int,
        *,
        key: Key | None = None,
        wait: float = 0.0,
        queue: int | None = None,
        shared: SharesCounts | None = None,
    ) -> None:
        if limit < 1:
            raise ValueError(f"limit must be at least 1, not {limit}")
        self.limit = limit
        self.live = 0
        """How many this layer is serving, over all keys."""
        check_key(self, key)
        self._key = key
        self._wait = wait
        self._queue = (limit if queue is None else queue) if wait > 0 else 0
        self._counts: Counts = LocalCounts() if shared is None else shared.counts()
        # Of a place that another process has left nobody tells us.
        self._poll = None if shared is None else _POLL_SECONDS
        self._waiting: dict[Hashable, deque[asyncio.Event]] = {}

    def first_bytes(self, inner: FirstBytes | None) -> FirstBytes | None:
        """First bytes are judged as inside: what is refused by them needs nothing of this layer."""
        return inner

    def __call__(self, inner: Service[Carrier, Output], /) -> Service[Carrier, Output]:
        async def serve(input: Carrier, /) -> Output:
            key = None if self._key is None else self._key(input)
            # Who comes later does not overtake those who wait.
            if key in self._waiting or not self._counts.enter(key, self.limit):
                await self._wait_for_place(key)
            self.live += 1
            try:
                return await inner(input)
            finally:
                self._left(key)

        return serve

    def adopt(self, stream: AdoptedStream) -> Entered:
        """Count it, also above the limit (:mod:`rama_ebpf.core.adoption`)."""
        key = None if self._key is None else self._key(stream)
        if not self._counts.enter(key, UNLIMITED):
            return NOTHING
        self.live += 1
        return _Place(self, key)

    def _left(self, key: Hashable) -> None:
        self.live -= 1
        self._counts.leave(key)
        self._wake_first(key)

    def _wake_first(self, key: Hashable) -> None:
        waiting = self._waiting.get(key)
        if waiting:
            waiting[0].set()

    async def _wait_for_place(self, key: Hashable) -> None:
        waiting = self._waiting.get(key)
        if len(waiting or ()) >= self._queue:
            raise ConcurrencyExceeded(f"{self.limit} are being served and {len(waiting or ())} wait")
        if waiting is None:
            waiting = self._waiting[key] = deque()
        turn = asyncio.Event()
        waiting.append(turn)
        try:
            async with asyncio.timeout(self._wait):
                while waiting[0] is not turn or not self._counts.enter(key, self.limit):
                    turn.clear()
                    await self._woken(turn)
        except TimeoutError as error:
            raise ConcurrencyExceeded(f"no place within {self._wait} s: {self.limit} are being served") from error
        finally:
            waiting.remove(turn)
            if waiting:
                self._wake_first(key)  # also where we give up in the very moment in which our turn has come
            else:
                del self._waiting[key]

    async def _woken(self, turn: asyncio.Event) -> None:
        try:
            async with asyncio.timeout(self._poll):
                await turn.wait()
        except TimeoutError:
            return  # look for a place that another process has left


class _Place:
    """The place of a connection that was adopted."""

    __slots__ = ("_key", "_layer")

    def __init__(self, layer: ConcurrencyLimitLayer, key: Hashable) -> None:
        self._layer = layer
        self._key = key

    def leave(self, _error: BaseException | None, /) -> None:
        """Give it back."""
        self._layer._left(self._key)
