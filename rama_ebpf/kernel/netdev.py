"""Interfaces: which there are and what becomes of them, and what they do with frames before and after XDP, as far as
their drivers tell.

Reference: rtnetlink(7), ``include/uapi/linux/if_link.h``; ``include/uapi/linux/ethtool.h``;
``Documentation/netlink/specs/netdev.yaml`` (Linux 6.3).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

__all__ = [
    "SIOCETHTOOL",
    "Device",
    "changes",
    "driver",
    "has_vlans",
    "link",
    "merges_segments",
    "receives_from_xdp",
    "strips_vlan_tags",
]

SIOCETHTOOL: Final = 0x8946
_GET_DRIVER, _GET_FLAGS = 0x03, 0x25
_DRIVER: Final = struct.Struct("=I32s160x")
_VALUE: Final = struct.Struct("=II")
_RXVLAN, _LRO = 1 << 8, 1 << 15
_VLAN_HEADINGS: Final = 2

_NETLINK_GENERIC, _CONTROL, _REQUEST, _ERROR = 16, 16, 1, 2
_HEADER: Final = struct.Struct("=IHHIIBBH")  # struct nlmsghdr, struct genlmsghdr
_ATTRIBUTE: Final = struct.Struct("=HH")
_GET_FAMILY, _FAMILY_ID, _FAMILY_NAME = 3, 1, 2
_GET_DEVICE, _IFINDEX, _XDP_FEATURES = 1, 1, 3
_LINK_MESSAGE: Final = struct.Struct("=IHHIIBBHiII")  # struct nlmsghdr, struct ifinfomsg
_GET_LINK, _LINK_NAME, _LINK_XDP = 18, 3, 43
_XDP_PROGRAMS: Final = (4, 5, 6, 7)  # IFLA_XDP_PROG_ID, and those of the driver, the stack, the hardware
_CHANGES: Final = 0x1 | 0x10 | 0x100  # RTMGRP_LINK, RTMGRP_IPV4_IFADDR, RTMGRP_IPV6_IFADDR
_NDO_XMIT: Final = 1 << 2  # enum netdev_xdp_act


def driver(interface: str) -> str:
    """Return the name of an interface's driver, empty if it tells none."""
    try:
        _, name = _DRIVER.unpack(_ethtool(interface, _GET_DRIVER, _DRIVER.size))
    except OSError:
        return ""
    return str(name.rstrip(b"\0").decode())


def strips_vlan_tags(interface: str) -> bool:
    """Whether VLAN tags come beside the frame and not in it (``rxvlan`` of ethtool): XDP does not see them then, and
    what it sends has none."""
    try:
        _, flags = _VALUE.unpack(_ethtool(interface, _GET_FLAGS, _VALUE.size))
    except OSError:
        return False
    return bool(flags & _RXVLAN)


def has_vlans(listed: Path = Path("/proc/net/vlan/config")) -> bool:
    """Whether this namespace has any VLAN interface. The list is not there before the first one was ever made."""
    return listed.exists() and len(listed.read_text(encoding="utf-8").splitlines()) > _VLAN_HEADINGS


def merges_segments(interface: str, sock: socket.socket) -> bool:
    """Whether an interface merges segments on receipt for good (``lro`` of ethtool): nobody can send them on as they
    came. ``sock`` is any internet socket."""
    try:
        _, flags = _VALUE.unpack(_ask_driver(sock, interface, _GET_FLAGS, _VALUE.size))
    except OSError:
        return False
    return bool(flags & _LRO)


def _ethtool(interface: str, command: int, size: int) -> bytes:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        return _ask_driver(sock, interface, command, size)


def _ask_driver(sock: socket.socket, interface: str, command: int, size: int) -> bytes:
    value = ctypes.create_string_buffer(struct.pack("=I", command), size)
    fcntl.ioctl(sock, SIOCETHTOOL, struct.pack("16sQ16x", interface.encode(), ctypes.addressof(value)))
    return value.raw


def receives_from_xdp(index: int) -> bool | None:
    """Whether frames that XDP redirects to an interface go anywhere; None if the kernel does not tell (before 6.3, or
    where a service manager keeps us from netlink).

    Of a veth this says whether its peer has NAPI, which it has with GRO or an XDP program of its own.
    """
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_GENERIC) as sock:
            family = _ask(sock, _CONTROL, _GET_FAMILY, _attribute(_FAMILY_NAME, b"netdev\0")).get(_FAMILY_ID)
            if family is None:
                return None
            request = _attribute(_IFINDEX, struct.pack("=I", index))
            features = _ask(sock, struct.unpack_from("=H", family)[0], _GET_DEVICE, request).get(_XDP_FEATURES)
    except OSError:
        return None
    return None if features is None else bool(struct.unpack_from("=Q", features)[0] & _NDO_XMIT)


@dataclass(frozen=True, slots=True)
class Device:
    """An interface of this network namespace. ``program`` is the id of its XDP program, 0 without one."""

    name: str
    program: int


def link(index: int) -> Device | None:
    """Look an interface of this network namespace up by its index; None if it is not here. Raises OSError."""
    request = _LINK_MESSAGE.pack(_LINK_MESSAGE.size, _GET_LINK, _REQUEST, 1, 0, 0, 0, 0, index, 0, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE) as sock:
        sock.send(request)
        data = sock.recv(1 << 16)
    if struct.unpack_from("=IH", data)[1] == _ERROR:
        number = -struct.unpack_from("=i", data, 16)[0]
        if number == errno.ENODEV:
            return None
        raise OSError(number, f"rtnetlink: {os.strerror(number)}")
    found = _attributes(data, _LINK_MESSAGE.size)
    attached = _attributes(found.get(_LINK_XDP, b""), 0)
    programs = [int.from_bytes(attached[kind], sys.byteorder) for kind in _XDP_PROGRAMS if kind in attached]
    return Device(found[_LINK_NAME].rstrip(b"\0").decode(errors="replace"), next(iter(programs), 0))


def changes() -> socket.socket:
    """Return a non-blocking socket on which something arrives whenever an interface or an address of this network
    namespace comes, goes or changes. Raises OSError."""
    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    sock = socket.socket(socket.AF_NETLINK, kind, socket.NETLINK_ROUTE)
    try:
        sock.bind((0, _CHANGES))
    except BaseException:
        sock.close()
        raise
    return sock


def _attribute(kind: int, value: bytes) -> bytes:
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), kind) + value + bytes(-len(value) % 4)


def _ask(sock: socket.socket, family: int, command: int, attributes: bytes) -> dict[int, bytes]:
    """Return the attributes of the answer, none if what was asked for is not there. Raises OSError."""
    sock.send(_HEADER.pack(_HEADER.size + len(attributes), family, _REQUEST, 1, 0, command, 1, 0) + attributes)
    data = sock.recv(1 << 16)
    length, kind = struct.unpack_from("=IH", data)
    if kind == _ERROR:
        number = -struct.unpack_from("=i", data, 16)[0]
        if number in (errno.ENOENT, errno.EOPNOTSUPP):
            return {}
        raise OSError(number, f"generic netlink: {os.strerror(number)}")
    return _attributes(data[:length], _HEADER.size)


def _attributes(data: bytes, at: int) -> dict[int, bytes]:
    found = {}
    while at + _ATTRIBUTE.size <= len(data):
        size, attribute = _ATTRIBUTE.unpack_from(data, at)
        found[attribute & 0x3FFF] = data[at + _ATTRIBUTE.size : at + size]
        at += max(_ATTRIBUTE.size, size + 3 & ~3)
    return found
