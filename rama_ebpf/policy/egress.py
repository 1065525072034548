"""Where a proxy may connect to.

A proxy that dials whatever its clients name is a door into the network it stands in (SSRF, CWE-918). So addresses
that are not globally reachable are refused unless the operator names them. The check is made on the resolved
address, the one that is then dialled, and on the IPv4 address that it embeds, in whichever form.

So is the host itself: its other services trust who comes from inside, whatever a firewall says to those outside, and
a proxy that can be sent to itself goes round in circles.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_network
from typing import NamedTuple

from ..core.address import IPAddress, unmap
from ..core.binding import Binding
from ..core.errors import PolicyDenied

__all__ = ["DENIED_BY_DEFAULT", "EgressPolicy", "HostEgress", "OwnHost", "embedded"]

IPNetwork = IPv4Network | IPv6Network

# The IANA special-purpose address registries (RFC 6890 and updates), less what is globally reachable.
DENIED_BY_DEFAULT: tuple[tuple[IPNetwork, str], ...] = tuple(
    (ip_network(cidr), name)
    for cidr, name in (
        ("0.0.0.0/8", "this-network"),
        ("10.0.0.0/8", "private"),
        ("100.64.0.0/10", "shared-cgnat"),
        ("127.0.0.0/8", "loopback"),
        ("169.254.0.0/16", "link-local-metadata"),
        ("172.16.0.0/12", "private"),
        ("192.0.0.0/24", "ietf-protocol"),
        ("192.0.2.0/24", "documentation"),
        ("192.168.0.0/16", "private"),
        ("198.18.0.0/15", "benchmarking"),
        ("198.51.100.0/24", "documentation"),
        ("203.0.113.0/24", "documentation"),
        ("224.0.0.0/4", "multicast"),
        ("240.0.0.0/4", "reserved-broadcast"),
        ("::/128", "unspecified"),
        ("::1/128", "loopback"),
        ("::/96", "ipv4-compatible"),
        ("64:ff9b:1::/48", "local-nat64"),
        ("100::/64", "discard"),
        ("2001::/32", "teredo"),
        ("2001:2::/48", "benchmarking"),
        ("2001:db8::/32", "documentation"),
        ("3fff::/20", "documentation"),
        ("5f00::/16", "segment-routing"),
        ("fc00::/7", "unique-local-metadata"),
        ("fe80::/10", "link-local"),
        ("fec0::/10", "site-local"),
        ("ff00::/8", "multicast"),
    )
)

_6TO4 = 0x2002
_TEREDO = 0x20010000
_NAT64 = 0x0064FF9B << 64
_LOCAL_NAT64 = 0x0064FF9B0001
_SIIT = 0xFFFF << 16
_ISATAP = (0x00005EFE, 0x02005EFE)


def embedded(ip: IPAddress) -> IPv4Address | None:
    """Return the IPv4 address that a translator or tunnel would deliver to, if ``ip`` is a form that holds one.

    NAT64 (RFC 6052, and RFC 8215 with the address at the end), 6to4 (RFC 3056), Teredo's client (RFC 4380), SIIT's
    IPv4-translated (RFC 2765), IPv4-compatible (RFC 4291) and, behind any prefix, ISATAP (RFC 5214). An IPv4-mapped
    address is the IPv4 address itself: :func:`~rama_ebpf.core.address.unmap`.
    """
    if ip.version == 4:
        return None
    number = int(ip)
    low, above = number & 0xFFFFFFFF, number >> 32
    if number >> 112 == _6TO4:
        return IPv4Address(number >> 80 & 0xFFFFFFFF)
    if number >> 96 == _TEREDO:
        return IPv4Address(low ^ 0xFFFFFFFF)
    if above in (_NAT64, _SIIT) or number >> 80 == _LOCAL_NAT64 or above & 0xFFFFFFFF in _ISATAP:
        return IPv4Address(low)
    return IPv4Address(low) if above == 0 and low > 1 else None


class _Denial(NamedTuple):
    why: str
    rule: str


class _Networks(NamedTuple):
    """Networks of one prefix length, by the bits above ``shift``: the denial, or None where the policy allows."""

    shift: int
    said: dict[int, _Denial | None]


@dataclass(frozen=True)
class OwnHost:
    """What leads back to this host: ``networks`` whose packets it delivers to itself, each address as one of its own,
    ``listeners``, the addresses and ports on which this very proxy serves TCP, and the ``bindings`` that it serves."""

    networks: frozenset[IPNetwork] = frozenset()
    listeners: frozenset[tuple[IPAddress, int]] = frozenset()
    bindings: tuple[Binding, ...] = ()

    @cached_property
    def _by_shift(self) -> dict[int, dict[int, set[int]]]:
        found: dict[int, dict[int, set[int]]] = {4: {}, 6: {}}
        for network in self.networks:
            shift = network.max_prefixlen - network.prefixlen
            found[network.version].setdefault(shift, set()).add(int(network.network_address) >> shift)
        return found

    def holds(self, ip: IPAddress, prefix: int | None = None) -> bool:
        """Whether an address, or all of the network of ``prefix`` bits that begins with it, is this host's."""
        number, width = int(ip), 32 if ip.version == 4 else 128
        least = 0 if prefix is None else width - prefix
        return any(shift >= least and number >> shift in some for shift, some in self._by_shift[ip.version].items())

    @cached_property
    def _ports(self) -> frozenset[int]:
        return frozenset(port for _, port in self.listeners)

    def listens(self, ip: IPAddress, port: int) -> bool:
        """Whether a connection to there comes back to this proxy. A wildcard listener has all addresses of the host
        of its family, and a connection to the unspecified address may reach any listener."""
        if any(binding.holds(ip, port) for binding in self.bindings) and self.holds(ip):
            return True
        if port not in self._ports:
            return False
        at = [listener for listener, number in self.listeners if number == port]
        if ip in at or int(ip) == 0:
            return True
        return any(listener.version == ip.version and int(listener) == 0 for listener in at) and self.holds(ip)


