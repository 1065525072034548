"""The services that a configuration can name, and how they connect to their targets."""

from __future__ import annotations

import errno
import inspect
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, Final, Protocol

from ..core.address import Authority
from ..core.auth import Authenticator
from ..core.names import NameSet
from ..core.service import Service, innermost, stack
from ..core.shares import Held
from ..core.stream import Stream
from ..layers.auth import PasswordFile
from ..layers.breaker import CircuitBreakerLayer
from ..layers.check_queue import CheckQueue
from ..layers.retry import RetryLayer
from ..routes.blame import Fault
from ..routes.health import HealthLimits
from ..routes.model import Chain, Route
from ..routes.table import RouteTable
from ..routes.ways import WayBook
from ..services.connect import ConnectError, Connector, OneDeadlineLayer
from ..services.forward import Forward, Transparent
from ..services.http import DEFAULT_UPGRADES, HttpProxy, OriginOptions
from ..services.http.layers import ProxyAuthLayer
from ..services.proxy import mixed_proxy
from ..services.route import RouteConnector, RoutedSocks, parse_parent
from ..services.route.failure import WayFailed
from ..services.socket_options import SocketOptions
from ..services.socks5 import Binder, ReplyTiming, Socks5Server, UdpAssociator, UserLimits
from .decode import ListOf, Table, setting
from .http import ENGINE, HttpLimitSettings, HttpTimeoutSettings, check_upgrades
from .kinds import AUTHORITY, BOOLEAN, DURATION, HOST_PATTERN, TARGET, TEXT, choice, file_path, integer, ip_literal
from .layers import Environment, TargetsSettings
from .reverse import HasLifecycle, ReverseSettings
from .routes import PROXY_URL, RouteBook
from .tls import TlsPassthroughSettings

_PASSWORD_FILE: Final = file_path(secret=True)
_SAID_NO: Final = frozenset({errno.EACCES, errno.EPERM, errno.EKEYREJECTED, errno.EOPNOTSUPP, errno.EAFNOSUPPORT})

__all__ = ["SERVICES", "ConnectSettings", "ServiceEnvironment", "ServiceSettings"]


class ServiceEnvironment(Environment, HasLifecycle, Protocol):
    """What services find besides."""

    def call(self, factory: Any) -> Any:
        """Call a function that makes a service."""

    @property
    def stack(self) -> str:
        """The name of the stack."""

    @property
    def routes(self) -> RouteBook | None:
        """The routes of the configuration."""

    @property
    def route_key(self) -> bytes:
        """What the choices of groups are hashed with."""

    @property
    def observe_way(self) -> Callable[[str, str], None] | None:
        """Is told the way and the outcome of attempts."""


class ServiceSettings(Protocol):
    """The settings of one service, which make it around a connector."""

    def make(self, environment: ServiceEnvironment, connector: Service[Authority, Stream]) -> Service[Stream, Any]: ...


@dataclass(frozen=True)
class RetrySettings:
    """Try again what fails for a moment, under a budget of one retry in ten."""

    attempts: int = setting(integer(1, 10), "tries in all", default=3)
    backoff: float = setting(DURATION, "longest pause before the second try; it doubles", default=0.05)


@dataclass(frozen=True)
class BreakerSettings:
    """Leave targets alone that fail again and again."""

    failures: int = setting(integer(1, 1000), "failures in a row", default=5)
    pause: float = setting(DURATION, "before the next try", default=10.0)


