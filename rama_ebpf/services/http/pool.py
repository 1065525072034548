"""Upstream connections, kept for the next request to the same origin."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Hashable
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

from ...core.address import Authority
from ...core.request_log import Upstream
from ...core.service import Service
from ...core.socket_stream import SocketStream
from ...core.stream import Stream
from ...core.target import Target
from ..tls.stream import TlsParameters
from .h1_client import H1ClientConnection, NoResponse
from .h2_client import H2ClientConnection
from .limits import HttpLimits, HttpTimeouts, OriginOptions
from .model import Request, Response

__all__ = ["IDEMPOTENT", "ConnectionPool", "Origins", "PoolLimits", "repeatable"]

_SAFE: Final = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})

Origins = Callable[[Authority], OriginOptions]
"""Says how a target is to be treated."""

IDEMPOTENT: Final = frozenset({"GET", "HEAD", "OPTIONS", "TRACE", "PUT", "DELETE"})
"""Methods that may be repeated (RFC 9110 section 9.2.2)."""


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """``idle_per_origin`` and ``idle`` bound the connections that are kept unused, ``keep`` (seconds) how long."""

    idle_per_origin: int = 32
    idle: int = 256
    keep: float = 15.0


_Key = tuple[Authority, Hashable]


class _Idle(NamedTuple):
    connection: H1ClientConnection
    since: float


def repeatable(request: Request) -> bool:
    """Whether the same request may be sent again after a first attempt without a response."""
    return request.method in IDEMPOTENT and request.body.length == 0 and request.upgrade is None


class ConnectionPool:
    """Sends requests over connections that ``connector`` makes: HTTP/2 where TLS agreed on it (ALPN ``h2``), or by
    ``h2_prior_knowledge``, else HTTP/1.1.

    A kept connection may have been closed by the upstream a moment ago, so only requests that may be sent twice without
    a word, safe ones (RFC 9110 section 9.2.1) without a body, go out on one of HTTP/1.1, and once more on a new one.
    Others get a new connection, and are sent once. ``origins`` says which targets' connections are kept.

    Upgrades are made on connections of ``upgrade_connector``, if there is one: few upstreams know WebSocket over
    HTTP/2, and a connection that has agreed on ``h2`` knows no other.

    Requests share connections only within the same ``partition``: where the connector chooses its way by the client,
    what was opened for one client must not carry another's requests.
    """

    def __init__(
        self,
        connector: Service[Authority, Stream],
        *,
        upgrade_connector: Service[Authority, Stream] | None = None,
        h2_prior_knowledge: bool = False,
        origins: Origins = lambda _target: OriginOptions(),
        pool_limits: PoolLimits | None = None,
        limits: HttpLimits | None = None,
        timeouts: HttpTimeouts | None = None,
    ) -> None:
        self._connector = connector
        self._upgrade_connector = upgrade_connector
        self._h2_prior_knowledge = h2_prior_knowledge
        self._origins = origins
        self._pool_limits = PoolLimits() if pool_limits is None else pool_limits
        self._limits = HttpLimits() if limits is None else limits
        self._timeouts = HttpTimeouts() if timeouts is None else timeouts
        self._idle: dict[_Key, list[_Idle]] = {}
        self._idle_count = 0
        self._sweeper: asyncio.TimerHandle | None = None
        self._h2: dict[_Key, list[H2ClientConnection]] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._closed = False
        self._busy: Counter[Authority] = Counter()

    def busy(self, target: Authority) -> int:
        """How many requests and tunnels to ``target`` are under way."""
        return self._busy[target] + sum(
            len(connection.channels) for key, live in self._h2.items() if key[0] == target for connection in live
        )

    @property
    def idle(self) -> int:
        """How many HTTP/1.1 connections are kept unused."""
        return self._idle_count

    async def send(
        self,
        request: Request,
        target: Authority,
        *,
        partition: Hashable = None,
        connector: Service[Authority, Stream] | None = None,
    ) -> Response:
        """Send ``request`` to ``target``. Raises what connecting raises, or :class:`~.errors.HttpError`.

        ``connector``, if given, connects for this request alone, and its connection is not kept.
        """
        key = (target if type(target) is Authority else Authority(target.host, target.port), partition)
        options = self._origins(key[0])
        keep = connector is None and options.keep
        if keep and (response := await self._send_on_kept(request, key)) is not None:
            return response
        if connector is None and request.upgrade is not None:
            connector = self._upgrade_connector
        self._busy[target] += 1
        try:
            stream = await (connector or self._connector)(Target(target.host, target.port, request.extensions))
        except BaseException:
            self._unbusy(target)
            raise
        request.extensions.add(Upstream(stream.peer, kept=False))
        tls = stream.extensions.get(TlsParameters)
        if tls.alpn == "h2" if tls is not None else (self._h2_prior_knowledge and connector is None):
            self._unbusy(target)
            return await self._add_h2(key, stream, keep=keep).send(request)
        connection = H1ClientConnection(
            stream,
            limits=self._limits,
            timeouts=self._timeouts,
            released=lambda connection: self._released(key, connection, keep=keep),
            keep=keep,
            lenient=options.lenient,
        )
        return await connection.send(request)

    async def _send_on_kept(self, request: Request, key: _Key) -> Response | None:
        """Send on a connection that is there already; return None if there is none that will do."""
        may_repeat = request.method in _SAFE and repeatable(request)
        try:
            if request.upgrade is None or self._upgrade_connector is None:
                for connection in self._h2.get(key, ()):
                    if connection.available:
                        request.extensions.add(Upstream(connection.stream.peer, kept=True))
                        return await connection.send(request)
            if may_repeat and (kept := self._take(key)) is not None:
                self._busy[key[0]] += 1
                request.extensions.add(Upstream(kept.stream.peer, kept=True))
                return await kept.send(request)
        except NoResponse:
            if not may_repeat:
                raise
            # Closed meanwhile: again, on a new one.
        return None

    def ready(self, request: Request, target: Authority, *, partition: Hashable = None) -> H1ClientConnection | None:
        """Return a kept connection of HTTP/1.1 over a plain socket on which ``request``, a safe one without a body,
        can be sent at once; None if there is none. What :meth:`send` would do with it is the caller's then."""
        key = (target if type(target) is Authority else Authority(target.host, target.port), partition)
        idle = self._idle.get(key)
        if not idle or key in self._h2 or not isinstance(idle[-1].connection.stream, SocketStream):
            return None
        kept = self._take(key)
        if kept is None:
            return None
        self._busy[key[0]] += 1
        request.extensions.add(Upstream(kept.stream.peer, kept=True))
        return kept

    def close(self) -> None:
        """Close what is idle; what is in use is closed after its response."""
        self._closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        for key in list(self._idle):
            while (kept := self._take(key)) is not None:
                self._in_background(kept.stream.close())
        for live in list(self._h2.values()):
            for connection in live:
                self._in_background(connection.retire())

    async def wait_closed(self) -> None:
        """Return when the connections that :meth:`close` found idle are closed."""
        while self._closing:
            await asyncio.gather(*self._closing, return_exceptions=True)

    # -- HTTP/2 ------------------------------------------------------------------------------------------------

    def _add_h2(self, key: _Key, stream: Stream, *, keep: bool) -> H2ClientConnection:
        timeouts = replace(self._timeouts, idle=self._pool_limits.keep)
        connection = H2ClientConnection(
            stream, limits=self._limits, timeouts=timeouts, ended=lambda ended: self._remove_h2(key, ended)
        )
        if keep and not self._closed:
            self._h2.setdefault(key, []).append(connection)
        connection.start()
        return connection

    def _remove_h2(self, key: _Key, connection: H2ClientConnection) -> None:
        live = [other for other in self._h2.get(key, ()) if other is not connection]
        if live:
            self._h2[key] = live
        else:
            self._h2.pop(key, None)

    # -- HTTP/1.1 ----------------------------------------------------------------------------------------------

    def _take(self, key: _Key) -> H1ClientConnection | None:
        kept = self._idle.get(key)
        while kept:
            idle = kept.pop()
            self._idle_count -= 1
            if not kept:
                del self._idle[key]
            if idle.connection.quiet:
                return idle.connection
            self._in_background(idle.connection.stream.close())
        return None

    def _unbusy(self, target: Authority) -> None:
        self._busy[target] -= 1
        if not self._busy[target]:
            del self._busy[target]

    def _released(self, key: _Key, connection: H1ClientConnection, *, keep: bool) -> None:
        self._unbusy(key[0])
        if not connection.reusable:
            return
        limits = self._pool_limits
        full = self._idle_count >= limits.idle or len(self._idle.get(key, ())) >= limits.idle_per_origin
        if self._closed or full or not keep:
            self._in_background(connection.stream.close())
            return
        loop = asyncio.get_running_loop()
        self._idle.setdefault(key, []).append(_Idle(connection, loop.time()))
        self._idle_count += 1
        if self._sweeper is None:
            self._sweeper = loop.call_later(limits.keep, self._sweep)

    def _sweep(self) -> None:
        """Close what was kept long enough; one timer for all, which is set while there are any."""
        self._sweeper = None
        loop = asyncio.get_running_loop()
        due = loop.time() - self._pool_limits.keep
        oldest: list[float] = []
        for key, kept in list(self._idle.items()):
            fresh = [idle for idle in kept if idle.since > due]
            for idle in kept:
                if idle.since <= due:
                    self._in_background(idle.connection.stream.close())
            self._idle_count -= len(kept) - len(fresh)
            if fresh:
                self._idle[key] = fresh
                oldest.append(min(idle.since for idle in fresh))
            else:
                del self._idle[key]
        if oldest:
            self._sweeper = loop.call_at(min(oldest) + self._pool_limits.keep, self._sweep)

    def _in_background(self, closing: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(closing)
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
