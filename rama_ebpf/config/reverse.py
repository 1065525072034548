"""A reverse HTTP proxy in a configuration: routes to pools of backends."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from pathlib import Path
from typing import Any, Final, Literal, Protocol

from ..core.address import Authority
from ..core.service import Service, stack
from ..core.source_policy import SourcePolicy
from ..core.stream import Stream
from ..services.http import (
    DEFAULT_UPGRADES,
    BackendPool,
    ForwardedField,
    ForwardedLayer,
    HealthCheck,
    HttpLimits,
    HttpServer,
    HttpTimeouts,
    OriginOptions,
    PassiveHealth,
    Route,
    Routes,
    TrustedPeersLayer,
)
from ..services.proxy_protocol import ProxyProtocolConnector
from ..services.tls import ClientTls, TlsConnector
from .decode import ListOf, Table, setting
from .http import ENGINE, HttpLimitSettings, HttpTimeoutSettings, check_upgrades
from .kinds import AUTHORITY, BOOLEAN, DURATION, NETWORK, SIZE, TEXT, choice, file_path, integer

__all__ = ["HasLifecycle", "ReverseSettings"]

_ALPN: Final = {"h2": ("h2", "http/1.1"), "http/1.1": ("http/1.1",)}
_PROXY_VERSIONS: Final[dict[str, Literal[1, 2]]] = {"v1": 1, "v2": 2}


class HasLifecycle(Protocol):
    """What runs beside connections is started and stopped with the worker."""

    def on_start(self, start: Callable[[], None], /) -> None:
        """Call ``start`` in the event loop before the first connection."""

    def on_close(self, close: Callable[[], None], /) -> None:
        """Call ``close`` after the last."""


class ReverseEnvironment(HasLifecycle, Protocol):
    """What a reverse proxy finds where it runs."""

    @property
    def policy(self) -> SourcePolicy: ...


@dataclass(frozen=True)
class UpstreamTlsSettings:
    """TLS to the backends; they must prove the name that is asked for."""

    ca: str | None = setting(file_path(), "PEM file, for the system's authorities", default=None)
    server_name: str | None = setting(TEXT, "the name to prove (each backend's own by default)", default=None)
    protocol: str = setting(choice(*_ALPN), "h2: where the backend agrees", default="h2")

    def connectors(self, connector: Service[Authority, Stream]) -> tuple[TlsConnector, TlsConnector | None]:
        """Return the connector of requests, and that of upgrades, which need HTTP/1.1."""

        def make(protocol: str) -> TlsConnector:
            settings = ClientTls(ca=None if self.ca is None else Path(self.ca), alpn=_ALPN[protocol])
            return TlsConnector(connector, settings, server_name=self.server_name)

        return make(self.protocol), make("http/1.1") if self.protocol == "h2" else None


@dataclass(frozen=True)
class HealthCheckSettings:
    """GET requests that tell which backends may be used; each worker sends its own."""

    path: str = setting(TEXT, "what is asked for", default="/")
    host: str | None = setting(TEXT, "the Host that is sent (the backend's own by default)", default=None)
    interval: float = setting(DURATION, "between two checks of a backend", default=5.0)
    timeout: float = setting(DURATION, "for the response", default=2.0)
    rise: int = setting(integer(1, 100), "successes in a row that bring it back", default=2)
    fall: int = setting(integer(1, 100), "failures in a row that take it out", default=3)

    def check(self) -> HealthCheck:
        """Return it as a pool takes it."""
        return HealthCheck(self.path, self.host or "", self.interval, self.timeout, self.rise, self.fall)


@dataclass(frozen=True)
class RouteSettings:
    """Where requests go that match all that is given; the most specific route takes a request."""

    backends: tuple[Authority, ...] = setting(ListOf(AUTHORITY), "egress policy judges them as any other target")
    host: str | None = setting(TEXT, "a name, or *.name for all below it (any by default)", default=None)
    path: str = setting(TEXT, "a prefix that ends at a /, or at the path's end", default="/")
    methods: tuple[str, ...] = setting(ListOf(TEXT), "in upper case (any by default)", default=())
    name: str | None = setting(TEXT, "what metrics call the route (its host and path by default)", default=None)
    tls: UpstreamTlsSettings | None = setting(Table(UpstreamTlsSettings), "to the backends", default=None)
    check: HealthCheckSettings | None = setting(Table(HealthCheckSettings), "active health checks", default=None)
    failures: int = setting(integer(1, 1000), "failed requests in 10 s that take a backend out for 10 s", default=3)
    retries: int = setting(integer(0, 10), "other backends that a request may move on to", default=1)
    retry_statuses: tuple[int, ...] = setting(
        ListOf(integer(400, 599)), "responses that let a repeatable request move on", default=()
    )
    max_busy: int | None = setting(integer(1, 1_000_000), "requests at once, for each backend and worker", default=None)
    own_host: bool = setting(BOOLEAN, "send the backend's own Host instead of the client's", default=False)
    proxy_protocol: str | None = setting(
        choice(*_PROXY_VERSIONS), "a PROXY header first, and a connection for each request", default=None
    )
    keep: bool = setting(BOOLEAN, "use a connection to a backend for more than one request", default=True)
    lenient: bool = setting(BOOLEAN, "take what old servers send and what can be read in one way only", default=False)

    def __post_init__(self) -> None:
        if not self.backends:
            raise ValueError("backends is empty: name at least one")
        if not self.path.startswith("/"):
            raise ValueError(f'path "{self.path}": it begins with /')
        if any(method != method.upper() for method in self.methods):
            raise ValueError("methods are written in upper case (RFC 9110 section 9.1)")

    def route(
        self,
        environment: HasLifecycle,
        connector: Service[Authority, Stream],
        *,
        protocols: Collection[str],
        limits: HttpLimits,
        timeouts: HttpTimeouts,
    ) -> Route:
        """Make the pool and its route."""
        requests: Service[Authority, Stream] = connector
        upgrades: Service[Authority, Stream] | None = None
        if self.tls is not None:
            requests, upgrades = self.tls.connectors(connector)
        header = None
        if self.proxy_protocol is not None:
            header = ProxyProtocolConnector(connector, version=_PROXY_VERSIONS[self.proxy_protocol])
        pool = BackendPool(
            self.backends,
            requests,
            upgrade_connector=upgrades,
            check=None if self.check is None else self.check.check(),
            passive=PassiveHealth(failures=self.failures),
            retries=self.retries,
            retry_statuses=self.retry_statuses,
            max_busy=self.max_busy,
            own_host=self.own_host,
            proxy_protocol=header,
            origin=OriginOptions(keep=self.keep, lenient=self.lenient),
            upgrades=protocols,
            limits=limits,
            timeouts=timeouts,
        )
        environment.on_start(pool.start)
        environment.on_close(pool.close)
        return Route(pool, host=self.host, path=self.path, methods=self.methods or None, name=self.name or "")


@dataclass(frozen=True)
class ReverseSettings:
    """A reverse proxy for HTTP: put the layer ``tls`` around it for HTTPS and HTTP/2."""

    routes: tuple[RouteSettings, ...] = setting(ListOf(Table(RouteSettings)), "to backends")
    forwarded: str = setting(
        choice("x-forwarded-for", "forwarded", "off"),
        "how backends are told who the client is",
        default="x-forwarded-for",
    )
    trusted: tuple[IPv4Network | IPv6Network, ...] = setting(
        ListOf(NETWORK), "proxies in front that are believed in this", default=()
    )
    judge: bool = setting(
        BOOLEAN, "rules and bans judge the client that they name (403), and strikes are about it", default=True
    )
    max_body: int | None = setting(SIZE, "of a request (413); no bound by default", default=None)
    h2c: bool = setting(BOOLEAN, "HTTP/2 without TLS for clients that begin with its preface", default=False)
    upgrades: tuple[str, ...] = setting(
        ListOf(TEXT), "protocols that may be switched to", default=tuple(sorted(DEFAULT_UPGRADES))
    )
    limits: HttpLimitSettings = setting(
        Table(HttpLimitSettings), "how large parts of messages may be", default=HttpLimitSettings()
    )
    timeouts: HttpTimeoutSettings = setting(
        Table(HttpTimeoutSettings), "how long to wait", default=HttpTimeoutSettings()
    )
    engine: str = setting(
        ENGINE, "who reads HTTP/1.1; h11: it as well, and what the two read apart is refused", default="strict"
    )

    def __post_init__(self) -> None:
        check_upgrades(self.upgrades)
        if not self.routes:
            raise ValueError("routes is empty: name at least one")
        if self.trusted and self.forwarded == "off":
            raise ValueError("trusted proxies are believed in the field that forwarded names, and it is off")
        for route in self.routes:
            if route.proxy_protocol is not None and route.tls is not None:
                raise ValueError("proxy_protocol and tls do not go together yet")

    def make(self, environment: ReverseEnvironment, connector: Service[Authority, Stream]) -> Service[Stream, Any]:
        """Make the service."""
        field = None if self.forwarded == "off" else ForwardedField(self.forwarded)
        timeouts = self.timeouts.timeouts()
        limits = self.limits.limits(self.engine, body=self.max_body)
        onward = self.limits.limits(self.engine)
        routes = Routes(
            [
                route.route(environment, connector, protocols=self.upgrades, limits=onward, timeouts=timeouts)
                for route in self.routes
            ]
        )
        trusted = tuple(map(str, self.trusted))
        policy = environment.policy if trusted and self.judge else None
        service = stack(ForwardedLayer(field, trusted=trusted, policy=policy), routes)
        server = HttpServer(service, h2c=self.h2c, limits=limits, timeouts=timeouts)
        return stack(TrustedPeersLayer(trusted), server) if trusted else server
