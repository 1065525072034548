"""Which address stands for the client: the transport's peer, unless a trusted proxy in front told another one."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address
from typing import Protocol, TypeVar, runtime_checkable

from .address import IPAddress, SocketAddress
from .extensions import Extensions

__all__ = [
    "Carrier",
    "ClientAddress",
    "HasExtensions",
    "ListenerName",
    "LocalAddress",
    "SourceLengths",
    "TrustedPeer",
    "client_address",
    "local_address",
]


@runtime_checkable
class HasExtensions(Protocol):
    """What carries extensions: a :class:`~rama_ebpf.core.stream.Stream`, an HTTP request, …"""

    @property
    def extensions(self) -> Extensions: ...


Carrier = TypeVar("Carrier", bound=HasExtensions)
"""The input of a layer that reads or adds extensions: it hands on what it was given."""


@dataclass(frozen=True, slots=True)
class ClientAddress:
    """The client's own address, as the transport or a *trusted* PROXY header told it; the latest one counts.

    A TCP server adds the transport's peer. Whoever believes a PROXY header appends what it says.
    """

    address: SocketAddress


@dataclass(frozen=True, slots=True)
class LocalAddress:
    """The address that the client connected to, as the transport or a *trusted* PROXY header told it; the latest
    one counts. A TCP server adds its own end."""

    address: SocketAddress


@dataclass(frozen=True, slots=True)
class ListenerName:
    """The name of the listener that a connection came to, as the configuration calls it."""

    name: str


@dataclass(frozen=True, slots=True)
class TrustedPeer:
    """The transport's peer is a proxy that is trusted to name its clients. Its own address is never struck or banned,
    also where it speaks for itself (a health check) or says nothing."""

    ip: IPAddress


def client_address(input: HasExtensions) -> SocketAddress | None:
    """Return the client's address from the extensions of ``input``, None where it has none (a Unix socket)."""
    told = input.extensions.get(ClientAddress)
    return None if told is None else told.address


def local_address(input: HasExtensions) -> SocketAddress | None:
    """Return the address that the client of ``input`` connected to, None where it has none."""
    told = input.extensions.get(LocalAddress)
    return None if told is None else told.address


@dataclass(frozen=True, slots=True)
class SourceLengths:
    """How many bits of an address stand for one client, where strikes are counted and sources banned: 16 to 32 of IPv4,
    32 to 128 of IPv6. Raises ValueError."""

    ipv4: int = 32
    ipv6: int = 64

    def __post_init__(self) -> None:
        if not 16 <= self.ipv4 <= 32 or not 32 <= self.ipv6 <= 128:
            raise ValueError(f"prefix lengths must be 16-32 (IPv4) and 32-128 (IPv6), not {self.ipv4} and {self.ipv6}")


def source_prefix(ip: IPAddress, v4: int = 32, v6: int = 64) -> tuple[int, int]:
    """Return (IP version, network bits) of the prefix of ``ip`` that stands for one client.

    A /64 is what one IPv6 subscriber commands (RFC 6177): counting single addresses would count nothing.
    """
    return (4, int(ip) >> (32 - v4)) if type(ip) is IPv4Address else (6, int(ip) >> (128 - v6))
