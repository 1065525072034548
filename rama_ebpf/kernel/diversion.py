"""Having what is routed through this host delivered to it: policy routing for bindings of addresses that are not local.

For each binding there are two rules (ip-rule(8)), of a priority and a table that the instance's name chooses: TCP to
its addresses and ports is looked up in a table whose only route delivers everything here, but for what this host itself
sends there, which goes on to the usual tables; so the proxy reaches the targets. No rule of a packet filter is needed:
``sk_lookup`` finds the listener whatever address a packet has, and its sockets may answer from it (IP_TRANSPARENT).

Rules outlive a server that is killed; a file in the instance's directory says that there are some.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any, Final

from pyroute2 import IPRoute, NetlinkError

from ..core.binding import Binding
from .instance import Instance

__all__ = ["Diversion"]

IPNetwork = IPv4Network | IPv6Network

_MAIN: Final = 32766
"""The priority of the rule for the main table."""
_FAMILIES: Final = {4: socket.AF_INET, 6: socket.AF_INET6}
_TCP: Final = 6
_LOOPBACK: Final = 1
_HOST_SCOPE: Final = 254


@dataclass(frozen=True, slots=True)
class _Rule:
    """``passes``: for what this host sends, which it lets go on."""

    passes: bool
    network: IPNetwork
    first: int
    last: int

    def arguments(self, priority: int, table: int) -> dict[str, Any]:
        found: dict[str, Any] = {
            "family": _FAMILIES[self.network.version],
            "ip_proto": _TCP,
            "dport_range": f"{self.first}:{self.last}",
        }
        if self.network.prefixlen:
            found |= {"dst": str(self.network.network_address), "dst_len": self.network.prefixlen}
        if self.passes:
            return found | {"priority": priority, "iifname": "lo", "action": "goto", "goto": _MAIN}
        return found | {"priority": priority + 1, "table": table}


class Diversion:
    """The rules and routes of one instance, in the network namespace of the thread that calls, in which no event loop
    may run. Raises OSError."""

    def __init__(self, instance: Instance) -> None:
        number = zlib.crc32(instance.name.encode())
        self._priority = 20_000 + 2 * (number % 4_000)
        self._table = 1 << 30 | number >> 2
        self._marker = instance.diversion

    def put(self, bindings: Iterable[Binding]) -> bool:
        """Divert these and nothing else; return whether anything had to be changed."""
        wanted = {_Rule(passes, one.network, one.first, one.last) for one in bindings for passes in (True, False)}
        if wanted:
            self._marker.touch(mode=0o600)
        with _route() as route:
            present = self._present(route)
            # What diverts is there only as long as what lets the proxy's own connections pass.
            for rule in sorted(present - wanted, key=lambda rule: rule.passes):
                route.rule("del", **rule.arguments(self._priority, self._table))
            if wanted:
                for family in _FAMILIES.values():
                    self._deliver(route, family)
            for rule in sorted(wanted - present, key=lambda rule: not rule.passes):
                route.rule("add", **rule.arguments(self._priority, self._table))
            if not wanted:
                for family in _FAMILIES.values():
                    route.flush_routes(family=family, table=self._table)
        if not wanted:
            self._marker.unlink(missing_ok=True)
        return present != wanted

    def _deliver(self, route: IPRoute, family: int) -> None:
        local = {"family": family, "table": self._table, "type": "local", "scope": _HOST_SCOPE, "oif": _LOOPBACK}
        try:
            route.route("add", dst="default", **local)
        except NetlinkError as error:
            if error.code != errno.EEXIST:
                raise

    def _present(self, route: IPRoute) -> set[_Rule]:
        found = set()
        for version, family in _FAMILIES.items():
            for row in route.get_rules(family=family):
                told = dict(row["attrs"])
                if told.get("FRA_PRIORITY") not in (self._priority, self._priority + 1):
                    continue
                address = told.get("FRA_DST", "0.0.0.0" if version == 4 else "::")
                first, _, last = str(told.get("FRA_DPORT_RANGE", "0:0")).partition(":")
                network = ip_network(f"{address}/{row['dst_len']}")
                found.add(_Rule(told["FRA_PRIORITY"] == self._priority, network, int(first), int(last or first)))
        return found


@contextlib.contextmanager
def _route() -> Iterator[IPRoute]:
    try:
        with IPRoute() as route:
            yield route
    except NetlinkError as error:
        text = f"routes for what is to be diverted cannot be changed: {os.strerror(error.code)}"
        raise OSError(error.code, text) from error
