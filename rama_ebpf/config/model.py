"""The model of ``rama.toml``: every table and setting there is, with its default."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address

from ..core.address import Endpoint, IPAddress
from ..core.binding import Binding, BindingSet
from ..core.resolv_conf import MAX_NAME_SERVERS
from ..core.shares import SourceLimits
from ..policy.egress import EgressPolicy
from ..relay import RelayKind
from ..services.resolver import DnsResolver, SystemLookups
from .decode import Choice, ListOf, MapOf, Table, setting
from .kinds import (
    BINDING,
    BOOLEAN,
    DURATION,
    DURATION_OR_OFF,
    ENDPOINT,
    LOOPBACK_ENDPOINT,
    NETWORK,
    TEXT,
    USER,
    choice,
    file_path,
    integer,
    ip_literal,
)
from .layers import LAYERS, LayerSettings, check_order
from .policy import PolicyConfig, RuleConfig
from .routes import WAYS, RouteSettings, WaySettings
from .services import SERVICES, ConnectSettings, ServiceSettings

__all__ = [
    "Config",
    "EgressConfig",
    "LimitsConfig",
    "ListenerConfig",
    "LoggingConfig",
    "PolicyConfig",
    "ResolverConfig",
    "RuleConfig",
    "SandboxConfig",
    "ServerConfig",
    "StackConfig",
]

_NETWORKS = ListOf(NETWORK)
_LIMITS = SourceLimits()


def _cpus() -> int:
    return min(os.cpu_count() or 1, 64)


@dataclass(frozen=True)
class ServerConfig:
    """The process model."""

    workers: int = setting(integer(1, 64), "processes that serve (one a CPU by default)", factory=_cpus)
    user: str | None = setting(
        USER, "who the workers become (by default rama-ebpf, or else nobody, where root starts them)", default=None
    )
    drain: float = setting(DURATION, "time that live connections have after SIGTERM", default=300.0)
    linger: float | None = setting(DURATION_OR_OFF, "for how long it still accepts after SIGTERM", default=None)
    watchdog: float = setting(DURATION, "a worker that hangs for so long is replaced", default=60.0)
    upgrade_drain: float | None = setting(
        DURATION_OR_OFF, "time that live connections have after an upgrade (without end by default)", default=None
    )
    max_generations: int = setting(
        integer(2, 16), "servers that live at once while they drain after upgrades; the oldest is cut", default=4
    )
    metrics: Endpoint | None = setting(LOOPBACK_ENDPOINT, "where metrics are served (nowhere by default)", default=None)


@dataclass(frozen=True)
class SandboxConfig:
    """Files that workers may open besides those of Python and those that services name; all else is closed to them."""

    read: tuple[str, ...] = setting(ListOf(file_path()), "they may read there", default=())
    write: tuple[str, ...] = setting(ListOf(file_path()), "they may change and make files there", default=())


@dataclass(frozen=True)
class LoggingConfig:
    """What is logged to standard error."""

    level: str = setting(choice("debug", "info", "warning", "error"), "the least that is logged", default="info")
    access: bool = setting(BOOLEAN, "a line for each connection, or HTTP request, when it has ended", default=True)
    format: str = setting(choice("text", "json"), "lines for people, or a JSON object a line", default="text")


@dataclass(frozen=True)
class EgressConfig:
    """Where clients may be connected to. Loopback, private and metadata addresses, and this host's, are denied by
    default."""

    allow: tuple[IPv4Network | IPv6Network, ...] = setting(_NETWORKS, "open these", default=())
    deny: tuple[IPv4Network | IPv6Network, ...] = setting(_NETWORKS, "close these", default=())

    own_addresses: bool = setting(
        BOOLEAN, "this host's own addresses are as others are; or allow one alone, as a.b.c.d", default=False
    )
    own_listeners: bool = setting(BOOLEAN, "and so are the listeners of this very proxy: mind circles", default=False)

    def policy(self) -> EgressPolicy:
        """Return it as connectors take it."""
        return EgressPolicy(self.allow, self.deny, self.own_addresses, self.own_listeners)


@dataclass(frozen=True)
class ResolverConfig:
    """Names to addresses: by /etc/hosts, then by name servers on port 53, which workers may reach whatever egress
    says. Both /etc/hosts and resolv.conf are watched."""

    servers: tuple[str, ...] = setting(
        ListOf(ip_literal()), "name servers (those of resolv.conf by default), at most 8", default=()
    )
    timeout: float = setting(DURATION, "for one name", default=5.0)
    attempts: int = setting(integer(1, 10), "how often each server is asked in that time", default=2)
    cache: int = setting(
        integer(0, 1_000_000),
        "answers kept in each worker, for their TTL: 1h at most, 1m if there is no address; 0: none",
        default=4096,
    )
    per_source: int = setting(
        integer(0, 1024),
        "names of one client (IPv4 address, IPv6 /64) at once; 0: any number",
        default=128,
    )
    system: bool = setting(
        BOOLEAN,
        "ask getaddrinfo(3) instead, for the host's NSS modules: no servers, no cache",
        default=False,
    )
    threads: int = setting(integer(1, 256), "with system: look-ups at once, half of them for one client", default=8)

    def __post_init__(self) -> None:
        if len(self.servers) > MAX_NAME_SERVERS:
            raise ValueError(f"at most {MAX_NAME_SERVERS} servers")
        if self.system and self.servers:
            raise ValueError("system asks the servers of the host's resolv.conf: name none, or leave system out")

    def name_servers(self) -> tuple[IPAddress, ...]:
        """Return the servers that are named here."""
        return tuple(map(ip_address, self.servers))

    def make(self, observe: Callable[[str, float], None] | None = None) -> DnsResolver | SystemLookups:
        """Make the resolver."""
        if self.system:
            return SystemLookups(threads=self.threads, timeout=self.timeout, observe=observe)
        return DnsResolver(
            self.name_servers(),
            timeout=self.timeout,
            attempts=self.attempts,
            cache=self.cache,
            per_source=self.per_source,
            observe=observe,
        )


@dataclass(frozen=True)
class LimitsConfig:
    """Sizes of the policy's tables in the kernel, which cannot grow later, and what one source may hold."""

    max_rules: int | None = setting(integer(16, 1 << 26), "rules, each with any number of sources", default=None)
    max_bans: int | None = setting(
        integer(16, 1 << 26), "bans, of which services make at most seven eighths", default=None
    )
    connections_per_source: int = setting(
        integer(0, 10_000_000),
        "live connections of one source (IPv4 address, IPv6 /64) to a stack, over all workers; 0: any number",
        default=_LIMITS.connections,
    )
    handshakes_per_source: int = setting(
        integer(0, 10_000_000),
        "unfinished TLS handshakes, likewise, and clients of mixed that have not shown what they speak",
        default=_LIMITS.handshakes,
    )
    associations_per_source: int = setting(
        integer(0, 10_000_000), "UDP associations of one source, likewise", default=_LIMITS.associations
    )
    binds_per_source: int = setting(
        integer(0, 10_000_000), "listening sockets (BIND) of one source, likewise", default=_LIMITS.binds
    )
    checks_per_source: int = setting(
        integer(0, 1024),
        "passwords of one source that wait to be checked, in each worker; 0: any number",
        default=_LIMITS.checks,
    )

    def per_source(self) -> SourceLimits:
        """Return what one source may hold."""
        return SourceLimits(
            connections=self.connections_per_source,
            handshakes=self.handshakes_per_source,
            associations=self.associations_per_source,
            binds=self.binds_per_source,
            checks=self.checks_per_source,
        )


