"""What routes and ways are made of: frozen, checked when they are made, and without secrets in their text."""

from __future__ import annotations

import enum
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Final

from ..core.address import Authority
from ..core.auth import Credentials
from ..core.errors import RamaError
from .health import HealthLimits

__all__ = [
    "DEFAULT_PORTS",
    "RESERVED",
    "Chain",
    "Choose",
    "Direct",
    "Group",
    "Key",
    "Parent",
    "PortRange",
    "Protocol",
    "Refuse",
    "Route",
    "RouteError",
    "Way",
    "check_name",
]

IPNetwork = IPv4Network | IPv6Network

RESERVED: Final = frozenset({"direct", "refuse", "reset"})
"""Ways that are always there, under names that no other can have."""
DEFAULT_PORTS: Final[Mapping[str, int]] = {
    "http": 80,
    "https": 443,
    "socks4": 1080,
    "socks4a": 1080,
    "socks5": 1080,
    "socks5h": 1080,
    "socks5s": 1080,
}
"""Schemes of parents; ``socks5s`` is SOCKS5 in TLS."""
_LIMITS: Final = HealthLimits()
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")


class RouteError(RamaError, ValueError):
    """Routes or ways that cannot be used; ``where`` names the route or way, the text says the remedy."""

    kind = "route"

    def __init__(self, message: str, where: tuple[str, str] = ("", "")) -> None:
        super().__init__(message)
        self.where = where


def check_name(name: str, what: str) -> None:
    """Raise :class:`RouteError` for a name that logs, metrics and hashes could not carry."""
    if _NAME.fullmatch(name) is None:
        raise RouteError(
            f"{what} {name!r}: use 1-63 letters, digits, '_', '.' and '-', beginning with a letter or digit"
        )


class Protocol(enum.Enum):
    """How a client asks to be connected."""

    __hash__ = object.__hash__  # members are single objects; Enum's own hash is a call of Python for each look-up

    SOCKS = "socks"
    """CONNECT of SOCKS4 and SOCKS5."""
    CONNECT = "connect"
    """CONNECT of HTTP."""
    HTTP = "http"
    """A request for an ``http://`` URL."""
    TLS = "tls"
    """TLS that is passed through by its server name."""
    UDP = "udp"
    """Datagrams of UDP ASSOCIATE."""
    BIND = "bind"
    FORWARD = "forward"
    """The service ``forward``, and whatever else connects."""


@dataclass(frozen=True, slots=True)
class PortRange:
    """Ports from ``first`` to ``last``, both included."""

    first: int
    last: int

    def __post_init__(self) -> None:
        if not 0 <= self.first <= self.last <= 65535:
            raise ValueError(f"ports {self.first}-{self.last}: use 0 to 65535, the lower one first")


@dataclass(frozen=True, slots=True)
class Route:
    """A rule: connections for which all that is given holds take ``way``. Of each list one is enough.

    The target is meant by ``hosts`` (exact, ``*.suffix``, ``.suffix``, globs), ``regexes`` (RE2, on the whole name in
    lower case) or ``networks``: one of the three is enough. A name is not looked up for ``networks`` unless the route
    says ``resolve``.
    """

    name: str
    way: str
    hosts: tuple[str, ...] = ()
    regexes: tuple[str, ...] = ()
    networks: tuple[IPNetwork, ...] = ()
    ports: tuple[PortRange, ...] = ()
    users: tuple[str, ...] = ()
    listeners: tuple[str, ...] = ()
    clients: tuple[IPNetwork, ...] = ()
    protocols: tuple[Protocol, ...] = ()
    server_names: tuple[str, ...] = ()
    resolve: bool = False

    def __post_init__(self) -> None:
        check_name(self.name, "route")
        if self.resolve and not self.networks:
            raise RouteError(f"route {self.name}: resolve looks names up for networks, and there are none")


@dataclass(frozen=True, slots=True)
class Direct:
    """From this host: from one of ``sources`` (a network: any address in it, which the kernel must let us bind), by
    ``interface``, with ``mark``. With sources of one family the other is not dialled at all. ``key``: what keeps its
    source."""

    sources: tuple[IPNetwork, ...] = ()
    interface: str | None = None
    mark: int | None = None
    key: Key | None = None
    limits: HealthLimits = _LIMITS


@dataclass(frozen=True, slots=True)
class Parent:
    """Another proxy. ``trusted``: its private networks may be asked for. ``names`` says who looks targets up."""

    scheme: str
    address: Authority
    credentials: Credentials | None = field(default=None, repr=False)
    trusted: bool = False
    resolve_here: bool = False
    ca: Path | None = None
    limits: HealthLimits = _LIMITS

    def __post_init__(self) -> None:
        if self.scheme not in DEFAULT_PORTS:
            raise RouteError(f"the scheme must be one of {', '.join(DEFAULT_PORTS)}, not {self.scheme!r}")
        login = self.credentials
        if login is not None and self.scheme in ("http", "https") and ":" in login.username:
            raise RouteError("a user name with a colon cannot be sent as Basic (RFC 7617 section 2)")
        if login is not None and self.scheme.startswith("socks5"):
            sizes = (len(login.username.encode()), len(login.password.encode()))
            if not all(1 <= size <= 255 for size in sizes):
                raise RouteError("user name and password must have 1-255 octets each (RFC 1929)")
        if login is not None and self.scheme.startswith("socks4") and login.password:
            raise RouteError("SOCKS4 knows user names and no passwords")

    @property
    def in_tls(self) -> bool:
        return self.scheme in ("https", "socks5s")

    @property
    def speaks_http(self) -> bool:
        return self.scheme in ("http", "https")

    def __str__(self) -> str:
        """Without the password, and without the user name, which may be a token."""
        return f"{self.scheme}://{'***@' if self.credentials is not None else ''}{self.address}"


@dataclass(frozen=True, slots=True)
class Chain:
    """Through several parents, the nearest one first. The last one's wishes about names and trust count."""

    hops: tuple[str, ...]
    limits: HealthLimits = _LIMITS


class Choose(enum.Enum):
    """How a group orders the members of a tier."""

    ORDER = "order"
    LEAST = "least"
    """Fewest live connections for its weight."""
    WEIGHT = "weight"
    """At random, by weight."""
    LATENCY = "latency"
    """The quickest of late."""
    HASH = "hash"
    """Rendezvous hash of a key with the members' names, none loaded above 1.25 of its share."""


class Key(enum.Enum):
    """What stays with one member, or one source address."""

    USER = "user"
    SOURCE = "source"
    """The client's address, or /64."""
    SESSION = "session"
    """The option ``session`` of the user name, or else the user."""
    TARGET = "target"
    """The target's host."""


@dataclass(frozen=True, slots=True)
class Group:
    """A choice among ways: the first tier with a healthy member. ``sticky``: seconds that a key keeps its member."""

    tiers: tuple[tuple[str, ...], ...]
    choose: Choose = Choose.ORDER
    weights: Mapping[str, int] = field(default_factory=dict)
    key: Key = Key.USER
    sticky: float | None = None

    @property
    def members(self) -> tuple[str, ...]:
        return tuple(name for tier in self.tiers for name in tier)


@dataclass(frozen=True, slots=True)
class Refuse:
    """No way: an answer of the protocol, or with ``reset`` none."""

    reset: bool = False


Way = Direct | Parent | Chain | Group | Refuse
