"""Listing and ending TCP connections of this network namespace, and listing who listens, over netlink.

Reference: sock_diag(7), ``include/uapi/linux/inet_diag.h``. SOCK_DESTROY takes CAP_NET_ADMIN and
CONFIG_INET_DIAG_DESTROY.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Final

__all__ = [
    "Connection",
    "ListeningSocket",
    "connections",
    "cookie_of",
    "destroy",
    "has_socket",
    "listening",
    "owner_of",
]

_BY_FAMILY, _DESTROY = 20, 21
_REQUEST, _ACK, _DUMP = 1, 4, 0x300
_ERROR, _DONE = 2, 3
_NETLINK_SOCK_DIAG: Final = 4
_STATES: Final = sum(1 << state for state in (1, 3, 4, 5, 8, 9, 11))  # all that have a peer, less SYN_SENT, TIME_WAIT
_LISTEN: Final = 1 << 10
_CGROUP_ID, _V6ONLY = 21, 11
_SO_COOKIE: Final = 57

_HEADER: Final = struct.Struct("=IHHII")
_REQUEST_V2: Final = struct.Struct("=BBBBI48s")
_MESSAGE: Final = struct.Struct("=BBBB48sIIIII")
_SOCKID: Final = struct.Struct("!HH16s16s")
_ATTRIBUTE: Final = struct.Struct("=HH")


@dataclass(frozen=True, slots=True)
class Connection:
    """A connection as the kernel has it. ``cgroup`` is the id of its socket's cgroup (the inode of the directory),
    None where the kernel does not tell. ``identity`` is ``struct inet_diag_sockid``, its cookie included; ``inode`` is
    0 before it was accepted."""

    local: IPv4Address | IPv6Address
    local_port: int
    peer: IPv4Address | IPv6Address
    peer_port: int
    cgroup: int | None
    identity: bytes
    inode: int = 0


@dataclass(frozen=True, slots=True)
class ListeningSocket:
    """A TCP socket that listens. ``cookie`` tells it from all others while the machine is up; ``cgroup`` is as that of
    a :class:`Connection`; ``takes_ipv4``: it is one of IPv6 that takes connections of IPv4, too."""

    address: IPv4Address | IPv6Address
    port: int
    cookie: int
    inode: int
    cgroup: int | None
    takes_ipv4: bool

    def meets(self, ip: IPv4Address | IPv6Address, port: int) -> bool:
        """Whether it takes connections that a listener at this address would take, too: one may be any address."""
        if self.port != port:
            return False
        if self.address.version != ip.version:
            return self.takes_ipv4 and self.address.is_unspecified
        return self.address == ip or self.address.is_unspecified or ip.is_unspecified


def listening() -> list[ListeningSocket]:
    """Return the TCP sockets that listen in this network namespace. Raises OSError."""
    found = []
    for family in (socket.AF_INET, socket.AF_INET6):
        for body in _ask(_BY_FAMILY, _REQUEST | _DUMP, _REQUEST_V2.pack(family, 6, 0, 0, _LISTEN, bytes(48))):
            _, _, _, _, identity, _, _, _, _, inode = _MESSAGE.unpack_from(body)
            port, _, local, _ = _SOCKID.unpack_from(identity)
            address = IPv4Address(local[:4]) if family == socket.AF_INET else IPv6Address(local)
            traits = _attributes(body)
            takes_ipv4 = family == socket.AF_INET6 and traits.get(_V6ONLY, b"\1")[:1] == b"\0"
            found.append(ListeningSocket(address, port, _cookie(identity), inode, _cgroup(traits), takes_ipv4))
    return found


def cookie_of(sock: socket.socket) -> int:
    """Return the cookie of a socket of ours. Raises OSError."""
    return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8), sys.byteorder)


def has_socket(pid: int, inode: int) -> bool:
    """Whether a process has a socket, by its inode; False, too, if we may not look."""
    directory = f"/proc/{pid}/fd"
    with contextlib.suppress(OSError):  # it has ended, or is another user's
        return any(os.readlink(f"{directory}/{fd}") == f"socket:[{inode}]" for fd in os.listdir(directory))
    return False


def owner_of(inode: int) -> str:
    """Say which process has a socket, by its inode, as far as that can be seen: of several the oldest."""
    for pid in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        if has_socket(pid, inode):
            with contextlib.suppress(OSError):
                name = Path(f"/proc/{pid}/comm").read_text(encoding="utf-8", errors="replace").strip()
                return f"process {pid} ({name})"
    return "another process"


def connections(local_port: int) -> list[Connection]:
    """Return the connections, also those not yet accepted, whose local port is this one, or all for 0. Raises
    OSError."""
    return [found for family in (socket.AF_INET, socket.AF_INET6) for found in _dump(family, local_port)]


def destroy(connection: Connection) -> bool:
    """End a connection: its peer gets RST, its owner ECONNABORTED. Return False if it has ended by itself.

    Raises PermissionError without CAP_NET_ADMIN, and OSError EOPNOTSUPP where the kernel cannot.
    """
    family = socket.AF_INET if connection.local.version == 4 else socket.AF_INET6
    request = _REQUEST_V2.pack(family, socket.IPPROTO_TCP, 0, 0, _STATES, connection.identity)
    try:
        list(_ask(_DESTROY, _REQUEST | _ACK, request))
    except FileNotFoundError:
        return False
    return True


def _dump(family: int, local_port: int) -> list[Connection]:
    identity = struct.pack("!H46x", local_port)  # the kernel compares what is not zero
    request = _REQUEST_V2.pack(family, socket.IPPROTO_TCP, 0, 0, _STATES, identity)
    return [_parse(body) for body in _ask(_BY_FAMILY, _REQUEST | _DUMP, request)]


def _ask(kind: int, flags: int, body: bytes) -> Iterator[bytes]:
    """Send a request and yield the bodies of the answer's messages. Raises the OSError that the kernel answers."""
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as sock:
        sock.send(_HEADER.pack(_HEADER.size + len(body), kind, flags, 1, 0) + body)
        while True:
            data = memoryview(sock.recv(1 << 16))
            while len(data) >= _HEADER.size:
                length, answer, _, _, _ = _HEADER.unpack_from(data)
                content = data[_HEADER.size : length]
                data = data[(length + 3) & ~3 :]
                if answer in (_DONE, _ERROR):
                    number = -struct.unpack_from("=i", content)[0] if len(content) >= 4 else 0
                    if number:
                        raise OSError(number, f"sock_diag: {os.strerror(number)}")
                    return
                yield bytes(content)


def _parse(body: bytes) -> Connection:
    family, _, _, _, identity, _, _, _, _, inode = _MESSAGE.unpack_from(body)
    local_port, peer_port, local, peer = _SOCKID.unpack_from(identity)
    make = (lambda raw: IPv4Address(raw[:4])) if family == socket.AF_INET else IPv6Address
    return Connection(make(local), local_port, make(peer), peer_port, _cgroup(_attributes(body)), identity, inode)


def _cookie(identity: bytes) -> int:
    low, high = struct.unpack_from("=II", identity, 40)
    return int(low | high << 32)


def _cgroup(attributes: Mapping[int, bytes]) -> int | None:
    value = attributes.get(_CGROUP_ID)
    return None if value is None else int.from_bytes(value, sys.byteorder)


def _attributes(body: bytes) -> dict[int, bytes]:
    found, at = {}, _MESSAGE.size
    while at + _ATTRIBUTE.size <= len(body):
        length, kind = _ATTRIBUTE.unpack_from(body, at)
        found[kind] = body[at + _ATTRIBUTE.size : at + length]
        at += max(_ATTRIBUTE.size, (length + 3) & ~3)
    return found