@dataclass(frozen=True)
class ConnectSettings:
    """How targets are reached."""

    timeout: float = setting(DURATION, "for all attempts together", default=10.0)
    source_v4: str | None = setting(ip_literal(4), "address of ours to connect from", default=None)
    source_v6: str | None = setting(ip_literal(6), "address of ours to connect from", default=None)
    interface: str | None = setting(TEXT, "device that packets must use", default=None)
    via: tuple[str, ...] = setting(
        ListOf(PROXY_URL),
        'proxies to go through, the nearest first: "socks5://user:password@host:1080", "http://…"',
        default=(),
    )
    retry: RetrySettings | None = setting(Table(RetrySettings), "tries", default=None)
    breaker: BreakerSettings | None = setting(Table(BreakerSettings), "circuit breaker", default=None)
    targets: TargetsSettings | None = setting(Table(TargetsSettings), "which targets may be asked for", default=None)

    routes: bool | None = setting(
        BOOLEAN, "follow [[routes]]: every service does where there are some, but reverse", default=None
    )
    tries: int = setting(integer(1, 32), "attempts in all, over ways and their addresses", default=6)
    late: float = setting(DURATION, "an attempt that takes longer has another one begun beside it", default=0.5)

    def __post_init__(self) -> None:
        self._options()

    def _options(self) -> SocketOptions:
        return SocketOptions(interface=self.interface)

    def make(self, environment: ServiceEnvironment, *, routed: bool = True) -> Service[Authority, Stream]:
        """Compose the connector; ``routed`` says whether the service follows routes where nothing is said."""
        connector = Connector(
            environment.resolver,
            environment.egress,
            timeout=self.timeout,
            source_v4=self.source_v4,
            source_v6=self.source_v6,
            options=self._options(),
        )
        layers: list[object] = []
        if self.targets is not None:
            layers.append(self.targets.make(environment))
        book = environment.routes if (routed if self.routes is None else self.routes) else None
        if self.routes and environment.routes is None:
            raise ValueError("connect.routes: there are no [[routes]]")
        if book is not None and (self.via or self.source_v4 or self.source_v6 or self.interface):
            raise ValueError(
                "connect says via, source or interface beside [[routes]]: make a way of it, or say routes = false here"
            )
        if self.breaker is not None and not self.via:
            layers.append(CircuitBreakerLayer(ConnectError, failures=self.breaker.failures, pause=self.breaker.pause))
        if self.retry is not None:
            layers.append(OneDeadlineLayer(self.timeout))
            layers.append(
                RetryLayer(
                    ConnectError, attempts=self.retry.attempts, backoff=self.retry.backoff, retryable=_may_do_better
                )
            )
        if book is None and not self.via:
            return stack(*layers, connector)
        book = self.via_book(environment.stack) if book is None else book
        shared = environment.shared
        ways = RouteConnector(
            book.table,
            book.ways,
            connector,
            timeout=self.timeout,
            tries=self.tries,
            late=self.late,
            board=None if shared is None else shared.board(),
            overrides=dict if shared is None else shared.board().overrides,
            secret=environment.route_key,
            observe=environment.observe_way,
        )
        return stack(*layers, ways)

    def via_book(self, name: str) -> RouteBook:
        """Return the one route of the stack ``name`` through these proxies."""
        limits = HealthLimits()
        if self.breaker is not None:
            pause = self.breaker.pause
            limits = HealthLimits(self.breaker.failures, 1, pause, max(pause, limits.longest))
        own = f"via-{zlib.crc32(name.encode()):08x}"
        if len(self.via) == 1:
            return RouteBook(RouteTable([Route("via", own)]), WayBook({own: parse_parent(self.via[0], limits=limits)}))
        hops = {f"{own}-{number}": parse_parent(url) for number, url in enumerate(self.via, 1)}
        ways = WayBook({**hops, own: Chain(tuple(hops), limits)})
        return RouteBook(RouteTable([Route("via", own)]), ways)


def _may_do_better(_target: object, error: Exception) -> bool:
    """Whether another attempt may end otherwise: not where somebody has said no."""
    if isinstance(error, WayFailed):
        return error.fault is Fault.WAY
    return not isinstance(error, OSError) or error.errno not in _SAID_NO


def _socks_ways(connector: Service[Authority, Stream], *, udp: bool) -> RoutedSocks | None:
    """How UDP and BIND go out. Raises ValueError where no datagram could."""
    routed = innermost(connector)
    if not isinstance(routed, RouteConnector):
        return None
    ways = RoutedSocks(routed)
    leaves = [leaf for route in routed.table.routes for leaf in routed.ways.leaves(route.way)]
    if udp and not any(map(ways.carries, leaves)):
        raise ValueError(
            "udp: no way can carry datagrams: only direct ones and a single socks5:// proxy do, so leave udp out"
        )
    return ways


