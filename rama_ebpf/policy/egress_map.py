"""The egress policy as ``bpf/egress.c`` reads it: one longest-prefix match for the three lists of
:class:`.egress.EgressPolicy`."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from ipaddress import IPv6Address, IPv6Network, ip_network
from pathlib import Path
from typing import Final

from ..core.address import IPAddress, mapped, unmap
from ..core.errors import PolicyDenied
from ..core.resolv_conf import ResolvConf
from ..core.text_file import read_host_file
from ..kernel import abi, bpf
from ..kernel.gate_maps import GateMaps
from .compiler import MAPPED
from .egress import EgressPolicy
from .prefixes import IPNetwork, unmap_network
from .rule import PolicyError

__all__ = ["EgressTable", "decisions", "egress_network", "nameservers", "system_conf", "system_nameservers", "unzoned"]

_RESOLV_CONF: Final = Path("/etc/resolv.conf")
_MAX_CONF: Final = 1024 * 1024


def decisions(policy: EgressPolicy) -> dict[IPNetwork, bool]:
    """Return for each network that the policy names whether it is denied: the longest that holds an address decides.

    At one length deny beats allow, and allow beats what is denied by default. The host's own networks are all among
    them: their listeners are judged besides.
    """
    decided: dict[IPNetwork, bool] = dict.fromkeys(policy.denied_by_default(), True)
    decided.update(dict.fromkeys(policy.allow, False))
    decided.update(dict.fromkeys(policy.deny, True))
    for network in policy.host.networks - decided.keys():
        decided[network] = _is_denied(policy, network.network_address)
    return decided


def nameservers(text: str) -> list[IPAddress]:
    """Return the addresses in a resolv.conf(5), or if there are none the one that is asked then: this host's."""
    return [unzoned(server) for server in ResolvConf.parse(text).servers]


def unzoned(ip: IPAddress) -> IPAddress:
    """Return ``ip`` as the programs know it: without its zone, and IPv4 where it is mapped."""
    return unmap(ip if ip.version == 4 else IPv6Address(int(ip)))


def system_conf() -> ResolvConf:
    """Return what this host's resolv.conf(5) says now. It never waits; raises OSError for one that cannot be read."""
    return ResolvConf.parse(read_host_file(_RESOLV_CONF, _MAX_CONF))


def system_nameservers() -> list[IPAddress]:
    """Return the nameservers that this host's resolver asks now. Raises OSError for a resolv.conf it may not read."""
    return [unzoned(server) for server in system_conf().servers]


class EgressTable:
    """The map ``egress`` of a gate, and what it is to have. One thread puts, any may look and restore."""

    def __init__(self, maps: GateMaps) -> None:
        self._maps = maps
        self.wanted: Mapping[bytes, int] | None = None
        """The rows of the policy that was put last, None before; never changed, but replaced."""
        self._begun = self._ended = 0

    @property
    def fd(self) -> int:
        """The map."""
        return self._maps["egress"]

    def put(self, policy: EgressPolicy, resolvers: Iterable[IPAddress]) -> None:
        """Have the programs enforce ``policy``, except for port 53 of ``resolvers``.

        Networks that stay denied are never open in between. Raises :class:`PolicyError` if there are too many, or
        OSError.
        """
        constant = abi.constants()
        wanted = {
            _key(network): constant["EGRESS_DENY"] * denied | constant["EGRESS_OWN"] * _is_own(policy, network)
            for network, denied in decisions(policy).items()
        }
        for address in resolvers:
            key = _key(ip_network(address))
            wanted[key] = (
                constant["EGRESS_DENY"] * _is_denied(policy, address)
                | constant["EGRESS_OWN"] * _is_own(policy, ip_network(address))
                | constant["EGRESS_NAMESERVER"]
            )
        size = self._maps.capacity("egress")
        if len(wanted) > size:
            raise PolicyError(f"egress: {len(wanted)} networks are more than the {size} that there is room for")
        self._begun += 1
        try:
            self.wanted = wanted
            self._write(wanted)
        finally:
            self._ended += 1

    def differs(self, wanted: Mapping[bytes, int]) -> bool:
        """Whether the map is not as it is to be, while that is ``wanted`` and nobody is just putting it. Raises
        OSError."""
        begun = self._begun
        if begun != self._ended or self.wanted is not wanted:
            return False
        return self.present() != wanted and self._begun == begun

    def restore(self) -> None:
        """Have the map be as it is to be, whatever others have written. Raises OSError."""
        wanted = None
        while self.wanted is not wanted and self.wanted is not None:  # else another policy was put meanwhile
            wanted = self.wanted
            self._write(wanted)

    def present(self) -> dict[bytes, int]:
        """Return the rows that there are. Raises OSError."""
        rows = bpf.map_lookup_batch(self.fd, abi.FAILSAFE_KEY.size, 4)
        return {key: int.from_bytes(value, sys.byteorder) for key, value in rows}

    def _write(self, wanted: Mapping[bytes, int]) -> None:
        stale = self.present().keys() - wanted.keys()
        deny = abi.constants()["EGRESS_DENY"]
        # Denials first, and what is no longer named last: nothing is open that both policies deny.
        for key, value in sorted(wanted.items(), key=lambda entry: -(entry[1] & deny)):
            bpf.map_update(self.fd, key, value.to_bytes(4, sys.byteorder))
        for key in stale:
            bpf.map_delete(self.fd, key)


def egress_network(key: bytes) -> IPNetwork:
    """Return the network of a row, by its key."""
    length, _, packed = abi.FAILSAFE_KEY.unpack(key)
    return unmap_network(IPv6Network((packed, max(0, length - 32)), strict=False))


def _is_denied(policy: EgressPolicy, address: IPAddress) -> bool:
    try:
        policy.check(address)
    except PolicyDenied:
        return True
    return False


def _is_own(policy: EgressPolicy, network: IPNetwork) -> bool:
    """Whether the listeners there are to be asked for: with it they are denied."""
    return not policy.own_listeners and policy.host.holds(network.network_address, network.prefixlen)


def _key(network: IPNetwork) -> bytes:
    length = 32 + network.prefixlen + MAPPED[network.version]
    return abi.FAILSAFE_KEY.pack(length, network.version == 4, mapped(network.network_address))
