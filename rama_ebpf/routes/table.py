"""The ordered list of routes, compiled: a decision is a few look-ups and a few ``&`` of numbers with a bit a route."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from ..core.address import IPAddress
from .hosts import HostIndex, canonical_host
from .model import Protocol, Route, RouteError
from .networks import NetworkIndex

__all__ = ["MAX_ROUTES", "NO_ROUTE", "Decision", "Question", "RouteTable"]

MAX_ROUTES: Final = 100_000
NO_ROUTE: Final = "none"
"""What is shown as the route where none matches: that is refused."""


@dataclass(frozen=True, slots=True)
class Question:
    """What a connection is known by. ``host`` is the target's name as the client wrote it, or ``ip`` its address;
    ``ips`` are the addresses of a name that has been looked up."""

    port: int
    host: str | None = None
    ip: IPAddress | None = None
    protocol: Protocol = Protocol.FORWARD
    user: str | None = None
    listener: str | None = None
    client: IPAddress | None = None
    server_name: str | None = None
    ips: Sequence[IPAddress] | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """``route`` decides, None where none matches; ``index`` counts from 0. With ``asks`` a route before it wants to
    know the addresses of the name: ask again with them."""

    way: str
    route: Route | None
    index: int = -1
    asks: bool = False

    @property
    def name(self) -> str:
        return NO_ROUTE if self.route is None else self.route.name


class RouteTable:
    """Routes in order; the first that matches decides. Where none does the connection is refused: nothing goes out
    directly that no route sends there. Raises :class:`RouteError`."""

    def __init__(self, routes: Sequence[Route]) -> None:
        if len(routes) > MAX_ROUTES:
            raise RouteError(f"{len(routes)} routes: {MAX_ROUTES} at most")
        self.routes = tuple(routes)
        every = (1 << len(routes)) - 1
        self._hosts, self._networks, self._clients, self._server_names = (
            HostIndex(),
            NetworkIndex(),
            NetworkIndex(),
            HostIndex(),
        )
        self._users: dict[str, int] = {}
        self._listeners: dict[str, int] = {}
        self._ports: dict[int, int] = {}
        self._protocols: dict[Protocol, int] = dict.fromkeys(Protocol, 0)
        any_target = any_client = any_name = any_user = any_listener = any_protocol = any_port = 0
        self._resolving = 0
        ranges: list[tuple[int, int, int]] = []
        names: dict[str, int] = {}
        for index, route in enumerate(routes):
            if names.setdefault(route.name, index) != index:
                raise RouteError(f"there are two routes {route.name!r}: names are ids", ("route", route.name))
            bit = 1 << index
            try:
                for pattern in route.hosts:
                    self._hosts.add_host(pattern, bit)
                for source in route.regexes:
                    self._hosts.add_regex(source, bit)
                for pattern in route.server_names:
                    self._server_names.add_host(pattern, bit)
            except RouteError as error:
                raise RouteError(f"route {route.name}: {error}", ("route", route.name)) from None
            for network in route.networks:
                self._networks.add(network, bit)
            for network in route.clients:
                self._clients.add(network, bit)
            for user in route.users:
                self._users[user] = self._users.get(user, 0) | bit
            for listener in route.listeners:
                self._listeners[listener] = self._listeners.get(listener, 0) | bit
            for protocol in route.protocols:
                self._protocols[protocol] |= bit
            ranges += [(part.first, part.last, bit) for part in route.ports]
            any_target |= 0 if route.hosts or route.regexes or route.networks else bit
            any_client |= 0 if route.clients else bit
            any_name |= 0 if route.server_names else bit
            any_user |= 0 if route.users else bit
            any_listener |= 0 if route.listeners else bit
            any_protocol |= 0 if route.protocols else bit
            any_port |= 0 if route.ports else bit
            self._resolving |= bit if route.resolve else 0
        for part in (self._hosts, self._networks, self._clients, self._server_names):
            part.freeze()
        self._any_target, self._any_client, self._any_name = any_target, any_client, any_name
        self._any_user, self._any_listener, self._any_port = any_user, any_listener, any_port
        self._protocols = {protocol: bits | any_protocol for protocol, bits in self._protocols.items()}
        self._every = every
        self._asks_client, self._asks_name = any_client != every, any_name != every
        self._asks_user, self._asks_listener, self._asks_port = (
            any_user != every,
            any_listener != every,
            any_port != every,
        )
        for first, last, bit in ranges:
            for port in range(first, last + 1):
                self._ports[port] = self._ports.get(port, 0) | bit
        self._asks = self._asks_client or self._asks_name or self._asks_user or self._asks_listener or self._asks_port
        self._asks_protocol = any_protocol != every
        self._asks = self._asks or self._resolving != 0 or self._asks_protocol
        self._first_any = (any_target & -any_target).bit_length() - 1
        # The last one is found where nothing matches.
        self._decisions = (
            *(Decision(route.way, route, index) for index, route in enumerate(routes)),
            Decision("refuse", None),
        )
        known: dict[int, int] = {}
        self._ports = {port: known.setdefault(bits, bits) for port, bits in self._ports.items()}

    @property
    def asks_protocol(self) -> bool:
        """Whether it matters how a client asks; likewise for what follows."""
        return self._asks_protocol

    @property
    def asks_user(self) -> bool:
        return self._asks_user

    @property
    def asks_listener(self) -> bool:
        return self._asks_listener

    @property
    def asks_client(self) -> bool:
        return self._asks_client

    @property
    def asks_name(self) -> bool:
        """The server name."""
        return self._asks_name

    def _around(self, question: Question) -> int:
        """The routes for which all holds but the target."""
        bits = self._protocols[question.protocol]
        if self._asks_port:
            bits &= self._any_port | self._ports.get(question.port, 0)
        if self._asks_user:
            user = question.user
            bits &= self._any_user if user is None else self._any_user | self._users.get(user, 0)
        if self._asks_listener:
            listener = question.listener
            bits &= self._any_listener if listener is None else self._any_listener | self._listeners.get(listener, 0)
        if self._asks_client:
            client = question.client
            bits &= self._any_client if client is None else self._any_client | self._clients.find(client)
        if self._asks_name:
            name = question.server_name
            bits &= self._any_name if name is None else self._any_name | self._server_names.find(canonical_host(name))
        return bits

    def decide(self, question: Question) -> Decision:
        """Return the first route that matches."""
        ip = question.ip
        target = self._hosts.find(canonical_host(question.host or "")) if ip is None else self._networks.find(ip)
        if not self._asks:
            found = (target & -target).bit_length() - 1
            first = self._first_any
            return self._decisions[found if 0 <= found < first or first < 0 else first]
        around = self._around(question)
        wanting = 0
        if ip is None and self._resolving:
            if question.ips is None:
                wanting = around & self._resolving
            else:
                for known in question.ips:
                    target |= self._networks.find(known) & self._resolving
        matching = around & (target | self._any_target)
        lowest = matching & -matching
        decision = self._decisions[lowest.bit_length() - 1]
        if wanting and (not matching or wanting & -wanting < lowest):
            return replace(decision, asks=True)
        return decision

    def possible(self, question: Question) -> list[Route]:
        """Return the routes that may decide for some target and port: for who has to know before it is named."""
        bits = self._protocols[question.protocol]
        if question.user is None:
            bits &= self._any_user
        else:
            bits &= self._any_user | self._users.get(question.user, 0)
        if question.listener is None:
            bits &= self._any_listener
        else:
            bits &= self._any_listener | self._listeners.get(question.listener, 0)
        bits &= self._any_client if question.client is None else self._any_client | self._clients.find(question.client)
        found = []
        while bits:
            lowest = bits & -bits
            route = self.routes[lowest.bit_length() - 1]
            found.append(route)
            bits ^= lowest
            if not (route.hosts or route.regexes or route.networks or route.ports or route.server_names):
                break
        return found

    def __len__(self) -> int:
        return len(self.routes)
