"""UDP ASSOCIATE and BIND by the ways that routes choose: what cannot carry them refuses, nothing goes another way."""

from __future__ import annotations

import asyncio
import errno
import socket
from dataclasses import replace
from ipaddress import IPv4Address

from ...core.address import Authority
from ...core.errors import PolicyDenied
from ...core.extensions import Extensions
from ...core.stream import Stream
from ...routes.blame import Fault
from ...routes.model import Direct, Parent, Protocol, Refuse
from ..socks5.carrier import Carrier, ClientWays
from ..socks5.client import BoundPort, UdpSocket, handshake
from ..socks5.client_machine import ClientMachine
from ..socks5.wire import Command
from .connector import RouteConnector
from .failure import WayFailed, failure_of
from .hop import secure
from .private import judge_beyond
from .question import is_local_name, literal_of, question_of

__all__ = ["RoutedSocks"]

_ANYWHERE = Authority(IPv4Address(0), 0)


class RoutedSocks:
    """A :class:`~..socks5.carrier.SocksWays` over the routes of ``connector``.

    Datagrams are carried by direct ways and by one parent that speaks SOCKS5 in the clear; BIND by ``direct`` and by
    one SOCKS5 parent. Everything else refuses.
    """

    def __init__(self, connector: RouteConnector) -> None:
        self._connector = connector

    def of_client(self, extensions: Extensions, /) -> ClientWays | None:
        """See :class:`~..socks5.carrier.SocksWays`."""
        question = replace(question_of(_ANYWHERE, extensions), protocol=Protocol.UDP)
        connector = self._connector
        overrides = connector.overrides()
        for route in connector.table.possible(question):
            way = overrides.get(route.name, route.way)
            if any(self.carries(leaf) for leaf in connector.ways.leaves(way if way in connector.ways else route.way)):
                return _ClientWays(connector, extensions, self)
        return None

    def carries(self, name: str) -> bool:
        """Whether a way can carry datagrams."""
        way = self._connector.ways[name]
        return isinstance(way, Direct) or (isinstance(way, Parent) and way.scheme in ("socks5", "socks5h"))

    async def bind(self, peer: Authority, extensions: Extensions, /) -> BoundPort | None:
        """See :class:`~..socks5.carrier.SocksWays`."""
        connector = self._connector
        question = replace(question_of(peer, extensions), protocol=Protocol.BIND)
        decision = connector.decide(question)
        way = connector.ways[decision.way]
        if isinstance(way, Refuse) or decision.asks:
            raise PolicyDenied(f"BIND for {peer}: the route {decision.name} refuses it", f"route:{decision.name}")
        connector.note(extensions, decision.name, decision.way)
        failure: WayFailed | None = None
        for name in connector.now(decision.way, question, extensions):
            way = connector.ways[name]
            if isinstance(way, Direct) and not (way.sources or way.interface or way.mark):
                return None
            if not isinstance(way, Parent) or not way.scheme.startswith("socks5"):
                continue
            _judge(connector, way, peer)
            try:
                stream, machine, bound = await _asked(connector, name, way, Command.BIND, peer)
            except WayFailed as error:
                failure = error
                if not error.fault.moves_on:
                    raise
                continue
            return BoundPort(stream, machine, bound, way.address)
        raise failure or WayFailed(
            errno.EOPNOTSUPP, f"BIND for {peer}: the way {decision.way} cannot carry it", Fault.UNABLE
        )


class _ClientWays:
    """Of one association."""

    def __init__(self, connector: RouteConnector, extensions: Extensions, routed: RoutedSocks) -> None:
        self._connector = connector
        self._extensions = extensions
        self._routed = routed

    def choose(self, target: Authority, /) -> Carrier | None:
        """See :class:`~..socks5.carrier.ClientWays`."""
        connector = self._connector
        question = replace(question_of(target, self._extensions), protocol=Protocol.UDP)
        decision = connector.decide(question)
        if decision.asks or isinstance(connector.ways[decision.way], Refuse):
            return None  # whatever a name would turn out to be: datagrams wait for nobody's look-up
        for name in connector.now(decision.way, question, self._extensions):
            if self._routed.carries(name):
                return _Carrier(connector, name, connector.key(name, question, self._extensions))
        return None


class _Carrier:
    """A way that carries datagrams."""

    def __init__(self, connector: RouteConnector, name: str, key: bytes) -> None:
        self.name = name
        self._connector = connector
        self._way = connector.ways[name]
        self._key = key
        self.by_parent = isinstance(self._way, Parent)
        self.resolves_here = not isinstance(self._way, Parent) or self._way.resolve_here

    def check(self, target: Authority, /) -> None:
        """See :class:`~..socks5.carrier.Carrier`."""
        if isinstance(self._way, Parent):
            _judge(self._connector, self._way, target)
        elif target.ip is not None:
            self._connector.direct(self.name, self._key).egress.check(target.ip)

    def prepare(self, sock: socket.socket, version: int, /) -> None:
        """See :class:`~..socks5.carrier.Carrier`."""
        made = self._connector.direct(self.name, self._key)
        if made.options.interface is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, made.options.interface.encode())
        source = made.source_v4 if version == 4 else made.source_v6
        if source is not None:
            made.options.bind_source(sock, source)

    async def open(self) -> UdpSocket:
        """See :class:`~..socks5.carrier.Carrier`."""
        assert isinstance(self._way, Parent)
        stream, _, bound = await _asked(self._connector, self.name, self._way, Command.UDP_ASSOCIATE, _ANYWHERE)
        try:
            return await UdpSocket.open(stream, _reachable(self._connector, bound, stream))
        except BaseException:
            await stream.close()
            raise


def _reachable(connector: RouteConnector, bound: Authority, stream: Stream) -> Authority:
    """A relay that calls itself by an address which is none for us is where its TCP is (behind NAT, in a container)."""
    if bound.ip is None or stream.peer is None or bound.ip == stream.peer.ip:
        return bound
    try:
        connector.egress.check(bound.ip)
    except PolicyDenied:
        return Authority(stream.peer.ip, bound.port)
    return bound


def _judge(connector: RouteConnector, way: Parent, target: Authority) -> None:
    ip = literal_of(target.host)
    if ip is not None:
        judge_beyond(connector.egress, ip, target.port, trusted=way.trusted)
    elif is_local_name(str(target.host)):
        raise PolicyDenied(f"{target.host} is whoever looks it up", rule="egress-default:loopback")


async def _asked(
    connector: RouteConnector, name: str, way: Parent, command: Command, target: Authority
) -> tuple[Stream, ClientMachine, Authority]:
    """Have a parent carry out a command, and tell its health. Raises :class:`WayFailed`."""
    doing = f"no {command.name} by {name}"
    stream: Stream | None = None
    begun = connector.clock()
    try:
        async with asyncio.timeout(connector.timeout):
            stream = await connector.reach(way)
            stream = await secure(stream, way, connector.context(way))
            machine, bound = await handshake(stream, command, target, way.credentials)
    except BaseException as error:
        if stream is not None:
            stream.abort()
        failure = failure_of(error, doing, Fault.WAY)
        if failure is None:
            raise
        connector.blame(name, failure)
        raise failure from error
    connector.praise(name, connector.clock() - begun)
    return stream, machine, bound
