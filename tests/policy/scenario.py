"""Random policies, and sources that are likely to meet their edges. All from a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from rama_ebpf.core.address import IPAddress, unmap
from rama_ebpf.core.client import SourceLengths
from rama_ebpf.policy.matcher import Policy
from rama_ebpf.policy.prefixes import IPNetwork
from rama_ebpf.policy.rule import RUNTIME, Action, Rule, RuleSet, Settings, SynLimit
from rama_ebpf.policy.store import PolicyStore

__all__ = ["PORTS", "Scenario"]

PORTS = (1080, 443, 9)
_ACTIONS = (Action.ALLOW, Action.DROP, Action.REJECT, Action.LIMIT)
_HOUR = 3_600_000_000_000


def _decides(rule: Rule, now: int) -> bool:
    return not rule.dry_run and (rule.expires is None or now < rule.expires)


@dataclass
class Scenario:
    """A whole policy in the terms of the matcher and of the stores. ``now`` is CLOCK_BOOTTIME nanoseconds: what
    expires did so an hour before, or will an hour after."""

    seed: int
    now: int
    loaded: RuleSet = field(init=False)
    runtime: list[Rule] = field(init=False)
    policy: Policy = field(init=False)
    networks: list[IPNetwork] = field(init=False, default_factory=list)
    lengths: SourceLengths = field(init=False)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self._centers: dict[int, list[int]] = {
            4: [self.random.getrandbits(32) for _ in range(self.random.randint(1, 4))],
            6: [self.random.getrandbits(128) for _ in range(self.random.randint(1, 4))],
        }
        pick = self.random
        in_force: dict[tuple[IPNetwork, int | None], Rule]
        rules = [self._rule(f"loaded-{n}", pick.randint(0, 6), "file") for n in range(pick.choice((0, 1, 3, 12, 40)))]
        settings = Settings(pick.choice((Action.ALLOW, Action.DROP, Action.REJECT)))
        self.loaded = RuleSet(tuple(rules), settings)
        self.runtime, in_force = [], {}
        for rule in [self._rule(f"runtime-{n}", 1, RUNTIME) for n in range(pick.choice((0, 0, 3, 12)))]:
            earlier = in_force.get((rule.sources[0], rule.port))
            if rule.dry_run and earlier is not None and _decides(earlier, self.now):
                continue  # a dry run replaces no rule that decides: the stores refuse it
            self.runtime.append(rule)
            in_force[rule.sources[0], rule.port] = rule  # a later one replaces an earlier one
        self.lengths = pick.choice((SourceLengths(), SourceLengths(24, 48), SourceLengths(32, 56)))
        bans = {
            self._banned(): (pick.choice((Action.DROP, Action.REJECT)), self._expiry())
            for _ in range(pick.choice((0, 0, 4)))
        }
        failsafe = tuple(self.network() for _ in range(pick.choice((0, 0, 0, 2))))
        ports = frozenset((443,)) if pick.random() < 0.05 else frozenset()
        self.policy = Policy(
            rules=(*rules, *in_force.values()),
            failsafe=failsafe,
            failsafe_ports=ports,
            bans=bans,
            default=settings.default,
        )

    def _banned(self) -> IPNetwork:
        """An address, or the prefix that stands for its source."""
        address = unmap(self.address())
        length = self.lengths.ipv4 if address.version == 4 else self.lengths.ipv6
        if self.random.random() < 0.5:
            length = address.max_prefixlen
        network: IPNetwork = ip_network((address, length), strict=False)
        self.networks.append(network)
        return network

    def _expiry(self) -> int | None:
        return self.random.choice((None, None, None, max(1, self.now - _HOUR), self.now + _HOUR))

    def _rule(self, name: str, sources: int, origin: str) -> Rule:
        pick = self.random
        action = pick.choice(_ACTIONS)
        return Rule(
            name,
            tuple(self.network() for _ in range(sources)),
            action,
            port=pick.choice((None, None, None, *PORTS)),
            expires=self._expiry(),
            dry_run=pick.random() < 0.2,
            limit=SynLimit(10, 5) if action is Action.LIMIT else None,
            origin=origin,
        )

    def network(self) -> IPNetwork:
        """A network around one of a few addresses, so that networks nest."""
        pick = self.random
        version = pick.choice((4, 4, 6))
        width = 32 if version == 4 else 128
        length = pick.choice(
            (0, 1, width // 2, width - 1, width, width, pick.randint(0, width), pick.randint(0, width))
        )
        address = pick.choice(self._centers[version])
        if pick.random() < 0.3:
            address ^= 1 << pick.randrange(width)
        address = address >> (width - length) << (width - length)
        network: IPNetwork = IPv4Network((address, length)) if version == 4 else IPv6Network((address, length))
        if version == 4 and pick.random() < 0.1:  # the same, IPv4-mapped
            network = IPv6Network((0xFFFF << 32 | address, 96 + length))
        self.networks.append(network)
        return network

    def address(self) -> IPAddress:
        """An address near a center, at an edge of a network, or anywhere."""
        pick = self.random
        kind = pick.random()
        if kind < 0.4 and self.networks:
            network = pick.choice(self.networks)
            edge = int(pick.choice((network.network_address, network.broadcast_address))) + pick.choice((-1, 0, 0, 1))
            edge %= 1 << network.max_prefixlen
            return IPv4Address(edge) if network.version == 4 else IPv6Address(edge)
        version = pick.choice((4, 4, 6))
        width = 32 if version == 4 else 128
        value = pick.getrandbits(width)
        if kind < 0.9:
            value = pick.choice(self._centers[version])
            if pick.random() < 0.6:
                value ^= 1 << pick.randrange(width)
        return IPv4Address(value) if version == 4 else IPv6Address(value)

    def source(self) -> IPAddress:
        """A source address; now and then IPv4-mapped."""
        address = self.address()
        if address.version == 4 and self.random.random() < 0.1:
            return ip_address(f"::ffff:{address}")
        return address

    def put_into(self, store: PolicyStore) -> None:
        """Make this the policy of a store that may hold another one."""
        for record in store.records(now=0):
            if record.rule.origin == RUNTIME:
                store.remove(record.sources[0], record.rule.port)
        for ban in store.bans():
            store.unban(ban.network)
        store.set_failsafe(self.policy.failsafe, sorted(self.policy.failsafe_ports))
        store.replace(self.loaded)
        for rule in self.runtime:
            store.add(rule)
        store.set_source_lengths(self.lengths)
        for network, (action, expires) in self.policy.bans.items():
            store.ban(network, action=action, ttl=None if expires is None else (expires - self.now) / 1e9)
