"""Addresses to the routes that mean them: the space is cut where the answer changes, and bisected."""

from __future__ import annotations

from bisect import bisect_right
from ipaddress import IPv4Network, IPv6Network

from ..core.address import IPAddress, unmap

__all__ = ["NetworkIndex"]

IPNetwork = IPv4Network | IPv6Network


class NetworkIndex:
    """Networks, each with the bits of the routes that have it; an IPv4-mapped address is the IPv4 one."""

    def __init__(self) -> None:
        self._added: dict[int, list[tuple[int, int, int]]] = {4: [], 6: []}
        self._starts: dict[int, list[int]] = {4: [0], 6: [0]}
        self._bits: dict[int, list[int]] = {4: [0], 6: [0]}

    def add(self, network: IPNetwork, bits: int) -> None:
        """Add a network."""
        first = int(network.network_address)
        self._added[network.version].append((first, first + network.num_addresses, bits))

    def freeze(self) -> None:
        """Make it ready to be asked."""
        known: dict[int, int] = {}
        for version, added in self._added.items():
            changes: dict[int, list[tuple[int, int]]] = {0: []}
            for first, end, bits in added:
                changes.setdefault(first, []).append((1, bits))
                changes.setdefault(end, []).append((-1, bits))
            depth: dict[int, int] = {}
            starts: list[int] = []
            masks: list[int] = []
            for at in sorted(changes):
                for by, bits in changes[at]:
                    depth[bits] = depth.get(bits, 0) + by
                    if not depth[bits]:
                        del depth[bits]
                mask = 0
                for bits in depth:
                    mask |= bits
                if not masks or masks[-1] != mask:
                    starts.append(at)
                    masks.append(known.setdefault(mask, mask))
            self._starts[version], self._bits[version] = starts, masks

    def find(self, ip: IPAddress) -> int:
        """Return the bits of all networks that hold ``ip``."""
        if ip.version == 6:
            ip = unmap(ip)
        version = ip.version
        return self._bits[version][bisect_right(self._starts[version], int(ip)) - 1]

    def __len__(self) -> int:
        return sum(map(len, self._added.values()))
