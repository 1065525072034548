"""Upstream connections, kept for the next request to the same origin."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import Callable, Coroutine, Hashable
from dataclasses import dataclass, replace
from typing import Any, Final

from ....core.address import Authority
from ....core.errors import RamaError
from ....core.request_log import Upstream
from ....core.service import Service
from ....core.stream import Stream
from ....core.target import Target
from ...connect import connects_at_once
from ...tls.stream import TlsParameters
from ..h1.client import H1ClientConnection
from ..h1.upstream import Dialled
from ..h2.client import H2ClientConnection
from ..message.errors import NoResponse
from ..message.limits import HttpLimits, HttpTimeouts, OriginOptions
from ..message.model import Request, Response

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


class _Origin:
    """What there is to one target for one partition."""

    __slots__ = ("busy", "h2", "idle", "key")

    def __init__(self, key: _Key) -> None:
        self.key = key
        self.busy = 0
        self.idle: list[H1ClientConnection] = []
        self.h2: list[H2ClientConnection] = []


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
        self._at_once = None if h2_prior_knowledge else connects_at_once(connector)
        self._origins = origins
        self._pool_limits = PoolLimits() if pool_limits is None else pool_limits
        self._limits = HttpLimits() if limits is None else limits
        self._timeouts = HttpTimeouts() if timeouts is None else timeouts
        self._known: dict[_Key, _Origin] = {}
        self._idle_count = 0
        self._sweeper: asyncio.TimerHandle | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._closed = False

    def busy(self, target: Authority) -> int:
        """How many requests and tunnels to ``target`` are under way."""
        return sum(
            origin.busy + sum(len(connection.channels) for connection in origin.h2)
            for origin in self._known.values()
            if origin.key[0] == target
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
        """Send ``request`` to ``target``. Raises what connecting raises, or :class:`~..message.errors.HttpError`.

        ``connector``, if given, connects for this request alone, and its connection is not kept.
        """
        options = self._origins(target)
        keep = connector is None and options.keep
        target = target if type(target) is Authority else Authority(target.host, target.port)
        known = self._known.get((target, partition)) if keep else None
        if known is not None and (response := await self._send_on_kept(request, known)) is not None:
            return response
        if connector is None and request.upgrade is not None:
            connector = self._upgrade_connector
        origin = self._origin(target, partition)
        origin.busy += 1
        try:
            stream = await (connector or self._connector)(Target(target.host, target.port, request.extensions))
        except BaseException:
            self._unbusy(origin)
            raise
        request.extensions.add(Upstream(stream.peer, kept=False))
        tls = stream.extensions.get(TlsParameters)
        if tls.alpn == "h2" if tls is not None else (self._h2_prior_knowledge and connector is None):
            connection = self._add_h2(origin, stream, keep=keep)
            self._unbusy(origin)
            return await connection.send(request)
        return await H1ClientConnection(
            stream,
            limits=self._limits,
            timeouts=self._timeouts,
            released=functools.partial(self._released, origin, keep),
            keep=keep,
            lenient=options.lenient,
        ).send(request)

    async def _send_on_kept(self, request: Request, origin: _Origin) -> Response | None:
        """Send on a connection that is there already; return None if there is none that will do."""
        may_repeat = request.method in _SAFE and repeatable(request)
        try:
            if request.upgrade is None or self._upgrade_connector is None:
                for connection in origin.h2:
                    if connection.available:
                        request.extensions.add(Upstream(connection.stream.peer, kept=True))
                        return await connection.send(request)
            if may_repeat and (kept := self._take(origin)) is not None:
                request.extensions.add(kept.as_kept)
                return await kept.send(request)
        except NoResponse:
            if not may_repeat:
                raise
            # Closed meanwhile: again, on a new one.
        return None

    def ready(self, request: Request, target: Authority, *, partition: Hashable = None) -> H1ClientConnection | None:
        """Return a kept connection of HTTP/1.1 over a plain socket on which ``request`` can be sent at once; None if
        there is none, or it is not a safe one without a body. What :meth:`send` would do with it is the caller's
        then."""
        if request.method not in _SAFE or request.body.length != 0:
            return None
        origin = self._known.get((target, partition))
        if origin is None or origin.h2:
            return None
        idle = origin.idle
        while idle and idle[-1].is_plain:
            connection = idle.pop()
            self._idle_count -= 1
            if connection.told_quiet:
                origin.busy += 1
                request.extensions.add(connection.as_kept)
                return connection
            self._end(connection)
        return None

    def open(self, request: Request, target: Authority, *, partition: Hashable = None) -> H1ClientConnection | None:
        """Begin to make a connection for ``request``, which may not be connected yet; None where that takes a call of
        :meth:`send`, as a name does, and a connector with anything around it. What :meth:`send` would do with it is the
        caller's then. Raises nothing: what cannot be dialled is found by :meth:`send` as well."""
        connector = self._at_once
        origin = self._known.get((target, partition))
        if connector is None or target.ip is None or self._closed or (origin is not None and origin.h2):
            return None
        options = self._origins(target)
        try:
            dialling = connector.begin(target, request.extensions)
        except (RamaError, OSError):
            return None
        if dialling is None or dialling.stream is None:
            return None
        origin = self._origin(target, partition)
        origin.busy += 1
        return H1ClientConnection(
            dialling.stream,
            limits=self._limits,
            timeouts=self._timeouts,
            released=functools.partial(self._released, origin, options.keep),
            keep=options.keep,
            lenient=options.lenient,
            dial=Dialled(connector, target),
        )

    def close(self) -> None:
        """Close what is idle; what is in use is closed after its response."""
        self._closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        for origin in list(self._known.values()):
            for idle in origin.idle:
                self._end(idle)
            self._idle_count -= len(origin.idle)
            origin.idle.clear()
            for connection in origin.h2:
                self._in_background(connection.retire())
            self._forget(origin)

    async def wait_closed(self) -> None:
        """Return when the connections that :meth:`close` found idle are closed."""
        while self._closing:
            await asyncio.gather(*self._closing, return_exceptions=True)

    def _origin(self, target: Authority, partition: Hashable) -> _Origin:
        found = self._known.get((target, partition))
        if found is None:
            found = self._known[target, partition] = _Origin((target, partition))
        return found

    def _forget(self, origin: _Origin) -> None:
        """Keep no origin to which there is nothing."""
        if not (origin.busy or origin.idle or origin.h2) and self._known.get(origin.key) is origin:
            del self._known[origin.key]

    # -- HTTP/2 ------------------------------------------------------------------------------------------------

    def _add_h2(self, origin: _Origin, stream: Stream, *, keep: bool) -> H2ClientConnection:
        timeouts = replace(self._timeouts, idle=self._pool_limits.keep)
        connection = H2ClientConnection(
            stream, limits=self._limits, timeouts=timeouts, ended=lambda ended: self._remove_h2(origin, ended)
        )
        if keep and not self._closed:
            origin.h2.append(connection)
        connection.start()
        return connection

    def _remove_h2(self, origin: _Origin, connection: H2ClientConnection) -> None:
        if connection in origin.h2:
            origin.h2.remove(connection)
        self._forget(origin)

    # -- HTTP/1.1 ----------------------------------------------------------------------------------------------

    def _take(self, origin: _Origin) -> H1ClientConnection | None:
        """Return a kept connection that can be used; it is busy from now on."""
        while origin.idle:
            connection = origin.idle.pop()
            self._idle_count -= 1
            if connection.quiet:
                origin.busy += 1
                return connection
            self._end(connection)
        return None

    def _unbusy(self, origin: _Origin) -> None:
        origin.busy -= 1
        self._forget(origin)

    def _released(self, origin: _Origin, keep: bool, connection: H1ClientConnection) -> None:
        if not connection.reusable:
            self._unbusy(origin)
            return
        limits = self._pool_limits
        full = self._idle_count >= limits.idle or len(origin.idle) >= limits.idle_per_origin
        if self._closed or full or not keep:
            self._unbusy(origin)
            self._end(connection)
            return
        origin.busy -= 1
        connection.idle_since = time.monotonic()
        origin.idle.append(connection)
        self._idle_count += 1
        if self._sweeper is None:
            self._sweeper = asyncio.get_running_loop().call_later(limits.keep, self._sweep)

    def _sweep(self) -> None:
        """Close what was kept long enough; one timer for all, which is set while there are any."""
        self._sweeper = None
        now = time.monotonic()
        due = now - self._pool_limits.keep
        oldest: list[float] = []
        for origin in list(self._known.values()):
            for idle in origin.idle:
                if idle.idle_since <= due:
                    self._end(idle)
                    self._idle_count -= 1
            origin.idle = [idle for idle in origin.idle if idle.idle_since > due]
            oldest += [min(idle.idle_since for idle in origin.idle)] if origin.idle else []
            self._forget(origin)
        if oldest:
            left = min(oldest) + self._pool_limits.keep - now
            self._sweeper = asyncio.get_running_loop().call_later(left, self._sweep)

    def _end(self, connection: H1ClientConnection) -> None:
        if not connection.close_now():
            self._in_background(connection.close())

    def _in_background(self, closing: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(closing)
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
