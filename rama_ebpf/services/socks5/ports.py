"""Sockets for the far side of BIND and UDP ASSOCIATE: where they listen, and what the client is told of it."""

from __future__ import annotations

import errno
import random
import socket
from collections.abc import Sequence

from ...core.address import IPAddress, SocketAddress

__all__ = ["advertised", "bound_socket", "local_address_towards"]

_ATTEMPTS = 32


def bound_socket(kind: socket.SocketKind, local: SocketAddress, ports: range | None) -> socket.socket:
    """Return a non-blocking socket bound to the address of ``local``, on a free port of ``ports`` or one the kernel
    picks. Raises OSError, EADDRINUSE if no free port was found in a bounded number of attempts."""
    candidates = [0] if ports is None else random.sample(ports, min(len(ports), _ATTEMPTS))
    for port in candidates:
        sock = socket.socket(local.family, kind | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            if local.family == socket.AF_INET6:
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            sock.bind(SocketAddress(local.ip, port, local.scope_id).to_sockaddr())
        except OSError as error:
            sock.close()
            if error.errno != errno.EADDRINUSE:
                raise
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise OSError(errno.EADDRINUSE, f"no free port on {local.ip} in {ports}")


def local_address_towards(ip: IPAddress) -> SocketAddress:
    """Return our address (port 0) on the route to ``ip``; sends nothing. Raises OSError if there is no route."""
    probe = SocketAddress(ip, 9)
    with socket.socket(probe.family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.connect(probe.to_sockaddr())
        local = SocketAddress.from_sockaddr(sock.getsockname())
    return SocketAddress(local.ip, 0, local.scope_id)


def advertised(sock: socket.socket, advertise: Sequence[IPAddress]) -> SocketAddress:
    """Return what the client is told: the socket's own address, with the IP that ``advertise`` has for its family."""
    own = SocketAddress.from_sockaddr(sock.getsockname())
    for ip in advertise:
        if ip.version == own.ip.version:
            return SocketAddress(ip, own.port)
    return own
