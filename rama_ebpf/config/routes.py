"""Routes and ways in a configuration (docs/routes.md)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Any, Final, Protocol

from ..routes.health import HealthLimits
from ..routes.model import Chain, Choose, Direct, Group, Key, Parent, PortRange, Route, RouteError, Way
from ..routes.model import Protocol as Asked
from ..routes.table import RouteTable
from ..routes.ways import WayBook
from ..services.route import hidden_url, parse_parent
from .decode import ListOf, MapOf, setting
from .kinds import BOOLEAN, DURATION, NETWORK, TEXT, Kind, choice, file_path, integer

__all__ = ["PROXY_URL", "WAYS", "RouteBook", "RouteSettings", "WaySettings", "make_routes"]


def _proxy_url(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError('write "socks5://user:password@host:1080", "http://host:3128", "https://…"')
    parse_parent(value)
    return value


PROXY_URL: Final = Kind("URL of a proxy", _proxy_url, hide=hidden_url)
_PORTS: Final = re.compile(r"(\d{1,5})(?:-(\d{1,5}))?")


def _ports(value: Any) -> PortRange:
    found = _PORTS.fullmatch(str(value)) if isinstance(value, str | int) and not isinstance(value, bool) else None
    if found is None:
        raise ValueError('write a port, or a range such as "8000-8100"')
    return PortRange(int(found.group(1)), int(found.group(2) or found.group(1)))


PORTS: Final = Kind(
    "port or range", _ports, lambda ports: ports.first if ports.first == ports.last else f"{ports.first}-{ports.last}"
)
_PROTOCOL: Final = choice(*(protocol.value for protocol in Asked))
_KEY: Final = choice(*(key.value for key in Key))
_HOLD: Final = HealthLimits()


@dataclass(frozen=True)
class RouteSettings:
    """A route: connections for which all that is given holds take its way. The first that matches decides; what none
    matches is refused."""

    name: str = setting(TEXT, "its id, in log lines and commands")
    way: str = setting(TEXT, "the name of a way, or direct, refuse, reset")
    hosts: tuple[str, ...] = setting(
        ListOf(TEXT), "targets by name: a.example, *.a.example, .a.example (both), or a glob", default=()
    )
    regexes: tuple[str, ...] = setting(ListOf(TEXT), "targets by name: RE2, for the whole name", default=())
    networks: tuple[IPv4Network | IPv6Network, ...] = setting(
        ListOf(NETWORK), "targets by address, where clients name one", default=()
    )
    resolve: bool = setting(BOOLEAN, "look names up here, and compare them with networks too", default=False)
    ports: tuple[PortRange, ...] = setting(ListOf(PORTS), "of targets", default=())
    users: tuple[str, ...] = setting(ListOf(TEXT), "that have proven who they are", default=())
    listeners: tuple[str, ...] = setting(ListOf(TEXT), "by name", default=())
    clients: tuple[IPv4Network | IPv6Network, ...] = setting(ListOf(NETWORK), "by address", default=())
    protocols: tuple[str, ...] = setting(ListOf(_PROTOCOL), "how clients ask", default=())
    server_names: tuple[str, ...] = setting(ListOf(TEXT), "of the ClientHello, where a layer has read one", default=())

    def __post_init__(self) -> None:
        RouteTable([self.route()])  # raises RouteError, a ValueError

    def route(self) -> Route:
        """Return it as the table takes it."""
        return Route(
            self.name,
            self.way,
            self.hosts,
            self.regexes,
            self.networks,
            self.ports,
            self.users,
            self.listeners,
            self.clients,
            tuple(map(Asked, self.protocols)),
            self.server_names,
            self.resolve,
        )


class WaySettings(Protocol):
    """The settings of one way."""

    def way(self) -> Way: ...


def _limits(fall: int, rise: int, hold: float) -> HealthLimits:
    return HealthLimits(fall, rise, hold, max(hold, _HOLD.longest))


@dataclass(frozen=True)
class DirectWaySettings:
    """From this host."""

    source: tuple[IPv4Network | IPv6Network, ...] = setting(
        ListOf(NETWORK), "addresses of ours, or networks of them, to connect from", default=()
    )
    interface: str | None = setting(TEXT, "device that packets must use", default=None)
    key: str | None = setting(_KEY, "what keeps its source; each connection has its own by default", default=None)
    fall: int = setting(integer(1, 1000), "failures in a row that take it down, in a group", default=_HOLD.fall)
    rise: int = setting(integer(1, 1000), "successes in a row that bring it back", default=_HOLD.rise)
    hold: float = setting(DURATION, "it is left alone for so long, then twice as long, at most 5m", default=_HOLD.hold)

    def way(self) -> Direct:
        """Return it as connectors take it."""
        return Direct(
            self.source,
            self.interface,
            None,
            None if self.key is None else Key(self.key),
            _limits(self.fall, self.rise, self.hold),
        )


@dataclass(frozen=True)
class ProxyWaySettings:
    """Another proxy."""

    url: str = setting(
        PROXY_URL,
        "http, https, socks4, socks4a, socks5 (the same as socks5h) or socks5s (in TLS)://user:password@host:port",
    )
    trusted: bool = setting(BOOLEAN, "its private networks may be asked for", default=False)
    names: str = setting(choice("there", "here"), "where targets' names are looked up", default="there")
    ca: str | None = setting(file_path(), "PEM file of the authority of its certificate", default=None)
    fall: int = setting(integer(1, 1000), "failures in a row that take it down", default=_HOLD.fall)
    rise: int = setting(integer(1, 1000), "successes in a row that bring it back", default=_HOLD.rise)
    hold: float = setting(DURATION, "it is left alone for so long, then twice as long, at most 5m", default=_HOLD.hold)

    def __post_init__(self) -> None:
        parent = self.way()
        if self.ca is not None and not parent.in_tls:
            raise ValueError("ca is for https:// and socks5s://")

    def way(self) -> Parent:
        """Return it as connectors take it."""
        return parse_parent(
            self.url,
            trusted=self.trusted,
            resolve_here=self.names == "here",
            ca=None if self.ca is None else Path(self.ca),
            limits=_limits(self.fall, self.rise, self.hold),
        )


@dataclass(frozen=True)
class ChainWaySettings:
    """Through several proxies."""

    hops: tuple[str, ...] = setting(ListOf(TEXT), "names of ways that are proxies, the nearest first")
    fall: int = setting(integer(1, 1000), "failures in a row that take it down", default=_HOLD.fall)
    rise: int = setting(integer(1, 1000), "successes in a row that bring it back", default=_HOLD.rise)
    hold: float = setting(DURATION, "it is left alone for so long, then twice as long, at most 5m", default=_HOLD.hold)

    def way(self) -> Chain:
        """Return it as connectors take it."""
        return Chain(self.hops, _limits(self.fall, self.rise, self.hold))


@dataclass(frozen=True)
class GroupWaySettings:
    """A choice among ways. With no healthy member it refuses."""

    members: tuple[str, ...] = setting(ListOf(TEXT), "names of ways", default=())
    tiers: tuple[tuple[str, ...], ...] = setting(
        ListOf(ListOf(TEXT)), "instead of members: the first list with a healthy one is used", default=()
    )
    choose: str = setting(choice(*(word.value for word in Choose)), "who is first within a list", default="order")
    weights: Mapping[str, int] = setting(MapOf(integer(1, 1000)), "of members, 1 by default", factory=dict)
    key: str = setting(_KEY, "what hash and sticky go by", default=Key.USER.value)
    sticky: float | None = setting(DURATION, "how long a key keeps its member", default=None)

    def __post_init__(self) -> None:
        if bool(self.members) == bool(self.tiers):
            raise ValueError("the group is empty: name members, or tiers (not both)")

    def way(self) -> Group:
        """Return it as connectors take it."""
        return Group(self.tiers or (self.members,), Choose(self.choose), dict(self.weights), Key(self.key), self.sticky)


WAYS: Final[Mapping[str, type]] = {
    "chain": ChainWaySettings,
    "direct": DirectWaySettings,
    "group": GroupWaySettings,
    "proxy": ProxyWaySettings,
}


@dataclass(frozen=True)
class RouteBook:
    """The routes of a configuration, compiled, and its ways."""

    table: RouteTable
    ways: WayBook


def make_routes(routes: tuple[RouteSettings, ...], ways: Mapping[str, WaySettings]) -> RouteBook | None:
    """Return them, None where there are none of either. Raises :class:`~rama_ebpf.routes.RouteError`."""
    if not routes and not ways:
        return None
    book = WayBook({name: way.way() for name, way in ways.items()})
    table = RouteTable([route.route() for route in routes])
    book.check_routes(table.routes)
    if not routes:
        raise RouteError("there are ways, and no [[routes]] that lead there", ("way", next(iter(ways))))
    return RouteBook(table, book)
