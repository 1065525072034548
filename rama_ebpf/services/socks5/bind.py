"""BIND: waiting for one connection from a peer that the client names (RFC 1928 section 6, FTP's active mode)."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Collection, Sequence
from types import TracebackType
from typing import Final, Self

from ...core.address import Authority, IPAddress, SocketAddress, unmap
from ...core.errors import PolicyDenied
from ...core.stream import SocketStream
from ..connect import Egress, Resolver
from .ports import advertised, bound_socket, local_address_towards

__all__ = ["Binder", "Listening"]

log = logging.getLogger(__name__)

_BACKLOG: Final = 8


class Binder:
    """Listens for a peer on behalf of a client.

    Only a peer whose address is the request's target may connect, and only if ``egress`` allows that address; others
    are reset and the wait goes on. The port is not compared: RFC 1928's example, FTP, connects from another one.
    The server waits ``timeout`` seconds at most. ``advertise`` holds the addresses (one a family) that clients are
    told instead of our own, for hosts behind NAT; ``ports`` confines the listening ports for a firewall's sake.
    """

    def __init__(
        self,
        resolver: Resolver,
        egress: Egress,
        *,
        timeout: float = 60.0,
        advertise: Sequence[IPAddress] = (),
        ports: range | None = None,
    ) -> None:
        self._resolver = resolver
        self._egress = egress
        self.timeout = timeout
        self._advertise = tuple(advertise)
        self._ports = ports

    async def listen(self, peer: Authority) -> Listening:
        """Open the listening socket. Raises :class:`PolicyDenied`, :class:`~..connect.ResolveError` or OSError."""
        ips = [peer.ip] if peer.ip is not None else await self._resolver.resolve(str(peer.host))
        allowed: set[IPAddress] = set()
        denied: PolicyDenied | None = None
        for ip in ips:
            try:
                self._egress.check(ip)
            except PolicyDenied as error:
                denied = error
            else:
                allowed.add(unmap(ip))
        if denied is not None and not allowed:
            raise denied
        local = local_address_towards(next(ip for ip in map(unmap, ips) if ip in allowed))
        sock = bound_socket(socket.SOCK_STREAM, local, self._ports)
        try:
            sock.listen(_BACKLOG)
            return Listening(sock, advertised(sock, self._advertise), allowed)
        except BaseException:
            sock.close()
            raise


class Listening:
    """One open BIND; ``address`` is where the peer is to connect to. A context manager that closes the socket."""

    def __init__(self, sock: socket.socket, address: SocketAddress, expected: Collection[IPAddress]) -> None:
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
        if source.ip in self._expected:
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
