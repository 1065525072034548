"""Upstream connections, kept for the next request to the same origin."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from typing import Final

from ...core.address import Authority
from ...core.service import Service
from ...core.stream import Stream
from .h1_client import H1ClientConnection, NoResponse
from .limits import HttpLimits, HttpTimeouts
from .model import Request, Response

__all__ = ["IDEMPOTENT", "ConnectionPool", "PoolLimits", "repeatable"]

IDEMPOTENT: Final = frozenset({"GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"})
"""Methods that may be repeated (RFC 9110 section 9.2.2)."""


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """``idle_per_origin`` and ``idle`` bound the connections that are kept unused, ``keep`` (seconds) how long."""

    idle_per_origin: int = 32
    idle: int = 256
    keep: float = 15.0


@dataclass(slots=True)
class _Idle:
    connection: H1ClientConnection
    timer: asyncio.TimerHandle


def repeatable(request: Request) -> bool:
    """Whether the same request may be sent again after a first attempt without a response."""
    return request.method in IDEMPOTENT and request.body.length == 0 and request.upgrade is None


class ConnectionPool:
    """Sends requests over connections that ``connector`` makes.

    A kept connection may have been closed by the upstream a moment ago, so only requests that are safe to repeat are
    sent on one, and they are repeated, once, on a new one. Others get a new connection.
    """

    def __init__(
        self,
        connector: Service[Authority, Stream],
        *,
        pool_limits: PoolLimits | None = None,
        limits: HttpLimits | None = None,
        timeouts: HttpTimeouts | None = None,
    ) -> None:
        self._connector = connector
        self._pool_limits = PoolLimits() if pool_limits is None else pool_limits
        self._limits = HttpLimits() if limits is None else limits
        self._timeouts = HttpTimeouts() if timeouts is None else timeouts
        self._idle: dict[Authority, list[_Idle]] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._idle_count = 0
        self._closed = False
        self._busy: Counter[Authority] = Counter()

    def busy(self, target: Authority) -> int:
        """How many requests and tunnels to ``target`` are under way."""
        return self._busy[target]

    @property
    def idle(self) -> int:
        """How many connections are kept unused."""
        return self._idle_count

    async def send(
        self, request: Request, target: Authority, *, connector: Service[Authority, Stream] | None = None
    ) -> Response:
        """Send ``request`` to ``target``. Raises what connecting raises, or :class:`~.errors.HttpError`.

        ``connector``, if given, connects for this request alone, and its connection is not kept.
        """
        if connector is None and repeatable(request):
            kept = self._take(target)
            if kept is not None:
                self._busy[target] += 1
                try:
                    return await kept.send(request)
                except NoResponse:
                    pass  # closed meanwhile: again, on a new one
        self._busy[target] += 1
        try:
            stream = await (connector or self._connector)(target)
        except BaseException:
            self._unbusy(target)
            raise
        connection = H1ClientConnection(
            stream,
            limits=self._limits,
            timeouts=self._timeouts,
            released=lambda connection: self._released(target, connection, keep=connector is None),
        )
        return await connection.send(request)

    def close(self) -> None:
        """Close what is idle; what is in use is closed after its response."""
        self._closed = True
        for target in list(self._idle):
            while (connection := self._take(target)) is not None:
                self._close_unused(connection)

    async def wait_closed(self) -> None:
        """Return when the connections that :meth:`close` found idle are closed."""
        await asyncio.gather(*self._closing, return_exceptions=True)

    def _take(self, target: Authority) -> H1ClientConnection | None:
        kept = self._idle.get(target)
        while kept:
            idle = kept.pop()
            idle.timer.cancel()
            self._idle_count -= 1
            if not kept:
                del self._idle[target]
            if idle.connection.quiet:
                return idle.connection
            self._close_unused(idle.connection)
        return None

    def _unbusy(self, target: Authority) -> None:
        self._busy[target] -= 1
        if not self._busy[target]:
            del self._busy[target]

    def _released(self, target: Authority, connection: H1ClientConnection, *, keep: bool) -> None:
        self._unbusy(target)
        if not connection.reusable:
            return
        limits = self._pool_limits
        full = self._idle_count >= limits.idle or len(self._idle.get(target, ())) >= limits.idle_per_origin
        if self._closed or full or not keep:
            self._close_unused(connection)
            return
        timer = asyncio.get_running_loop().call_later(limits.keep, self._expire, target, connection)
        self._idle.setdefault(target, []).append(_Idle(connection, timer))
        self._idle_count += 1

    def _expire(self, target: Authority, connection: H1ClientConnection) -> None:
        kept = self._idle[target]
        self._idle[target] = [idle for idle in kept if idle.connection is not connection]
        self._idle_count -= len(kept) - len(self._idle[target])
        if not self._idle[target]:
            del self._idle[target]
        self._close_unused(connection)

    def _close_unused(self, connection: H1ClientConnection) -> None:
        task = asyncio.get_running_loop().create_task(connection.stream.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