@dataclass(frozen=True)
class StackConfig:
    """Layers around a service."""

    service: ServiceSettings = setting(Choice("service", SERVICES), "what is spoken")
    layers: tuple[LayerSettings, ...] = setting(ListOf(Choice("layer", LAYERS)), "outermost first", default=())
    connect: ConnectSettings = setting(Table(ConnectSettings), "how targets are reached", factory=ConnectSettings)

    def __post_init__(self) -> None:
        check_order(self.layers, self.service)


@dataclass(frozen=True, kw_only=True)
class ListenerConfig:
    """An address, or sets of addresses and ports, and the stack that serves them."""

    address: Endpoint | None = setting(ENDPOINT, "where to listen (this, or listen)", default=None, unless="listen")
    listen: tuple[BindingSet, ...] = setting(
        ListOf(BINDING), "prefixes and ranges of ports to serve, steered by the gate", default=()
    )
    transparent: bool = setting(
        BOOLEAN, "with listen: also what is only routed through this host; its routes are made", default=False
    )
    stack: str = setting(TEXT, "the name of a stack")
    relay: str = setting(choice(*(kind.value for kind in RelayKind)), "how tunnels' bytes move", default="auto")
    lossless: tuple[IPv4Network | IPv6Network, ...] = setting(
        _NETWORKS, "networks without loss, where auto may use sockmap", default=()
    )
    survive: bool = setting(
        BOOLEAN, "with wire: tunnels go on when the server ends, and the next one goes on with them", default=False
    )
    gate: str = setting(
        choice("required", "optional"), "optional: serve also where no gate in the kernel guards it", default="required"
    )
    mode: str = setting(choice("600", "660", "666"), "of a Unix socket: who may connect", default="660")

    def __post_init__(self) -> None:
        if self.survive and self.relay != RelayKind.WIRE.value:
            raise ValueError('survive is for tunnels of the wire relay: set relay = "wire", or leave it out')
        if (self.address is None) == (not self.listen):
            raise ValueError('write address = "127.0.0.1:1080", or listen = ["198.18.0.0/16:1-65535"]: one of the two')
        if self.transparent and not self.listen:
            raise ValueError(
                'transparent is for what is routed through this host: name it by listen = ["PREFIX:PORTS"]'
            )
        if self.listen and self.gate == "optional":
            raise ValueError('listen and gate = "optional": nobody but the gate in the kernel serves that')
        if self.listen and self.relay == RelayKind.WIRE.value:
            raise ValueError('listen and relay = "wire": that relay knows single addresses alone; leave relay out')

    @property
    def bindings(self) -> tuple[Binding, ...]:
        """What it is bound to, instead of an address."""
        return tuple(binding for words in self.listen for binding in words.bindings)

    def __str__(self) -> str:
        return ", ".join(map(str, self.listen)) if self.address is None else str(self.address)