def _authenticator(environment: Environment, users: str | None) -> Authenticator | None:
    if users is None:
        return None
    if environment.shared is not None:
        queue = CheckQueue(share=environment.share(Held.CHECKS), observe=environment.observe_check)
        return PasswordFile(users, queue=queue, proven=environment.shared.proven())
    file = PasswordFile(users)  # only looked at: where the operator sees it, before workers make theirs
    file.warn_of_dear_hashes()
    return file


@dataclass(frozen=True)
class Socks5Settings:
    """SOCKS5, and SOCKS4(a) where no password is demanded."""

    users: str | None = setting(_PASSWORD_FILE, "password file: name:hash lines (rama-ebpf passwd)", default=None)
    auth_optional: bool = setting(BOOLEAN, "serve clients that offer no password too", default=False)
    user_connections: int | None = setting(
        integer(1, 1_000_000), "that one user may have at a time, over all workers", default=None
    )
    udp: bool = setting(
        BOOLEAN, "serve UDP ASSOCIATE; its datagrams take the routes, or connect.via, or are refused", default=False
    )
    udp_idle: float = setting(DURATION, "without a datagram from the client", default=120.0)
    bind: bool = setting(BOOLEAN, "serve BIND, likewise", default=False)
    advertise: tuple[str, ...] = setting(
        ListOf(ip_literal()), "our addresses as clients behind NAT see them, one a family, for UDP and BIND", default=()
    )
    reply: str = setting(
        choice(*(timing.value for timing in ReplyTiming)),
        "answer CONNECT when the outcome is known, or at once",
        default=ReplyTiming.LAZY.value,
    )
    handshake: float = setting(DURATION, "time for the handshake", default=10.0)

    def __post_init__(self) -> None:
        if self.users is None and (self.auth_optional or self.user_connections is not None):
            raise ValueError("auth_optional and user_connections need users")
        if len({ip_address(text).version for text in self.advertise}) < len(self.advertise):
            raise ValueError("advertise one address a family")

    def make(self, environment: ServiceEnvironment, connector: Service[Authority, Stream]) -> Service[Stream, Any]:
        resolver, egress = environment.resolver, environment.egress
        advertise = [ip_address(text) for text in self.advertise]
        user = UserLimits(connections=self.user_connections)
        binder = Binder(resolver, egress, advertise=advertise, share=environment.share(Held.BINDS))
        associations = environment.share(Held.ASSOCIATIONS)
        udp = UdpAssociator(resolver, egress, advertise=advertise, idle_timeout=self.udp_idle, share=associations)
        return Socks5Server(
            connector,
            binder=binder if self.bind else None,
            udp=udp if self.udp else None,
            auth=_authenticator(environment, self.users),
            auth_optional=self.auth_optional,
            limits=None if self.user_connections is None else lambda _user: user,
            shared=environment.shared,
            ways=_socks_ways(connector, udp=self.udp),
            socks4=self.users is None,
            reply=ReplyTiming(self.reply),
            handshake_timeout=self.handshake,
        )


@dataclass(frozen=True)
class HttpSettings:
    """A forward proxy for HTTP, and CONNECT."""

    users: str | None = setting(_PASSWORD_FILE, "password file: name:hash lines (rama-ebpf passwd)", default=None)
    connect_ports: tuple[int, ...] = setting(
        ListOf(integer(1, 65535)), "ports that CONNECT may name (all by default)", default=()
    )
    unkept: tuple[str, ...] = setting(
        ListOf(HOST_PATTERN), "upstreams with a new connection for each request", default=()
    )
    lenient: tuple[str, ...] = setting(
        ListOf(HOST_PATTERN), "old upstreams, whose chunk sizes, folds and blanks are taken", default=()
    )

    def origins(self) -> Callable[[Authority], OriginOptions]:
        """Return how each upstream is treated."""
        unkept, lenient = NameSet(self.unkept), NameSet(self.lenient)
        if not unkept and not lenient:
            usual = OriginOptions()
            return lambda _target: usual
        return lambda target: OriginOptions(
            keep=str(target.host).lower() not in unkept, lenient=str(target.host).lower() in lenient
        )

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

    def make(self, environment: ServiceEnvironment, connector: Service[Authority, Stream]) -> Service[Stream, Any]:
        authenticate = _authenticator(environment, self.users)
        layers = [] if authenticate is None else [ProxyAuthLayer(authenticate)]
        return HttpProxy(
            connector,
            layers=layers,
            connect_ports=self.connect_ports or None,
            origins=self.origins(),
            upgrades=self.upgrades,
            limits=self.limits.limits(self.engine),
            timeouts=self.timeouts.timeouts(),
        )


