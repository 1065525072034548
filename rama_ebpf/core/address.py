"""Addresses: a socket address is an IP and a port; an authority is what a client asked for (name or IP, and port)."""

from __future__ import annotations

import errno
import functools
import socket
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, ip_address

__all__ = ["Authority", "Endpoint", "IPAddress", "SocketAddress", "is_loopback", "mapped", "unmap"]

IPAddress = IPv4Address | IPv6Address


def unmap(ip: IPAddress) -> IPAddress:
    """Return the IPv4 address inside an IPv4-mapped IPv6 address (RFC 4291 section 2.5.5.2), else ``ip`` itself."""
    if isinstance(ip, IPv6Address) and ip.ipv4_mapped is not None:
        return ip.ipv4_mapped
    return ip


def mapped(ip: IPAddress) -> bytes:
    """Return the 16 bytes of an IPv6 address, or of the IPv4-mapped one of an IPv4 address; the inverse of
    :func:`unmap`."""
    return ip.packed if ip.version == 6 else b"\0" * 10 + b"\xff\xff" + ip.packed


def is_loopback(ip: IPAddress) -> bool:
    """Whether ``ip`` is in 127.0.0.0/8 or ::1; what ``ip.is_loopback`` says, ten times as fast."""
    number = int(ip)
    return number >> 24 == 127 if type(ip) is IPv4Address else number == 1


@functools.lru_cache(4096)
def _parsed(host: str) -> IPAddress:
    """The address in a sockaddr. Few hosts make many connections, and parsing costs as much as a system call."""
    return unmap(ip_address(host.partition("%")[0]))


@functools.lru_cache(4096)
def _dotted(number: int) -> str:
    return socket.inet_ntoa(number.to_bytes(4, "big"))


@dataclass(frozen=True, slots=True)
class SocketAddress:
    """An IP address and a port (0–65535). ``scope_id`` is the interface index of a link-local IPv6 address, else 0."""

    ip: IPAddress
    port: int
    scope_id: int = 0
    _text: str = field(default="", init=False, repr=False, compare=False)

    @classmethod
    def from_sockaddr(cls, sockaddr: tuple[object, ...]) -> SocketAddress:
        """Convert what ``getpeername()`` returns for AF_INET or AF_INET6; IPv4-mapped addresses become IPv4."""
        if len(sockaddr) == 2:
            return cls(_parsed(sockaddr[0]), sockaddr[1])  # type: ignore[arg-type]  # the kernel's own words
        return cls(_parsed(sockaddr[0]), sockaddr[1], sockaddr[3])  # type: ignore[arg-type]

    @classmethod
    def zoned(cls, ip: IPAddress, port: int) -> SocketAddress:
        """Build from an address that may have a zone (RFC 4007 section 11, ``fe80::1%eth0``): the name of an interface,
        or its index. Raises OSError (ENODEV) for an interface that is not there."""
        zone = ip.scope_id if isinstance(ip, IPv6Address) else None
        if zone is None:
            return cls(ip, port)
        try:
            index = int(zone) if zone.isascii() and zone.isdigit() else socket.if_nametoindex(zone)
        except OSError as error:
            raise OSError(errno.ENODEV, f"no interface {zone!r}, the zone of {ip}") from error
        return cls(IPv6Address(int(ip)), port, index)

    @property
    def family(self) -> socket.AddressFamily:
        return socket.AF_INET if type(self.ip) is IPv4Address else socket.AF_INET6

    def to_sockaddr(self) -> tuple[str, int] | tuple[str, int, int, int]:
        """Return the tuple that the :mod:`socket` functions take for :attr:`family`."""
        if type(self.ip) is IPv4Address:
            return (_dotted(int(self.ip)), self.port)
        return (str(self.ip), self.port, 0, self.scope_id)

    def __str__(self) -> str:
        text = self._text
        if not text:  # asked for each log line of a connection
            text = f"{self.ip}:{self.port}" if self.ip.version == 4 else f"[{self.ip}]:{self.port}"
            object.__setattr__(self, "_text", text)
        return text


@dataclass(frozen=True, slots=True)
class Authority:
    """A target as a client named it: ``host`` is an address or a domain name (1–255 octets), and a port."""

    host: IPAddress | str
    port: int
    _hash: int = field(default=0, init=False, repr=False, compare=False)

    def __hash__(self) -> int:
        found = self._hash
        if not found:  # asked for each request; that of an address is slow (ipaddress)
            found = hash((self.host, self.port))
            object.__setattr__(self, "_hash", found)
        return found

    @classmethod
    def of(cls, host: str, port: int) -> Authority:
        """Build from text; an IP literal (also in brackets) becomes an address. Raises ValueError on a bad port."""
        if not 0 <= port <= 65535:
            raise ValueError(f"port {port} is not in 0-65535")
        literal = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        try:
            return cls(ip_address(literal), port)
        except ValueError:
            return cls(host, port)

    @property
    def ip(self) -> IPAddress | None:
        """The address if the client named one, None for a domain name."""
        return None if isinstance(self.host, str) else self.host

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if isinstance(self.host, IPv6Address) else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a server listens: an IP address and port, or the path of a Unix socket (``@name``: abstract)."""

    address: SocketAddress | None
    path: str = ""

    @classmethod
    def of(cls, text: str) -> Endpoint:
        """Parse ``127.0.0.1:1080``, ``[::1]:1080`` or ``unix:/run/proxy.sock``. Raises ValueError with the forms."""
        if text.startswith("unix:") and len(text) > 5:
            return cls(None, text[5:])
        host, colon, port = text.rpartition(":")
        if colon and port.isascii() and port.isdigit() and int(port) <= 65535:
            found = Authority.of(host, int(port))
            if found.ip is not None and host.startswith("[") == (found.ip.version == 6):
                return cls(SocketAddress(found.ip, found.port))
        raise ValueError('write for example "127.0.0.1:1080", "[::1]:1080" or "unix:/run/proxy.sock"')

    def __str__(self) -> str:
        return f"unix:{self.path}" if self.address is None else str(self.address)
