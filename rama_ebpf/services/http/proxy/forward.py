"""Forward proxy: takes requests that clients address to a proxy, absolute-form and CONNECT, on one listener."""

from __future__ import annotations

from collections.abc import Collection, Hashable
from typing import Final

from ....core.address import Authority
from ....core.at_once import AtOnce
from ....core.lifecycle import Lifecycle
from ....core.request_log import RouteName, Upstream
from ....core.service import Layer, Service, check_fit, stack
from ....core.stream import Stream
from ....core.target import Target
from ....relay import TunnelLimits
from ...connect import ConnectError, Connector, WayReset, connects_at_once
from ..exchange.absolute import NeedsTunnel
from ..exchange.quick import Dial, Exchange, Recover
from ..exchange.tunnel import Tunnel
from ..message.errors import ConnectionDropped, HttpError, NoResponse
from ..message.limits import HttpLimits, HttpTimeouts, OriginOptions
from ..message.model import Request, Response
from ..server import HttpServer
from .duties import DEFAULT_UPGRADES, answer_max_forwards, forwardable, marks, onward, returned
from .pool import ConnectionPool, Origins, PoolLimits

__all__ = ["ForwardProxy", "HttpProxy"]


_FORWARD: Final = RouteName("forward")
_CONNECT: Final = RouteName("connect")


class ForwardProxy:
    """An HTTP service that does what a forward proxy does.

    Absolute-form requests go to their target over pooled connections; CONNECT opens a tunnel, bounded by
    ``tunnel_limits`` (or those among the client's extensions). ``connector`` decides which targets are allowed.
    ``connect_ports``, if given, are the only ports that CONNECT may name (RFC 9110 section 9.3.6 advises it; else
    403). ``via`` is our pseudonym in Via, ``upgrades`` are the protocols that may be switched to.

    Kept connections to a target are shared between clients if ``share_connections``; by default if the connector is
    a plain :class:`~...connect.Connector`, which does not choose its way by the client as others may. ``origins`` says
    how each target is treated.
    """

    accepts = Request
    forwards = True

    def __init__(
        self,
        connector: Service[Authority, Stream],
        *,
        via: str = "rama-ebpf",
        upgrades: Collection[str] = DEFAULT_UPGRADES,
        connect_ports: Collection[int] | None = None,
        tunnel_limits: TunnelLimits | None = None,
        share_connections: bool | None = None,
        origins: Origins = lambda _target: OriginOptions(),
        pool_limits: PoolLimits | None = None,
        limits: HttpLimits | None = None,
        timeouts: HttpTimeouts | None = None,
    ) -> None:
        check_fit(self, Authority, connector)
        self._connector = connector
        self._share = isinstance(connector, Connector) if share_connections is None else share_connections
        self._via = via
        self._marks = marks(via)
        self._upgrades = upgrades
        self._connect_ports = connect_ports
        self._tunnel_limits = tunnel_limits
        self.pool = ConnectionPool(
            connector, origins=origins, pool_limits=pool_limits, limits=limits, timeouts=timeouts
        )

    async def __call__(self, request: Request, /) -> Response:
        if request.method == "CONNECT":
            request.extensions.add(_CONNECT)
            return await self._connect(request)
        request.extensions.add(_FORWARD)
        if not request.absolute:
            raise HttpError(400, "this is a proxy: the request target must be an absolute URI")
        own = answer_max_forwards(request)
        if own is not None:
            return own
        if request.scheme != "http":
            raise HttpError(501, "only http targets can be requested in absolute form: use CONNECT")
        onward = forwardable(request, self._via, self._upgrades)
        if onward.upgrade is not None:
            request.extensions.add(NeedsTunnel())
        try:
            response = await self.pool.send(onward, request.target, partition=None if self._share else _client(request))
        except WayReset as error:
            raise ConnectionDropped(str(error)) from error
        return returned(response, self._via)

    def quick_exchange(self, request: Request, /) -> Exchange | None:
        """See :mod:`..exchange.quick`."""
        if not request.absolute or request.scheme != "http":
            return None
        written = onward(request, self._via)
        target = request.target
        partition = None if self._share else _client(request)
        recover: Recover = self._recover
        connection = self.pool.ready(request, target, partition=partition)
        request.extensions.add(_FORWARD)
        if connection is None:
            connection = self.pool.open(request, target, partition=partition)
            if connection is None:
                return None
            recover = _failed
        return Exchange(connection, request, request.authority, written, self._marks, self._returned, recover)

    def quick_connect(self, request: Request, /) -> Dial | None:
        """See :mod:`..exchange.quick`."""
        connector = connects_at_once(self._connector)
        if connector is None:
            return None
        target = request.target
        if self._connect_ports is not None and target.port not in self._connect_ports:
            return None
        request.extensions.add(_CONNECT)
        if not connector.begins(target, request.extensions):
            return None
        request.extensions.add(target)
        return Dial(connector, target, self._tunnel_limits)

    def _returned(self, response: Response) -> Response:
        return returned(response, self._via)

    async def _recover(self, request: Request, error: HttpError | ConnectError) -> Response:
        if isinstance(error, NoResponse):
            return await self(request)  # a kept connection that was closed meanwhile: again, as the pool does
        raise error

    async def _connect(self, request: Request) -> Response:
        target = request.target
        if self._connect_ports is not None and target.port not in self._connect_ports:
            raise HttpError(403, "CONNECT to this port is not allowed")
        request.extensions.add(target)
        try:
            upstream = await self._connector(Target(target.host, target.port, request.extensions))
        except WayReset as error:
            raise ConnectionDropped(str(error)) from error
        request.extensions.add(Upstream(upstream.peer, kept=False))
        return Response(200, upgrade=Tunnel(upstream, self._tunnel_limits))