@dataclass(frozen=True)
class MixedSettings:
    """SOCKS, HTTP, and TLS by server name, told apart by their first bytes."""

    users: str | None = setting(
        _PASSWORD_FILE,
        "password file: name:hash lines (rama-ebpf passwd); turns SOCKS4 and TLS clients away, which give no password",
        default=None,
    )
    handshake: float = setting(DURATION, "time for each protocol's handshake", default=10.0)
    upgrades: tuple[str, ...] = setting(
        ListOf(TEXT), "protocols that HTTP may switch to", default=tuple(sorted(DEFAULT_UPGRADES))
    )
    limits: HttpLimitSettings = setting(
        Table(HttpLimitSettings), "how large parts of HTTP messages may be", default=HttpLimitSettings()
    )
    timeouts: HttpTimeoutSettings = setting(
        Table(HttpTimeoutSettings), "how long HTTP waits", default=HttpTimeoutSettings()
    )
    engine: str = setting(
        ENGINE, "who reads HTTP/1.1; h11: it as well, and what the two read apart is refused", default="strict"
    )

    def __post_init__(self) -> None:
        check_upgrades(self.upgrades)

    def make(self, environment: ServiceEnvironment, connector: Service[Authority, Stream]) -> Service[Stream, Any]:
        return mixed_proxy(
            connector,
            auth=_authenticator(environment, self.users),
            handshake_timeout=self.handshake,
            http_upgrades=self.upgrades,
            http_limits=self.limits.limits(self.engine),
            http_timeouts=self.timeouts.timeouts(head=self.handshake),
            handshakes=environment.share(Held.HANDSHAKES),
        )


@dataclass(frozen=True)
class ForwardSettings:
    """Everything to one target."""

    to: Authority = setting(AUTHORITY, "the target; egress policy judges it as any other")

    def make(self, environment: ServiceEnvironment, connector: Service[Authority, Stream]) -> Service[Stream, Any]:
        return Forward(connector, self.to)


@dataclass(frozen=True)
class TransparentSettings:
    """Everything to where the client meant to connect: for listeners that serve prefixes (listen)."""

    def make(self, environment: ServiceEnvironment, connector: Service[Authority, Stream]) -> Service[Stream, Any]:
        return Transparent(connector)


@dataclass(frozen=True)
class EchoSettings:
    """Send back what comes (RFC 862)."""

    def make(self, environment: ServiceEnvironment, connector: Service[Authority, Stream]) -> Service[Stream, Any]:
        async def echo(stream: Stream) -> None:
            while data := await stream.read():
                await stream.write(data)

        return echo


@dataclass(frozen=True)
class CustomSettings:
    """A service of your own."""

    target: str = setting(TARGET, "a service, or a function of a WorkerContext that makes one")

    def make(self, environment: ServiceEnvironment, connector: Service[Authority, Stream]) -> Service[Stream, Any]:
        found = environment.load(self.target)
        service: Service[Stream, Any] = found if inspect.iscoroutinefunction(found) else environment.call(found)
        return service


SERVICES: Final[Mapping[str, type]] = {
    "custom": CustomSettings,
    "echo": EchoSettings,
    "forward": ForwardSettings,
    "http": HttpSettings,
    "mixed": MixedSettings,
    "reverse": ReverseSettings,
    "socks5": Socks5Settings,
    "tls-passthrough": TlsPassthroughSettings,
    "transparent": TransparentSettings,
}
"""Services of a stack, by name."""
