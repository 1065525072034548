"""What the kernel tells of a connected TCP socket, for who may not change it.

Reference: tcp(7), ``include/uapi/linux/tcp.h`` (``struct tcp_info``), ``include/uapi/asm-generic/socket.h``.
"""

from __future__ import annotations

import enum
import socket
import struct
from dataclasses import dataclass
from typing import Final

from .wire import WireKey

__all__ = ["ESTABLISHED", "TcpFacts", "TcpOption", "netns_cookie", "segments", "unacknowledged"]

ESTABLISHED: Final = 1

_INFO_BYTES: Final = 104
_INFO: Final = struct.Struct("=24I")
_SEGMENTS: Final = struct.Struct("=140xI8xI")  # tcpi_segs_in, tcpi_data_segs_in
_SO_MARK, _SO_NETNS_COOKIE = 36, 71
_TCP_ULP: Final = 31
_IPV6_TCLASS: Final = 67
_MAPPED: Final = "::ffff:"


class TcpOption(enum.IntFlag):
    """``tcpi_options``: what was agreed on when the connection began, and ECN_SEEN, what was met since."""

    TIMESTAMPS = 1
    SACK = 2
    WINDOW_SCALE = 4
    ECN = 8
    ECN_SEEN = 16
    SYN_DATA = 32
    USEC_TIMESTAMPS = 64


@dataclass(frozen=True, slots=True)
class TcpFacts:
    """A connected TCP socket. ``arriving`` are the addresses of what its peer sends; ``namespace`` is the cookie of its
    network namespace; ``rtt`` is in seconds, sizes are bytes. ``marked`` if its packets bear a mark, a type of service
    or an interface of their own, ``layered`` if its bytes go through a protocol on top (kTLS)."""

    tcp: bool
    namespace: int
    arriving: WireKey
    link_local: bool
    state: int
    options: TcpOption
    snd_wscale: int
    rcv_wscale: int
    snd_mss: int
    advmss: int
    pmtu: int
    rtt: float
    marked: bool
    layered: bool

    @classmethod
    def of(cls, sock: socket.socket) -> TcpFacts:
        """Ask. Raises OSError for a socket that is not connected, and for one that is of no internet family."""
        if sock.family not in (socket.AF_INET, socket.AF_INET6):
            raise OSError(f"a socket of family {sock.family}")
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
        options = TcpOption(info[5] & 127)
        values = _INFO.unpack_from(info, 8)
        scaled = TcpOption.WINDOW_SCALE in options
        peer, local = sock.getpeername(), sock.getsockname()
        source, target = _packed(peer[0]), _packed(local[0])
        level, kind = (socket.IPPROTO_IPV6, _IPV6_TCLASS) if sock.family == socket.AF_INET6 else (0, socket.IP_TOS)
        return cls(
            tcp=sock.getsockopt(socket.SOL_SOCKET, socket.SO_PROTOCOL) == socket.IPPROTO_TCP,
            namespace=netns_cookie(sock),
            arriving=WireKey(
                source[-16:].rjust(16, b"\0"),
                target[-16:].rjust(16, b"\0"),
                struct.pack("!H", peer[1]),
                struct.pack("!H", local[1]),
                len(source) == 16,
            ),
            link_local=len(peer) > 3 and (peer[3] != 0 or local[3] != 0),
            state=info[0],
            options=options,
            snd_wscale=info[6] & 15 if scaled else 0,
            rcv_wscale=info[6] >> 4 if scaled else 0,
            snd_mss=values[2],
            advmss=values[19],
            pmtu=values[13],
            rtt=values[15] / 1e6,
            marked=bool(
                sock.getsockopt(socket.SOL_SOCKET, _SO_MARK)
                or sock.getsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, 16).rstrip(b"\0")
                or sock.getsockopt(level, kind) & ~3
            ),
            layered=bool(sock.getsockopt(socket.IPPROTO_TCP, _TCP_ULP, 16).rstrip(b"\0")),
        )


def segments(sock: socket.socket) -> tuple[int, int]:
    """Return how many segments have come to a socket, and how many of them with data. Raises OSError."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _SEGMENTS.size)
    came, with_data = _SEGMENTS.unpack(info)
    return came, with_data


def unacknowledged(sock: socket.socket) -> int:
    """Return how many segments a socket has sent and sends again, for its peer has not acknowledged them. Raises
    OSError."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
    return int(_INFO.unpack_from(info, 8)[4])


def netns_cookie(sock: socket.socket) -> int:
    """Return the cookie of a socket's network namespace (Linux 5.14). Raises OSError."""
    return int(struct.unpack("=Q", sock.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8))[0])


def _packed(host: str) -> bytes:
    host = host.partition("%")[0].removeprefix(_MAPPED)
    return socket.inet_pton(socket.AF_INET6 if ":" in host else socket.AF_INET, host)