async def _failed(_request: Request, error: HttpError | ConnectError) -> Response:
    raise error  # over a new connection it was sent once


def _client(request: Request) -> Hashable:
    """Return what tells clients apart: the connection, and who spoke on it."""
    return Lifecycle.of(request.extensions), request.headers.get("proxy-authorization")


class HttpProxy:
    """A forward proxy as a transport service: an :class:`HttpServer` around ``layers`` and a :class:`ForwardProxy`.

    ``layers`` are HTTP layers, outermost first (authentication, headers, …); the rest is as in those two classes.
    """

    accepts = Stream

    def __init__(
        self,
        connector: Service[Authority, Stream],
        *,
        layers: Collection[Layer] = (),
        via: str = "rama-ebpf",
        upgrades: Collection[str] = DEFAULT_UPGRADES,
        connect_ports: Collection[int] | None = None,
        tunnel_limits: TunnelLimits | None = None,
        share_connections: bool | None = None,
        origins: Origins = lambda _target: OriginOptions(),
        pool_limits: PoolLimits | None = None,
        limits: HttpLimits | None = None,
        timeouts: HttpTimeouts | None = None,
    ) -> None:
        self.proxy = ForwardProxy(
            connector,
            via=via,
            upgrades=upgrades,
            connect_ports=connect_ports,
            tunnel_limits=tunnel_limits,
            share_connections=share_connections,
            origins=origins,
            pool_limits=pool_limits,
            limits=limits,
            timeouts=timeouts,
        )
        self.server = HttpServer(stack(*layers, self.proxy), forward=True, name=via, limits=limits, timeouts=timeouts)
        self.first_bytes = self.server.first_bytes
        inside = self.server.at_once
        plain = type(self).__call__ is HttpProxy.__call__
        self.at_once = AtOnce(self, inside.begin, inside.takes) if plain and inside is not None else None

    async def __call__(self, stream: Stream, /) -> None:
        await self.server(stream)

    def drain(self) -> None:
        """Close idle connections on both sides, and the others after the request they are serving."""
        self.server.drain()
        self.proxy.pool.close()