@dataclass(frozen=True)
class EgressPolicy:
    """Which target addresses may be dialled: ``allow`` and ``deny`` are networks; the longest matching prefix wins,
    deny beats allow at the same length, and :data:`DENIED_BY_DEFAULT` counts as denied unless ``allow`` names a
    network of at least its length. So do the addresses of ``host`` itself, each as a network of its own, unless
    ``own_addresses``; and its listeners are denied whatever ``allow`` says, unless ``own_listeners``."""

    allow: tuple[IPNetwork, ...] = ()
    deny: tuple[IPNetwork, ...] = ()
    own_addresses: bool = False
    own_listeners: bool = False
    host: OwnHost = OwnHost()

    @classmethod
    def of(cls, allow: Iterable[str] = (), deny: Iterable[str] = ()) -> EgressPolicy:
        """Build from text. Raises ValueError naming the network that does not parse or has host bits set."""
        return cls(tuple(map(ip_network, allow)), tuple(map(ip_network, deny)))

    def check(self, ip: IPAddress, port: int | None = None) -> None:
        """Raise :class:`PolicyDenied`, naming the rule, if ``ip`` may not be dialled, or not on that TCP ``port``."""
        if type(ip) is IPv4Address:
            self._check_one(ip, port)
            return
        ip = unmap(ip)
        self._check_one(ip, port)
        inner = embedded(ip)
        if inner is not None:
            self._check_one(inner, port)

    def denied_by_default(self) -> dict[IPNetwork, str]:
        """Return the networks that count as denied where nothing is said of them, with what they are."""
        denied = dict(DENIED_BY_DEFAULT)
        if not self.own_addresses:
            for network in self.host.networks:
                if not network.is_loopback:  # which is denied as a whole, and allowed as a whole
                    denied.setdefault(network, "this-host")
        return denied

    @cached_property
    def _by_length(self) -> dict[int, tuple[_Networks, ...]]:
        """By IP version: the networks of each prefix length, the longest first, and what is said of each."""
        said: dict[IPNetwork, _Denial | None] = {
            network: _Denial(f" ({name}, {network})", f"egress-default:{name}")
            for network, name in self.denied_by_default().items()
        }
        said.update(dict.fromkeys(self.allow))
        said.update(dict.fromkeys(self.deny, _Denial("", "egress")))
        tables: dict[int, dict[int, _Networks]] = {4: {}, 6: {}}
        for network, denial in said.items():
            shift = network.max_prefixlen - network.prefixlen
            table = tables[network.version].setdefault(shift, _Networks(shift, {}))
            table.said[int(network.network_address) >> shift] = denial
        return {version: tuple(by_shift[shift] for shift in sorted(by_shift)) for version, by_shift in tables.items()}

    def _check_one(self, ip: IPAddress, port: int | None) -> None:
        if port is not None and not self.own_listeners and self.host.listens(ip, port):
            text = f"egress to {ip} port {port} is denied (this proxy itself listens there)"
            raise PolicyDenied(text, rule="egress-default:this-proxy")
        number = int(ip)
        for shift, said in self._by_length[ip.version]:
            prefix = number >> shift
            if prefix in said:
                denial = said[prefix]
                if denial is not None:
                    raise PolicyDenied(f"egress to {ip} is denied{denial.why}", rule=denial.rule)
                return


class HostEgress:
    """An egress policy over a host whose addresses come and go."""

    def __init__(self, policy: EgressPolicy) -> None:
        self._policy = policy

    def check(self, ip: IPAddress, port: int | None = None) -> None:
        """As :meth:`EgressPolicy.check`."""
        self._policy.check(ip, port)

    def follow(self, networks: Iterable[IPNetwork]) -> None:
        """Judge by these networks of the host from now on."""
        host = replace(self._policy.host, networks=frozenset(networks))
        self._policy = replace(self._policy, host=host)
