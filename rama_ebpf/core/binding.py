"""Bindings: sets of addresses and ports that one listener serves, and which of several a connection belongs to.

The most specific one: the longest prefix, then the narrowest range of ports. Two of one prefix whose ports overlap, and
neither within the other, leave that open: :func:`conflict` says so, and they are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Final, TypeVar

from .address import IPAddress, SocketAddress

__all__ = ["Binding", "BindingSet", "PortRange", "conflict", "port_tables"]

IPNetwork = IPv4Network | IPv6Network
T = TypeVar("T")

_FORMS: Final = (
    'write for example "198.18.0.0/16:1-65535", "127.0.0.1:1080-1089", "[2001:db8::]/32:443", "[::]:1080" (IPv4, too), '
    "or a prefix alone for all its ports"
)
_IPV4: Final = re.compile(r"(?P<host>[\d.]+)(?:/(?P<length>\d{1,3}))?(?::(?P<ports>[\d-]+))?", re.ASCII)
_IPV6: Final = re.compile(
    r"\[(?P<host>[\da-fA-F:.]+)(?:/(?P<inner>\d{1,3}))?\](?:/(?P<length>\d{1,3}))?(?::(?P<ports>[\d-]+))?", re.ASCII
)
_HIGHEST: Final = 65535
_ANY_IPV4: Final = IPv4Network("0.0.0.0/0")


@dataclass(frozen=True, slots=True)
class Binding:
    """TCP to the addresses of ``network`` and the ports ``first`` to ``last`` (1-65535). ``implied``: it is the IPv4
    half of a dual-stack ``[::]``, which leaves ports to whoever has them under ``0.0.0.0`` by name."""

    network: IPNetwork
    first: int
    last: int
    implied: bool = False

    @classmethod
    def at(cls, address: SocketAddress) -> Binding:
        """That of an ordinary listener: one address, or all of its family, and one port."""
        return cls(
            ip_network(f"{address.ip}/0" if address.ip.is_unspecified else address.ip), address.port, address.port
        )

    @property
    def rank(self) -> tuple[int, bool, int]:
        """Of several that hold an address and port, the one with the lowest rank has it."""
        return -self.network.prefixlen, self.implied, self.last - self.first

    @property
    def example(self) -> SocketAddress:
        """Its first address and port."""
        return SocketAddress(self.network.network_address, self.first)

    def holds(self, ip: IPAddress, port: int) -> bool:
        """Whether it is about this address and port."""
        return self.first <= port <= self.last and ip.version == self.network.version and ip in self.network

    def __str__(self) -> str:
        ports = str(self.first) if self.first == self.last else f"{self.first}-{self.last}"
        host, length = self.network.network_address, self.network.prefixlen
        text = str(host) if host.version == 4 else f"[{host}]"
        whole = length == self.network.max_prefixlen or (length == 0 and host.version == 4)
        return f"{text}:{ports}" if whole else f"{text}/{length}:{ports}"


@dataclass(frozen=True, slots=True)
class BindingSet:
    """What one word of a configuration binds: ``text`` is that word."""

    text: str
    bindings: tuple[Binding, ...]

    @classmethod
    def of(cls, text: str) -> BindingSet:
        """Parse an address or a prefix, with a port or a range of ports. Raises ValueError with the forms."""
        match = _IPV4.fullmatch(text) or _IPV6.fullmatch(text)
        if match is None:
            raise ValueError(_FORMS)
        parts = match.groupdict()
        length, inner = parts["length"], parts.get("inner")
        if length is not None and inner is not None:
            raise ValueError(f"it has two prefix lengths: {_FORMS}")
        length = inner if length is None else length
        host, ports = parts["host"], parts["ports"]
        if ports is None and length is None:
            raise ValueError(f"it names no port: {_FORMS}")
        try:
            network = ip_network(host if length is None else f"{host}/{length}")
        except ValueError as error:
            raise ValueError(str(error)) from None
        if isinstance(network, IPv6Network) and network.network_address.ipv4_mapped is not None:
            raise ValueError("write IPv4 addresses as such, not as IPv4-mapped ones")
        if length is None and int(network.network_address) == 0:
            network = ip_network(f"{host}/0")
        first, last = (1, _HIGHEST) if ports is None else _range(ports)
        found = [Binding(network, first, last)]
        if length is None and network.version == 6 and network.prefixlen == 0:
            found.append(Binding(_ANY_IPV4, first, last, implied=True))
        return cls(text, tuple(found))

    def __str__(self) -> str:
        return self.text


def _range(text: str) -> tuple[int, int]:
    first, dash, last = text.partition("-")
    if not first.isdigit() or (dash and not last.isdigit()):
        raise ValueError(f"{text!r} is no range of ports: {_FORMS}")
    low, high = int(first), int(last or first)
    if not 1 <= low <= high <= _HIGHEST:
        raise ValueError(f"{text!r}: ports are 1-65535, the lower one first")
    return low, high


def conflict(one: Binding, other: Binding) -> bool:
    """Whether two bindings share an address and port of which neither is the more specific one."""
    if one.network != other.network or one.implied != other.implied:
        return False
    low, high = max(one.first, other.first), min(one.last, other.last)
    if low > high:
        return False
    within = (low, high) in ((one.first, one.last), (other.first, other.last))
    return not within or (one.first, one.last) == (other.first, other.last)


@dataclass(frozen=True, slots=True)
class PortRange:
    """Ports, both ends included."""

    first: int
    last: int


def port_tables(
    bound: Iterable[tuple[Binding, T]], left_out: Sequence[SocketAddress] = ()
) -> Mapping[IPNetwork, tuple[tuple[PortRange, T], ...]]:
    """Return for each prefix that somebody is bound to whose its ports are, also where that is by a shorter prefix:
    what the longest prefix of an address says is all there is to know. Ports of ``left_out``, which are wildcard
    addresses of others, stay out of what is bound to all addresses. No two of the bindings may be in conflict."""
    ranked = sorted(bound, key=lambda pair: pair[0].rank)
    found: dict[IPNetwork, tuple[tuple[PortRange, T], ...]] = {}
    for network in dict.fromkeys(binding.network for binding, _ in ranked):
        free, taken = [(1, _HIGHEST)], list[tuple[PortRange, T]]()
        around = [(b, owner) for b, owner in ranked if b.network.prefixlen and _covers(b.network, network)]
        for binding, owner in around:
            free = _claim(free, binding, owner, taken)
        for address in left_out:
            if address.ip.version == network.version and address.ip.is_unspecified:
                free = _claim(free, PortRange(address.port, address.port), None, None)
        for binding, owner in ranked:
            if not binding.network.prefixlen and _covers(binding.network, network):
                free = _claim(free, binding, owner, taken)
        found[network] = tuple(sorted(taken, key=lambda pair: pair[0].first))
    return found


def _covers(network: IPNetwork, inner: IPNetwork) -> bool:
    return (
        network.version == inner.version and network.prefixlen <= inner.prefixlen and inner.network_address in network
    )


def _claim(
    free: list[tuple[int, int]], ports: Binding | PortRange, owner: T | None, taken: list[tuple[PortRange, T]] | None
) -> list[tuple[int, int]]:
    """Give what is free of these ports to an owner, or to nobody; return what stays free."""
    left: list[tuple[int, int]] = []
    for first, last in free:
        low, high = max(first, ports.first), min(last, ports.last)
        if low > high:
            left.append((first, last))
            continue
        if taken is not None and owner is not None:
            taken.append((PortRange(low, high), owner))
        left += [(a, b) for a, b in ((first, low - 1), (high + 1, last)) if a <= b]
    return left
