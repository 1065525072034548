"""BIND: waiting for one connection from a peer that the client names (RFC 1928 section 6, FTP's active mode)."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Final, Self

from ...core.address import Authority, IPAddress, SocketAddress, unmap
from ...core.errors import PolicyDenied
from ...core.shares import Held, SourceShare
from ...core.socket_stream import SocketStream
from ..connect import Egress, ResolveError, Resolver
from ..resolver import resolve_for, source_of
from .ports import advertised, bound_socket, local_address_towards

__all__ = ["Binder", "Listening"]

log = logging.getLogger(__name__)

_BACKLOG: Final = 8


class Binder:
    """Listens for a peer on behalf of a client.

    Only a peer whose address is the request's target may connect, and only if ``egress`` allows that address; others
    are reset and the wait goes on. The port is not compared: RFC 1928's example, FTP, connects from another one.
    With ``any_peer`` a request for the unspecified address admits every peer that ``egress`` allows; else it is denied
    like any address that is not allowed. The server waits ``timeout`` seconds at most, for as many peers of one client
    as ``share`` lets in. ``advertise`` holds the
    addresses (one a family) that clients are told instead of our own, for hosts behind NAT; ``ports`` confines the
    listening ports for a firewall's sake.
    """

    def __init__(
        self,
        resolver: Resolver,
        egress: Egress,
        *,
        timeout: float = 60.0,
        any_peer: bool = False,
        advertise: Sequence[IPAddress] = (),
        ports: range | None = None,
        share: SourceShare | None = None,
    ) -> None:
        self.share = SourceShare(Held.BINDS, 0) if share is None else share
        """What each source may have listening at once; who asks :meth:`listen` for a client holds it."""
        self._resolver = resolver
        self._egress = egress
        self.timeout = timeout
        self._any_peer = any_peer
        self._advertise = tuple(advertise)
        self._ports = ports

    async def listen(self, peer: Authority, here: SocketAddress | None = None) -> Listening:
        """Open the listening socket: on the route to ``peer``, or on the address of ``here`` if any peer may come.

        Raises :class:`PolicyDenied`, :class:`~..connect.ResolveError` or OSError.
        """
        if self._any_peer and here is not None and peer.ip is not None and int(peer.ip) == 0:
            return self._open(here, self._allows)
        allowed = await self._allowed(peer)
        return self._open(local_address_towards(allowed[0]), frozenset(allowed).__contains__)

    async def _allowed(self, peer: Authority) -> list[IPAddress]:
        ips = [peer.ip] if peer.ip is not None else await resolve_for(self._resolver, str(peer.host), source_of(peer))
        allowed: list[IPAddress] = []
        denied: PolicyDenied | None = None
        for ip in ips:
            try:
                self._egress.check(ip)
            except PolicyDenied as error:
                denied = error
            else:
                allowed.append(unmap(ip))
        if not allowed:
            raise denied or ResolveError(f"{peer.host} has no address")
        return allowed

    def _allows(self, ip: IPAddress) -> bool:
        try:
            self._egress.check(ip)
        except PolicyDenied:
            return False
        return True

    def _open(self, local: SocketAddress, expected: Callable[[IPAddress], bool]) -> Listening:
        sock = bound_socket(socket.SOCK_STREAM, local, self._ports)
        try:
            sock.listen(_BACKLOG)
            return Listening(sock, advertised(sock, self._advertise), expected)
        except BaseException:
            sock.close()
            raise


class Listening:
    """One open BIND; ``address`` is where the peer is to connect to. A context manager that closes the socket."""

    def __init__(self, sock: socket.socket, address: SocketAddress, expected: Callable[[IPAddress], bool]) -> None:
        self.address = address
        self._sock = sock
        self._expected = expected

    async def readable(self) -> None:
        """Wait until somebody has connected, whoever it is."""
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        loop.add_reader(self._sock.fileno(), ready.set)
        try:
            await ready.wait()
        finally:
            loop.remove_reader(self._sock.fileno())

    def accept(self) -> SocketStream | None:
        """Return the connection that waits if it is the expected peer's; else reset it and return None.

        This is no coroutine, so that no cancellation can lose a connection that was accepted.
        """
        try:
            sock, raw = self._sock.accept()
        except OSError as error:
            log.debug("connection to %s was gone before accept: %s", self.address, error)
            return None
        stream = SocketStream(sock)
        source = SocketAddress.from_sockaddr(raw)
        if self._expected(source.ip):
            return stream
        log.info("%s: not the peer that BIND on %s waits for", source, self.address)
        stream.abort()
        return None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._sock.close()
