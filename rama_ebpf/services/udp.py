"""UDP: a server that gives each datagram to a service, and answers from the address that it was sent to."""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from typing import Any, Final

from ..core.address import SocketAddress
from ..core.client import ClientAddress, LocalAddress
from ..core.errors import RamaError
from ..core.extensions import Extensions
from ..core.service import Service

__all__ = ["Datagram", "UdpServer", "bind_udp"]

log = logging.getLogger(__name__)

_MAX_DATAGRAM: Final = 65535
_RECEIVES_PER_WAKE: Final = 64
_IP_PKTINFO: Final = 8  # linux/in.h; Python 3.11 has no name for it
_PKTINFO_V4: Final = struct.Struct("=i4s4s")  # struct in_pktinfo: interface, source to answer from, destination
_PKTINFO_V6: Final = struct.Struct("=16si")  # struct in6_pktinfo: address, interface


def bind_udp(host: str, port: int, *, reuse_port: bool = False) -> socket.socket:
    """Return a bound non-blocking UDP socket on an IPv4 or IPv6 literal and port. Raises OSError naming the address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        if reuse_port:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind((host, port))
    except OSError as error:
        sock.close()
        raise OSError(error.errno, f"cannot bind UDP {host} port {port}: {error.strerror}") from error
    return sock


@dataclass(slots=True)
class Datagram:
    """A datagram from ``peer`` to our address ``local``."""

    data: bytes
    peer: SocketAddress
    local: SocketAddress
    extensions: Extensions = field(default_factory=Extensions)
    _server: UdpServer | None = field(default=None, repr=False)
    _control: list[tuple[int, int, bytes]] = field(default_factory=list, repr=False)

    def reply(self, data: bytes) -> bool:
        """Send ``data`` back from the address that the datagram was sent to. False if the socket had no room: as
        anywhere on its way a datagram may be lost. Raises OSError for what can never be sent (EMSGSIZE)."""
        assert self._server is not None
        return self._server.send(data, self.peer, self._control)


class UdpServer:
    """Gives each datagram to ``service`` as a :class:`Datagram`; at most ``max_pending`` are served at once.

    What comes above that is dropped and counted in ``dropped``, as a full socket buffer would. What the service
    raises ends that datagram only.
    """

    def __init__(self, sock: socket.socket, service: Service[Datagram, Any], *, max_pending: int = 1024) -> None:
        self.socket = sock
        self.received = 0
        self.dropped = 0
        self._service = service
        self._max_pending = max_pending
        self._pending: set[asyncio.Task[None]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._v6 = sock.family == socket.AF_INET6
        local = SocketAddress.from_sockaddr(sock.getsockname())
        self._port = local.port
        # Only a socket on the wildcard address has to be told from which address to answer.
        self._wildcard = local.ip.is_unspecified
        if self._wildcard and self._v6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
        elif self._wildcard:
            sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
        self._local = local

    def start(self) -> None:
        """Start to receive, on the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self.socket.fileno(), self._readable)

    async def drain(self, timeout: float) -> int:
        """Stop receiving, wait up to ``timeout`` seconds for what is being served, cut the rest; return how many."""
        if self._loop is not None:
            self._loop.remove_reader(self.socket.fileno())
            self._loop = None
        if self._pending and timeout > 0:
            await asyncio.wait(set(self._pending), timeout=timeout)
        remaining = set(self._pending)
        for task in remaining:
            task.cancel("drain deadline")
        await asyncio.gather(*remaining, return_exceptions=True)
        return len(remaining)

    def send(self, data: bytes, peer: SocketAddress, control: list[tuple[int, int, bytes]]) -> bool:
        """Send a datagram with control messages; False if the socket had no room."""
        try:
            self.socket.sendmsg([data], control, 0, peer.to_sockaddr())
        except BlockingIOError:
            return False
        return True

    def _readable(self) -> None:
        assert self._loop is not None
        for _ in range(_RECEIVES_PER_WAKE):
            try:
                data, control, _, source = self.socket.recvmsg(_MAX_DATAGRAM, 64 if self._wildcard else 0)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                # An ICMP error for something that we sent; the datagram that follows it is read next.
                log.debug("UDP error from the network: %s", error)
                continue
            self.received += 1
            if len(self._pending) >= self._max_pending:
                self.dropped += 1
                continue
            datagram = self._datagram(data, source, control)
            task = self._loop.create_task(self._serve(datagram))
            self._pending.add(task)
            task.add_done_callback(self._pending.discard)

    def _datagram(self, data: bytes, source: Any, control: list[tuple[int, int, bytes]]) -> Datagram:
        peer, local, answer = SocketAddress.from_sockaddr(source), self._local, []
        for level, kind, value in control:
            if level == socket.IPPROTO_IP and kind == _IP_PKTINFO:
                _, _, destination = _PKTINFO_V4.unpack_from(value)
                local = SocketAddress(IPv4Address(destination), self._port)
                answer = [(level, kind, _PKTINFO_V4.pack(0, destination, bytes(4)))]
            elif level == socket.IPPROTO_IPV6 and kind == socket.IPV6_PKTINFO:
                destination, interface = _PKTINFO_V6.unpack_from(value)
                local = SocketAddress(IPv6Address(destination), self._port)
                answer = [(level, kind, _PKTINFO_V6.pack(destination, interface))]
        datagram = Datagram(data, peer, local, _server=self, _control=answer)
        datagram.extensions.add(ClientAddress(peer))
        datagram.extensions.add(LocalAddress(local))
        return datagram

    async def _serve(self, datagram: Datagram) -> None:
        try:
            await self._service(datagram)
        except (RamaError, OSError) as error:
            log.info("%s: datagram dropped: %s", datagram.peer, error)
        except Exception:
            log.exception("%s: service failed", datagram.peer)
