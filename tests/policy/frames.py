"""Ethernet frames, built byte by byte: what the gate's parsers are given."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address

__all__ = [
    "AH",
    "DST_OPTIONS",
    "FRAGMENT",
    "HOP_BY_HOP",
    "QINQ",
    "ROUTING",
    "VLAN",
    "checksum",
    "ethernet",
    "extension",
    "ipv4",
    "ipv6",
    "syn_over_ipv4",
    "tcp",
]

HOP_BY_HOP, ROUTING, FRAGMENT, AH, DST_OPTIONS, TCP = 0, 43, 44, 51, 60, 6
VLAN, QINQ = 0x8100, 0x88A8


def tcp(port: int, *, flags: int = 0x02, source_port: int = 40000, options: bytes = b"", sequence: int = 1) -> bytes:
    """A TCP header; ``flags`` defaults to SYN, ``options`` is a multiple of 4 bytes."""
    words = 5 + len(options) // 4
    return struct.pack("!HHIIBBHHH", source_port, port, sequence, 0, words << 4, flags, 64240, 0, 0) + options


def checksum(data: bytes) -> bytes:
    """The Internet checksum (RFC 1071)."""
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!H", ~total & 0xFFFF)


def syn_over_ipv4(source: IPv4Address, target: IPv4Address, port: int, source_port: int) -> bytes:
    """A whole SYN that a stack takes: its checksum is right (RFC 9293, 3.1)."""
    segment = tcp(port, source_port=source_port)
    pseudo = source.packed + target.packed + struct.pack("!HH", TCP, len(segment))
    return ipv4(source, target, segment[:16] + checksum(pseudo + segment) + segment[18:])


def ipv4(
    source: IPv4Address,
    target: IPv4Address,
    payload: bytes,
    *,
    options: bytes = b"",
    fragment: int = 0,
    protocol: int = TCP,
) -> bytes:
    """An IPv4 packet. ``options`` is a multiple of 4 bytes; ``fragment`` is the flags and offset field."""
    words = 5 + len(options) // 4
    head = struct.pack("!BBHHHBBH", 4 << 4 | words, 0, words * 4 + len(payload), 1, fragment, 64, protocol, 0)
    head += source.packed + target.packed + options
    return head[:10] + checksum(head) + head[12:] + payload


def ipv6(source: IPv6Address, target: IPv6Address, payload: bytes, *, next_header: int = TCP) -> bytes:
    """An IPv6 packet."""
    return struct.pack("!IHBB", 6 << 28, len(payload), next_header, 64) + source.packed + target.packed + payload


def extension(kind: int, next_header: int, *, units: int = 0, fragment: int = 0) -> bytes:
    """An extension header of ``kind``: 8 bytes and ``units`` times 8 more (4 more for AH, RFC 4302). ``fragment`` is
    the offset and flags field of a fragment header."""
    if kind == FRAGMENT:
        return struct.pack("!BBHI", next_header, 0, fragment, 1)
    if kind == AH:
        return bytes((next_header, units)) + bytes(6 + 4 * units)
    return bytes((next_header, units)) + bytes(6 + 8 * units)


def ethernet(packet: bytes, *, tags: Sequence[int] = (), protocol: int | None = None) -> bytes:
    """A frame around an IP packet. ``tags`` are the EtherTypes of VLAN tags, the outermost first."""
    if protocol is None:
        protocol = 0x0800 if packet[0] >> 4 == 4 else 0x86DD
    kinds = [*tags, protocol]
    head = bytes(12) + struct.pack("!H", kinds[0])
    for kind in kinds[1:]:
        head += struct.pack("!HH", 7, kind)
    return head + packet
