"""Whether the kernel's connection tracking rewrites a connection's addresses (NAT).

Reference: ``include/uapi/linux/netfilter/nfnetlink_conntrack.h``, ``nf_conntrack_common.h``.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from pathlib import Path
from typing import Final

from .wire import WireKey

__all__ = ["Conntrack"]

_NETLINK_NETFILTER: Final = 12
_GET: Final = 1 << 8 | 1  # NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_GET
_REQUEST, _ERROR = 1, 2
_HEADER: Final = struct.Struct("=IHHIIBBH")  # struct nlmsghdr, struct nfgenmsg
_ATTRIBUTE: Final = struct.Struct("=HH")
_NESTED: Final = 0x8000
_TUPLE, _STATUS = 1, 3
_ADDRESSES, _PROTOCOL = 1, 2
_NAT: Final = 1 << 4 | 1 << 5  # IPS_SRC_NAT, IPS_DST_NAT
_LOADED: Final = Path("/proc/sys/net/netfilter/nf_conntrack_count")


class Conntrack:
    """A socket by which connection tracking is asked. It stays usable for who may open no more sockets."""

    def __init__(self) -> None:
        self._loaded = _LOADED.exists()
        self._sock: socket.socket | None = None
        try:
            self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
            self._sock.settimeout(1)
        except OSError as error:
            if error.errno != errno.EPROTONOSUPPORT:  # no netfilter at all
                raise

    def rewrites(self, sent: WireKey) -> bool:
        """Whether the connection whose packets go out as ``sent`` is rewritten; also where that cannot be told.

        Of several zones only the one without a number is asked.
        """
        if self._sock is None:
            return self._loaded
        family = socket.AF_INET6 if sent.v6 else socket.AF_INET
        size, first = (16, 3) if sent.v6 else (4, 1)
        addresses = _attribute(first, sent.source[-size:]) + _attribute(first + 1, sent.target[-size:])
        protocol = _attribute(1, bytes([socket.IPPROTO_TCP])) + _attribute(2, sent.sport) + _attribute(3, sent.dport)
        inner = _attribute(_ADDRESSES | _NESTED, addresses) + _attribute(_PROTOCOL | _NESTED, protocol)
        body = _attribute(_TUPLE | _NESTED, inner)
        self._sock.send(_HEADER.pack(_HEADER.size + len(body), _GET, _REQUEST, 0, 0, family, 0, 0) + body)
        answer = self._sock.recv(1 << 16)
        length, kind = struct.unpack_from("=IH", answer)
        if kind == _ERROR:
            number = -struct.unpack_from("=i", answer, 16)[0]
            if number == errno.ENOENT:
                return False  # not tracked
            if number in (errno.EINVAL, errno.EOPNOTSUPP):  # nobody there to ask
                return self._loaded
            raise OSError(number, f"conntrack: {os.strerror(number)}")
        at = _HEADER.size
        while at + _ATTRIBUTE.size <= length:
            size, attribute = _ATTRIBUTE.unpack_from(answer, at)
            if attribute & 0x3FFF == _STATUS:
                return bool(struct.unpack_from("!I", answer, at + _ATTRIBUTE.size)[0] & _NAT)
            at += max(_ATTRIBUTE.size, size + 3 & ~3)
        return True

    def close(self) -> None:
        """Close the socket."""
        if self._sock is not None:
            self._sock.close()


def _attribute(kind: int, value: bytes) -> bytes:
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value + bytes(-len(value) % 4)
