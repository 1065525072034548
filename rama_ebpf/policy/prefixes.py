"""Many networks in little room: what a feed of a million prefixes is kept in.

An ``ipaddress`` object takes 2 µs to make and 200 bytes to keep. Here a network is one integer, ``address << 8 |
prefix length``, whose order is that of the networks, the wider before the narrower that it covers.
"""

from __future__ import annotations

import socket
import sys
from array import array
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import overload

__all__ = ["IPNetwork", "Prefixes", "pack_network", "unmap_network", "unpack_network"]

IPNetwork = IPv4Network | IPv6Network


def pack_network(network: IPNetwork) -> int:
    """Return ``address << 8 | prefix length``."""
    return int(network.network_address) << 8 | network.prefixlen


def unpack_network(version: int, packed: int) -> IPNetwork:
    """The inverse of :func:`pack_network`."""
    address = (packed >> 8, packed & 0xFF)
    return IPv4Network(address) if version == 4 else IPv6Network(address)


def unmap_network(network: IPNetwork) -> IPNetwork:
    """Return the IPv4 network inside an IPv4-mapped one (/96 or longer), else ``network`` itself."""
    if isinstance(network, IPv6Network) and network.prefixlen >= 96 and network.network_address.ipv4_mapped:
        return IPv4Network((network.network_address.ipv4_mapped, network.prefixlen - 96))
    return network


class Prefixes(Sequence[IPNetwork]):
    """An immutable, sorted set of networks: the IPv4 ones, then the IPv6 ones. Duplicates are dropped."""

    __slots__ = ("_hash", "v4", "v6")

    def __init__(self, v4: Iterable[int] = (), v6: Iterable[int] = ()) -> None:
        """From packed networks, which must be valid (see :func:`pack_network`)."""
        self.v4: array[int] = array("Q", sorted(set(v4)))
        self.v6: tuple[int, ...] = tuple(sorted(set(v6)))
        self._hash: int | None = None

    @classmethod
    def from_sorted(cls, v4: array[int], v6: Sequence[int]) -> Prefixes:
        """From packed networks that ascend, without duplicates."""
        made = cls()
        made.v4, made.v6 = v4, tuple(v6)
        return made

    @classmethod
    def of(cls, networks: Iterable[IPNetwork | str]) -> Prefixes:
        """From networks, or text that ``ipaddress.ip_network`` takes; IPv4-mapped ones become IPv4."""
        if isinstance(networks, Prefixes):
            return networks
        sides: dict[int, list[int]] = {4: [], 6: []}
        for item in networks:
            network = unmap_network(ip_network(item) if isinstance(item, str) else item)
            sides[network.version].append(pack_network(network))
        return cls(sides[4], sides[6])

    def packed(self, version: int) -> Sequence[int]:
        """The packed networks of one IP version, in order."""
        return self.v4 if version == 4 else self.v6

    def chosen(self, which: Sequence[bool], most: int) -> Iterator[Prefixes]:
        """Yield those that are marked, in their order, up to ``most`` at a time."""
        marked = [at for at, wanted in enumerate(which) if wanted]
        for first in range(0, len(marked), max(1, most)):
            part, split = marked[first : first + most], len(self.v4)
            v4 = array("Q", [self.v4[at] for at in part if at < split])
            yield Prefixes.from_sorted(v4, [self.v6[at - split] for at in part if at >= split])

    def widths(self) -> list[IPNetwork]:
        """Return one network of each version and prefix length that there is."""
        found = {(4, packed & 0xFF): packed for packed in self.v4} | {(6, packed & 0xFF): packed for packed in self.v6}
        return [unpack_network(version, packed) for (version, _), packed in found.items()]

    def addresses(self) -> list[tuple[int, bytes, int]]:
        """Return (IP version, packed address, prefix length) of each, in order, quickly."""
        words = array("I", [packed >> 8 for packed in self.v4])
        if sys.byteorder == "little":
            words.byteswap()
        raw = words.tobytes()
        found = [(4, raw[4 * at : 4 * at + 4], packed & 0xFF) for at, packed in enumerate(self.v4)]
        return found + [(6, (packed >> 8).to_bytes(16, "big"), packed & 0xFF) for packed in self.v6]

    def texts(self) -> list[str]:
        """Return each as text, in order, quickly."""
        ntop, v4, v6 = socket.inet_ntop, socket.AF_INET, socket.AF_INET6
        return [f"{ntop(v4 if version == 4 else v6, raw)}/{length}" for version, raw, length in self.addresses()]

    def __len__(self) -> int:
        return len(self.v4) + len(self.v6)

    def __iter__(self) -> Iterator[IPNetwork]:
        for packed in self.v4:
            yield IPv4Network((packed >> 8, packed & 0xFF))
        for packed in self.v6:
            yield IPv6Network((packed >> 8, packed & 0xFF))

    @overload
    def __getitem__(self, index: int) -> IPNetwork: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[IPNetwork]: ...
    def __getitem__(self, index: int | slice) -> IPNetwork | Sequence[IPNetwork]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index < 0:
            index += len(self)
        if 0 <= index < len(self.v4):
            return unpack_network(4, self.v4[index])
        return unpack_network(6, self.v6[index - len(self.v4) if index >= 0 else len(self)])

    def __contains__(self, network: object) -> bool:
        """Whether exactly this network is a member."""
        if not isinstance(network, IPv4Network | IPv6Network):
            return False
        side, packed = self.packed(network.version), pack_network(network)
        at = bisect_left(side, packed)
        return at < len(side) and side[at] == packed

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Prefixes):
            return NotImplemented
        return self.v4 == other.v4 and self.v6 == other.v6

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = hash((self.v4.tobytes(), self.v6))
        return self._hash

    def __repr__(self) -> str:
        return f"<{len(self)} prefixes>"
