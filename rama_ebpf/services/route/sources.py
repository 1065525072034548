"""Which of a way's source addresses a connection is made from."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

from ...core.address import IPAddress, unmap
from ...core.errors import PolicyDenied
from ...routes.model import Direct
from ..connect import Egress

__all__ = ["FamilyEgress", "Sources"]


class Sources:
    """Picks source addresses of a direct way: at random, or always the same one for a key."""

    def __init__(self, way: Direct, secret: bytes, rng: Callable[[int], int] = random.getrandbits) -> None:
        self._of = {version: [net for net in way.sources if net.version == version] for version in (4, 6)}
        self._secret = secret[:64]
        self._rng = rng
        self.freebind = any(net.num_addresses > 1 for net in way.sources)
        """Addresses of a network need not be on an interface."""

    def pick(self, version: int, key: bytes) -> str | None:
        """Return a source of an IP version; None if the way names none."""
        networks: Sequence[IPv4Network | IPv6Network] = self._of[version]
        if not networks:
            return None
        if key:
            digest = hashlib.blake2b(key, digest_size=20, key=self._secret, person=b"source").digest()
            which, where = int.from_bytes(digest[:4], "big"), int.from_bytes(digest[4:], "big")
        else:
            which, where = self._rng(32), self._rng(128)
        network = networks[which % len(networks)]
        return str(_inside(network, where))


def _inside(network: IPv4Network | IPv6Network, where: int) -> IPv4Address | IPv6Address:
    """An address of a network; not the first and last of IPv4, nor the subnet-router anycast address of IPv6."""
    size = network.num_addresses
    if size <= 2:
        return network[where % size]
    spare = 2 if network.version == 4 else 1
    return network[1 + where % (size - spare)]


class FamilyEgress:
    """Egress policy for a way that has sources of one family: the other is not dialled, from whatever address."""

    def __init__(self, egress: Egress, way: Direct) -> None:
        self._egress = egress
        self._versions = {net.version for net in way.sources}

    def check(self, ip: IPAddress, port: int | None = None, /) -> None:
        """See :class:`~..connect.Egress`."""
        if unmap(ip).version not in self._versions:
            raise PolicyDenied(f"the way has no IPv{unmap(ip).version} source", rule="way")
        self._egress.check(ip, port)