@dataclass(frozen=True)
class Config:
    """The whole file."""

    listeners: Mapping[str, ListenerConfig] = setting(MapOf(Table(ListenerConfig)), "by name")
    stacks: Mapping[str, StackConfig] = setting(MapOf(Table(StackConfig)), "by name")
    server: ServerConfig = setting(Table(ServerConfig), "processes", factory=ServerConfig)
    logging: LoggingConfig = setting(Table(LoggingConfig), "log", factory=LoggingConfig)
    policy: PolicyConfig = setting(Table(PolicyConfig), "who may connect", factory=PolicyConfig)
    egress: EgressConfig = setting(Table(EgressConfig), "where to", factory=EgressConfig)
    resolver: ResolverConfig = setting(Table(ResolverConfig), "names", factory=ResolverConfig)
    limits: LimitsConfig = setting(Table(LimitsConfig), "sizes", factory=LimitsConfig)
    routes: tuple[RouteSettings, ...] = setting(
        ListOf(Table(RouteSettings)), "which way out; see routes.md", default=()
    )
    ways: Mapping[str, WaySettings] = setting(MapOf(Choice("way", WAYS)), "by name", factory=dict)
    sandbox: SandboxConfig = setting(Table(SandboxConfig), "workers' files", factory=SandboxConfig)
