"""Options of TCP sockets, for listeners and for connections to targets."""

from __future__ import annotations

import errno
import socket
from dataclasses import dataclass
from typing import Final

__all__ = ["KeepAlive", "Setting", "SocketOptions", "apply_settings"]

Setting = tuple[str, int, int, int | bytes]
"""What :class:`SocketOptions` calls an option, its level and number (setsockopt(2)), and its value."""

_IP_BIND_ADDRESS_NO_PORT: Final = 24  # linux/in.h; Python has no name for it before 3.12
_IP_FREEBIND: Final = 15
_IPV6_FREEBIND: Final = 78
_SO_MARK: Final = 36  # asm-generic/socket.h


@dataclass(frozen=True, slots=True)
class KeepAlive:
    """Probes after ``idle`` seconds of silence, every ``interval`` seconds, ``probes`` times (tcp(7))."""

    idle: int = 60
    interval: int = 15
    probes: int = 4


@dataclass(frozen=True, slots=True)
class SocketOptions:
    """What is set on a TCP socket; None leaves the kernel's default.

    Urgent data is always in line (RFC 6093 section 6). ``nodelay``: send small writes at once. ``user_timeout``:
    seconds that sent data may stay unacknowledged (RFC 5482). ``send_buffer`` and ``receive_buffer``: bytes, which ends
    the kernel's own tuning. ``mark``: SO_MARK for policy routing (needs CAP_NET_ADMIN). ``interface``: the device that
    packets must use (SO_BINDTODEVICE). ``dscp``: 0-63 (RFC 2474). ``congestion``: the name of a congestion control.
    ``freebind``: sources need not be on an interface.
    """

    nodelay: bool = True
    keepalive: KeepAlive | None = None
    user_timeout: float | None = None
    send_buffer: int | None = None
    receive_buffer: int | None = None
    mark: int | None = None
    interface: str | None = None
    dscp: int | None = None
    congestion: str | None = None
    freebind: bool = False

    def __post_init__(self) -> None:
        if self.dscp is not None and not 0 <= self.dscp <= 63:
            raise ValueError(f"dscp must be 0-63, not {self.dscp}")
        if self.interface is not None and not 0 < len(self.interface.encode()) <= 15:
            raise ValueError(f"{self.interface!r} is not an interface name (1-15 bytes)")

    def apply(self, sock: socket.socket) -> None:
        """Set them on ``sock``, before it connects or listens. Raises OSError naming the option."""
        apply_settings(sock, self.settings(sock.family))

    def settings(self, family: int) -> tuple[Setting, ...]:
        """Return them as :func:`apply_settings` takes them: for who has many sockets of a family."""
        tcp, base = int(socket.IPPROTO_TCP), int(socket.SOL_SOCKET)
        made: list[Setting] = []
        if self.nodelay:
            made.append(("nodelay", tcp, socket.TCP_NODELAY, 1))
        made.append(("oobinline", base, socket.SO_OOBINLINE, 1))
        if self.keepalive is not None:
            made.append(("keepalive", base, socket.SO_KEEPALIVE, 1))
            made.append(("keepalive.idle", tcp, socket.TCP_KEEPIDLE, self.keepalive.idle))
            made.append(("keepalive.interval", tcp, socket.TCP_KEEPINTVL, self.keepalive.interval))
            made.append(("keepalive.probes", tcp, socket.TCP_KEEPCNT, self.keepalive.probes))
        if self.user_timeout is not None:
            made.append(("user_timeout", tcp, socket.TCP_USER_TIMEOUT, round(self.user_timeout * 1000)))
        if self.send_buffer is not None:
            made.append(("send_buffer", base, socket.SO_SNDBUF, self.send_buffer))
        if self.receive_buffer is not None:
            made.append(("receive_buffer", base, socket.SO_RCVBUF, self.receive_buffer))
        if self.mark is not None:
            made.append(("mark", base, _SO_MARK, self.mark))
        if self.interface is not None:
            made.append(("interface", base, socket.SO_BINDTODEVICE, self.interface.encode()))
        if self.congestion is not None:
            made.append(("congestion", tcp, socket.TCP_CONGESTION, self.congestion.encode()))
        if self.dscp is not None and family == socket.AF_INET6:
            made.append(("dscp", int(socket.IPPROTO_IPV6), socket.IPV6_TCLASS, self.dscp << 2))
        elif self.dscp is not None:
            made.append(("dscp", int(socket.IPPROTO_IP), socket.IP_TOS, self.dscp << 2))
        return tuple(made)

    def bind_source(self, sock: socket.socket, address: str) -> None:
        """Bind ``sock`` to a source address; the port is chosen when it connects, so that ports are not used up by
        address but by destination. Raises OSError naming the address."""
        apply_settings(sock, (("source", socket.IPPROTO_IP, _IP_BIND_ADDRESS_NO_PORT, 1),))
        try:
            sock.bind((address, 0))
        except OSError as error:
            if self.freebind and error.errno == errno.EADDRNOTAVAIL:
                self._bind_foreign(sock, address)
                return
            raise OSError(error.errno, f"cannot bind to the source {address}: {error.strerror}") from error

    def _bind_foreign(self, sock: socket.socket, address: str) -> None:
        """Bind an address that is on no interface, and reaches us all the same."""
        v6 = sock.family == socket.AF_INET6
        level, option = (socket.IPPROTO_IPV6, _IPV6_FREEBIND) if v6 else (socket.IPPROTO_IP, _IP_FREEBIND)
        try:
            sock.setsockopt(level, option, 1)
            sock.bind((address, 0))
        except OSError as error:
            sysctl = f"net.ipv{6 if v6 else 4}.ip_nonlocal_bind"
            text = f"cannot bind to the source {address}: {error.strerror}; it is on no interface: sysctl -w {sysctl}=1"
            raise OSError(errno.EADDRNOTAVAIL, text) from error


def apply_settings(sock: socket.socket, settings: tuple[Setting, ...]) -> None:
    """Set socket options. Raises OSError naming the one that was refused."""
    for name, level, option, value in settings:
        try:
            sock.setsockopt(level, option, value)
        except OSError as error:
            raise OSError(error.errno, f"socket option {name} = {value!r}: {error.strerror}") from error
