"""By which interface packets go, which interfaces have Ethernet frames, and when any of this changes.

Reference: rtnetlink(7).
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from collections.abc import Iterator
from typing import Final

from .netdev import merges_segments
from .wire import LOOPBACK, WireKey

__all__ = ["Routes"]

_HEADER: Final = struct.Struct("=IHHII")
_LINK: Final = struct.Struct("=BxHiII")  # struct ifinfomsg
_ROUTE: Final = struct.Struct("=BBBBBBBBI")  # struct rtmsg
_ATTRIBUTE: Final = struct.Struct("=HH")
_REQUEST, _DUMP, _ERROR, _DONE = 1, 0x300, 2, 3
_GET_LINK, _GET_ROUTE = 18, 26
_TO, _FROM, _BY = 1, 2, 4  # RTA_DST, RTA_SRC, RTA_OIF
_NAME: Final = 3  # IFLA_IFNAME
_ETHERNET: Final = 1  # ARPHRD_ETHER
_CHANGES: Final = 0x1 | 0x40 | 0x400  # RTMGRP_LINK, RTMGRP_IPV4_ROUTE, RTMGRP_IPV6_ROUTE


class Routes:
    """Sockets by which routing is asked. They stay usable for who may open no more. Raises OSError."""

    def __init__(self) -> None:
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
        self._sock = socket.socket(socket.AF_NETLINK, kind, socket.NETLINK_ROUTE)
        self._sock.settimeout(1)
        self._any = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.changes = socket.socket(socket.AF_NETLINK, kind | socket.SOCK_NONBLOCK, socket.NETLINK_ROUTE)
        """Readable when an interface or a route has come, gone or changed; see :meth:`forget_changes`."""
        self.changes.bind((0, _CHANGES))

    def forget_changes(self) -> None:
        """Read what :attr:`changes` has, and drop it: it only says that all is to be looked at again."""
        while True:
            try:
                self.changes.recv(1 << 16)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:  # more than the socket holds
                    raise

    def devices(self) -> set[int]:
        """Return the indexes of the loopback device and of the interfaces with Ethernet frames, each as it was sent."""
        found = set()
        for body in self._ask(_GET_LINK, _DUMP, _LINK.pack(0, 0, 0, 0, 0)):
            _, kind, index, _, _ = _LINK.unpack_from(body)
            name = _attribute(body, _LINK.size, _NAME).rstrip(b"\0").decode(errors="replace")
            if index == LOOPBACK or (kind == _ETHERNET and not merges_segments(name, self._any)):
                found.add(index)
        return found

    def device(self, sent: WireKey) -> int | None:
        """Return the index of the interface by which a packet goes out, None if there is no route."""
        size, family = (16, socket.AF_INET6) if sent.v6 else (4, socket.AF_INET)
        body = _ROUTE.pack(family, 8 * size, 8 * size, 0, 0, 0, 0, 0, 0)
        for kind, address in ((_TO, sent.target), (_FROM, sent.source)):
            body += _ATTRIBUTE.pack(_ATTRIBUTE.size + size, kind) + address[-size:]
        try:
            answer = next(self._ask(_GET_ROUTE, 0, body))
        except OSError as error:
            if error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EINVAL, errno.EACCES):
                return None
            raise
        index = int.from_bytes(_attribute(answer, _ROUTE.size, _BY), sys.byteorder)
        return index or None

    def _ask(self, kind: int, flags: int, body: bytes) -> Iterator[bytes]:
        self._sock.send(_HEADER.pack(_HEADER.size + len(body), kind, _REQUEST | flags, 0, 0) + body)
        while True:
            data = self._sock.recv(1 << 17)
            while len(data) >= _HEADER.size:
                length, answer, _, _, _ = _HEADER.unpack_from(data)
                content, data = data[_HEADER.size : length], data[length + 3 & ~3 :]
                if answer == _DONE:
                    return
                if answer == _ERROR:
                    number = -struct.unpack_from("=i", content)[0]
                    raise OSError(number, f"rtnetlink: {os.strerror(number)}")
                yield content
            if not flags:
                return

    def close(self) -> None:
        """Close the sockets."""
        self._any.close()
        self._sock.close()
        self.changes.close()


def _attribute(message: bytes, at: int, wanted: int) -> bytes:
    """Return the value of an attribute behind a message's header, empty if it is not there."""
    while at + _ATTRIBUTE.size <= len(message):
        size, kind = _ATTRIBUTE.unpack_from(message, at)
        if kind == wanted:
            return message[at + _ATTRIBUTE.size : at + size]
        at += max(_ATTRIBUTE.size, size + 3 & ~3)
    return b""
