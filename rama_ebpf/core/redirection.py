"""Where a connection was meant to go before netfilter sent it here."""

from __future__ import annotations

import socket
import struct
from ipaddress import ip_address
from typing import Final

from .address import SocketAddress, unmap

__all__ = ["before_redirection"]

_SO_ORIGINAL_DST: Final = 80
"""linux/netfilter_ipv4.h; IP6T_SO_ORIGINAL_DST has the same number."""


def before_redirection(sock: socket.socket) -> SocketAddress | None:
    """Return the destination before netfilter's REDIRECT or DNAT, None where connection tracking knows nothing."""
    try:
        if sock.family == socket.AF_INET:
            port, packed = struct.unpack_from("!2xH4s", sock.getsockopt(socket.IPPROTO_IP, _SO_ORIGINAL_DST, 16))
        elif sock.family == socket.AF_INET6:
            port, packed = struct.unpack_from("!2xH4x16s", sock.getsockopt(socket.IPPROTO_IPV6, _SO_ORIGINAL_DST, 28))
        else:
            return None
    except OSError:
        return None  # ENOPROTOOPT without the module, ENOENT for connections that are not tracked
    return SocketAddress(unmap(ip_address(packed)), port)
