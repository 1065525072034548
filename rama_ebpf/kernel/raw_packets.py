"""Single packets that no socket of ours would send: resets of connections that others have, and ICMP errors about their
packets.

Reference: raw(7), ipv6(7); RFC 9293 section 3.5.2, RFC 792, RFC 4443.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import Final

from .wire import STATE, WireKey

__all__ = ["RawPackets", "checksum"]

_HOP_LIMIT: Final = 64
_SO_MARK: Final = 36
_MASK: Final = 0xFFFFFFFF
_RST, _ACK = 4, 16
_WINDOW: Final = 0xFFFF


class RawPackets:
    """Sockets by which whole packets are sent, headers included. They stay usable for who may open no more. Raises
    OSError."""

    def __init__(self) -> None:
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
        self._v4 = socket.socket(socket.AF_INET, kind, socket.IPPROTO_RAW)
        self._v6: socket.socket | None = None
        with contextlib.suppress(OSError):  # a kernel without IPv6
            self._v6 = socket.socket(socket.AF_INET6, kind, socket.IPPROTO_RAW)
        self.failed = 0
        """How many could not be sent: there is no way to their target, or no room."""

    def reset(self, sent: WireKey, seq: int) -> None:
        """Reset a connection, as its other end: ``seq`` is what the target of the packet expects next."""
        segment = sent.sport + sent.dport + struct.pack("!IIBBHHH", seq, 0, 0x50, _RST, 0, 0, 0)
        self._send(sent, socket.IPPROTO_TCP, segment, at=16)

    def acknowledge(self, arriving: WireKey, seq: int, ack: int) -> None:
        """Acknowledge to a socket of this host, as its peer, what it has sent: ``arriving`` are the addresses of what
        that sends. The packet stays within the host, and is none of the wire relay's."""
        segment = arriving.sport + arriving.dport
        segment += struct.pack("!IIBBHHH", seq & _MASK, ack & _MASK, 0x50, _ACK, _WINDOW, 0, 0)
        self._send(arriving, socket.IPPROTO_TCP, segment, at=16, mark=STATE["WIRE_OWN_MARK"])

    def error(self, sent: WireKey, icmp: bytes) -> None:
        """Send an ICMP message, of which the checksum is zero, between the addresses of ``sent``."""
        self._send(sent, socket.IPPROTO_ICMPV6 if sent.v6 else socket.IPPROTO_ICMP, icmp, at=2)

    def _send(self, sent: WireKey, protocol: int, body: bytes, *, at: int, mark: int = 0) -> None:
        size = 16 if sent.v6 else 4
        source, target = sent.source[-size:], sent.target[-size:]
        pseudo = source + target + struct.pack("!IHBB", len(body), 0, 0, protocol)
        summed = checksum(body if protocol == socket.IPPROTO_ICMP else pseudo + body)
        body = body[:at] + struct.pack("!H", summed) + body[at + 2 :]
        if sent.v6:
            header = struct.pack("!IHBB", 6 << 28, len(body), protocol, _HOP_LIMIT) + source + target
        else:
            header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 0, 0x4000, _HOP_LIMIT, protocol, 0)
            header += source + target  # the kernel fills in the checksum and an identification
        sock, family = (self._v6, socket.AF_INET6) if sent.v6 else (self._v4, socket.AF_INET)
        try:
            if sock is not None:
                if mark:
                    sock.setsockopt(socket.SOL_SOCKET, _SO_MARK, mark)
                sock.sendto(header + body, (socket.inet_ntop(family, target), 0))
        except OSError:
            self.failed += 1
        finally:
            if mark and sock is not None:
                sock.setsockopt(socket.SOL_SOCKET, _SO_MARK, 0)

    def close(self) -> None:
        """Close the sockets."""
        self._v4.close()
        if self._v6 is not None:
            self._v6.close()


def checksum(data: bytes) -> int:
    """The internet checksum (RFC 1071)."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF
