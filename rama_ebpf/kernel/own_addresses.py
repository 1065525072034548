"""What is delivered to this host itself: its addresses, and whatever else its local routes take in.

Reference: rtnetlink(7); ``include/uapi/linux/rtnetlink.h`` and ``if_addr.h``.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Collection, Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
from typing import Final

__all__ = ["UNSPECIFIED", "local_networks", "own_addresses", "watch_addresses"]

IPNetwork = IPv4Network | IPv6Network

UNSPECIFIED: Final = frozenset({ip_network("0.0.0.0/32"), ip_network("::/128")})
"""A connection to these goes to this host, too."""

_ROUTE: Final = 0  # NETLINK_ROUTE
_ADDRESS_GROUPS: Final = 1 << 4 | 1 << 8  # RTNLGRP_IPV4_IFADDR, RTNLGRP_IPV6_IFADDR
_SOL_NETLINK, _GET_STRICT_CHK = 270, 12
_MESSAGE: Final = struct.Struct("=IHHII")  # struct nlmsghdr
_ATTRIBUTE: Final = struct.Struct("=HH")
_REQUEST_DUMP: Final = 0x301
_ERROR, _DONE, _INTERRUPTED = 2, 3, 0x10
_NEW_ADDRESS, _GET_ADDRESS, _NEW_ROUTE, _GET_ROUTE = 20, 22, 24, 26
_IFADDR: Final = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, index
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_RTMSG: Final = struct.Struct("=BBBBBBBBI")  # family, lengths of destination and source, tos, table, …, type, flags
_RTA_DST: Final = 1
_TABLE_LOCAL: Final = 255
_LOCAL_TYPES: Final = (2, 4)  # RTN_LOCAL, RTN_ANYCAST
_FAMILIES: Final = (socket.AF_INET, socket.AF_INET6)
_WIDTH: Final = {socket.AF_INET: 32, socket.AF_INET6: 128}
_TRIES: Final = 8


def watch_addresses() -> socket.socket:
    """Return a non-blocking socket that has something to read when an address of this network namespace came or went
    since it was last emptied. Raises OSError."""
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, _ROUTE)
    try:
        sock.bind((0, _ADDRESS_GROUPS))
    except BaseException:
        sock.close()
        raise
    return sock


def local_networks() -> frozenset[IPNetwork]:
    """Return the networks whose packets this network namespace delivers to itself, each address as one of its own.

    Addresses are asked for besides routes: the kernel tells of a new one before its route is there. Raises OSError. It
    waits for the kernel's lock of routes, which others may hold for seconds.
    """
    return UNSPECIFIED | _asked((_GET_ADDRESS, _GET_ROUTE))


def own_addresses() -> frozenset[IPv4Address | IPv6Address]:
    """Return the addresses of this network namespace's interfaces, and not what local routes take in besides. Raises
    OSError."""
    return frozenset(network.network_address for network in _asked((_GET_ADDRESS,)))


def _asked(kinds: Collection[int]) -> frozenset[IPNetwork]:
    found = set()
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _ROUTE) as sock:
        try:
            sock.setsockopt(_SOL_NETLINK, _GET_STRICT_CHK, 1)  # Linux 4.20: only the table that is asked for
        except OSError as error:
            if error.errno != errno.ENOPROTOOPT:
                raise
        for family in _FAMILIES:
            for kind, answer, request in (
                (_GET_ADDRESS, _NEW_ADDRESS, _IFADDR.pack(family, 0, 0, 0, 0)),
                (_GET_ROUTE, _NEW_ROUTE, _RTMSG.pack(family, 0, 0, 0, _TABLE_LOCAL, 0, 0, 0, 0)),
            ):
                if kind not in kinds:
                    continue
                parse = _address if kind == _GET_ADDRESS else _route
                for body in _dump(sock, kind, answer, request):
                    network = parse(body, family)
                    if network is not None:
                        found.add(network)
    return frozenset(found)


def _address(body: bytes, family: int) -> IPNetwork | None:
    if body[0] != family:
        return None
    attributes = _attributes(body[_IFADDR.size :])
    own = attributes.get(_IFA_LOCAL) or attributes.get(_IFA_ADDRESS)  # the other one is the peer's
    return None if own is None else ip_network(own)


def _route(body: bytes, family: int) -> IPNetwork | None:
    found, length, _, _, table, _, _, kind, _ = _RTMSG.unpack_from(body)
    if found != family or table != _TABLE_LOCAL or kind not in _LOCAL_TYPES:
        return None
    destination = _attributes(body[_RTMSG.size :]).get(_RTA_DST, bytes(_WIDTH[socket.AddressFamily(family)] // 8))
    return ip_network((destination, length))


def _attributes(data: bytes) -> dict[int, bytes]:
    found, at = {}, 0
    while at + _ATTRIBUTE.size <= len(data):
        size, kind = _ATTRIBUTE.unpack_from(data, at)
        if size < _ATTRIBUTE.size:
            break
        found[kind & 0x3FFF] = data[at + _ATTRIBUTE.size : at + size]
        at += size + 3 & ~3
    return found


def _dump(sock: socket.socket, kind: int, answer: int, request: bytes) -> list[bytes]:
    """Ask for all of something, again where it changed meanwhile. Raises OSError."""
    for number in range(1, _TRIES + 1):
        sock.send(_MESSAGE.pack(_MESSAGE.size + len(request), kind, _REQUEST_DUMP, number, 0) + request)
        bodies: list[bytes] = []
        interrupted = False
        for message_kind, flags, body in _messages(sock, number):
            interrupted |= bool(flags & _INTERRUPTED)
            if message_kind == _ERROR:
                code = -struct.unpack_from("=i", body)[0]
                if code == errno.ENOENT:  # there is no such table: nothing is local
                    return []
                raise OSError(code, f"netlink: {os.strerror(code)}")
            if message_kind == answer:
                bodies.append(body)
        if not interrupted:
            return bodies
    raise OSError(errno.EAGAIN, "this host's addresses change all the time")


def _messages(sock: socket.socket, number: int) -> Iterator[tuple[int, int, bytes]]:
    """The messages of one answer; the last is an error, or ``_DONE``."""
    while True:
        data = sock.recv(1 << 18)
        at = 0
        while at + _MESSAGE.size <= len(data):
            length, kind, flags, sequence, _ = _MESSAGE.unpack_from(data, at)
            if length < _MESSAGE.size:
                raise OSError(errno.EPROTO, "netlink: a message without a length")
            if sequence == number:
                yield kind, flags, data[at + _MESSAGE.size : at + length]
                if kind in (_DONE, _ERROR):
                    return
            at += length + 3 & ~3
