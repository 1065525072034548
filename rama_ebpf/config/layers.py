"""The layers that a configuration can name, and their settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network
from typing import Any, Final, Protocol

from ..core.address import Authority
from ..core.counts import SharesCounts
from ..core.matchers import ANY, Matcher, Source, TargetHost, TargetNetwork, TargetPort
from ..core.proven import SharesProven
from ..core.service import Layer, Service
from ..core.shares import Held, SourceShare
from ..core.stream import Stream
from ..layers.concurrency import ConcurrencyLimitLayer
from ..layers.hijack import FilterLayer
from ..layers.policy import PolicyLayer, SourcePolicy
from ..layers.rate import RateLimitLayer, SharesBuckets
from ..layers.source import Key, by_source
from ..layers.strikes import StrikeKeeper, StrikeLayer
from ..layers.throttle import Bandwidth, ThrottleLayer
from ..layers.timeout import TimeoutLayer
from ..layers.trace import TraceLayer
from ..process.ways import SharedBoard
from ..services.connect import Egress, Resolver
from ..services.proxy_protocol import ProxyHeader, ProxyProtocolLayer
from .decode import ListOf, setting
from .kinds import (
    BOOLEAN,
    DURATION,
    DURATION_OR_OFF,
    HOST_PATTERN,
    NETWORK,
    PORT,
    RATE,
    SIZE,
    TARGET,
    Kind,
    Rate,
    choice,
    integer,
)
from .tls import TlsSettings, TlsTunnelSettings

__all__ = [
    "LAYERS",
    "Environment",
    "LayerSettings",
    "Shared",
    "SourceKeeper",
    "TargetsSettings",
    "check_order",
    "last_header",
    "trusted_peers",
]

_PER: Final[Kind[str]] = choice("listener", "source")


class SharesBoard(Protocol):
    """Who keeps the health of ways for several processes."""

    def board(self) -> SharedBoard: ...


class Shared(SharesCounts, SharesBuckets, SharesProven, SharesBoard, Protocol):
    """What counts for all workers together."""


class SourceKeeper(StrikeKeeper, SourcePolicy, Protocol):
    """Who judges sources, counts their strikes and bans them."""


class Environment(Protocol):
    """What layers and services of a configuration find where they run."""

    @property
    def policy(self) -> SourceKeeper: ...

    @property
    def secret(self) -> bytes:
        """32 random bytes that all workers share."""

    @property
    def shared(self) -> Shared | None: ...

    @property
    def resolver(self) -> Resolver: ...

    @property
    def egress(self) -> Egress: ...

    def share(self, held: Held, /) -> SourceShare:
        """Return a new count of what each source holds."""

    @property
    def observe_check(self) -> Callable[[str], None] | None:
        """Is told how checks of passwords end."""

    @property
    def connector(self) -> Service[Authority, Stream] | None:
        """How the stack's targets are reached."""

    def load(self, target: str) -> Any:
        """Import ``module:attribute``."""


class LayerSettings(Protocol):
    """The settings of one layer, which make it."""

    def make(self, environment: Environment) -> Layer: ...


def _key(per: str) -> Key | None:
    return by_source() if per == "source" else None


@dataclass(frozen=True)
class TimeoutSettings:
    """Time-outs of a connection and of the tunnel that it becomes."""

    handshake: float | None = setting(DURATION_OR_OFF, "from accept until the protocol is established", default=10.0)
    idle: float | None = setting(DURATION_OR_OFF, "without a byte in either direction", default=300.0)
    total: float | None = setting(DURATION, "age of a connection (none by default)", default=None)

    def make(self, environment: Environment) -> Layer:
        return TimeoutLayer(self.handshake, idle=self.idle, total=self.total)


@dataclass(frozen=True)
class ConcurrencySettings:
    """How many connections are served at once."""

    limit: int = setting(integer(1, 10_000_000), "connections")
    per: str = setting(_PER, "what the limit is for", default="listener")
    wait: float | None = setting(
        DURATION, "how long one above the limit waits (refused at once by default)", default=None
    )

    def make(self, environment: Environment) -> Layer:
        return ConcurrencyLimitLayer(self.limit, key=_key(self.per), wait=self.wait or 0.0, shared=environment.shared)


@dataclass(frozen=True)
class RateSettings:
    """How many connections are let in over time."""

    rate: Rate = setting(RATE, "connections over time")
    burst: int = setting(integer(1, 1_000_000), "connections at once", default=10)
    per: str = setting(_PER, "what the rate is for", default="listener")
    wait: float | None = setting(DURATION, "longest delay (refused at once by default)", default=None)

    def make(self, environment: Environment) -> Layer:
        return RateLimitLayer(
            self.rate.per_second, burst=self.burst, key=_key(self.per), wait=self.wait or 0.0, shared=environment.shared
        )


@dataclass(frozen=True)
class ThrottleSettings:
    """Bandwidth in bytes a second."""

    up: int | None = setting(SIZE, "from the client, a second", default=None)
    down: int | None = setting(SIZE, "to the client, a second", default=None)
    shared: bool = setting(BOOLEAN, "whether all connections of a worker share it", default=False)

    def make(self, environment: Environment) -> Layer:
        if self.shared:
            return ThrottleLayer(
                up=None if self.up is None else Bandwidth(self.up),
                down=None if self.down is None else Bandwidth(self.down),
            )
        return ThrottleLayer(up=self.up, down=self.down)


@dataclass(frozen=True)
class StrikesSettings:
    """Ban a source in the kernel that fails again and again."""

    strikes: int = setting(integer(1, 10_000), "failures", default=5)
    window: float = setting(DURATION, "within this time", default=60.0)
    ban: float = setting(DURATION, "how long the ban lasts", default=3600.0)

    def make(self, environment: Environment) -> Layer:
        return StrikeLayer(environment.policy, strikes=self.strikes, window=self.window, ban=self.ban)


@dataclass(frozen=True)
class ProxyProtocolSettings:
    """Read the PROXY header of load balancers in front; rules and bans then judge the client that it names."""

    trusted: tuple[IPv4Network | IPv6Network, ...] = setting(ListOf(NETWORK), "who may send one")
    require: bool = setting(BOOLEAN, "refuse everybody else", default=True)

    def __post_init__(self) -> None:
        if not self.trusted:
            raise ValueError("trusted names nobody, so nobody's header is read: name the balancers' networks")

    def make(self, environment: Environment) -> Layer:
        reads = ProxyProtocolLayer(map(str, self.trusted), require=self.require)
        judges = PolicyLayer(environment.policy)

        def layer(inner: Service[Stream, Any], /) -> Service[Stream, Any]:
            judged = judges(inner)

            async def serve(stream: Stream) -> Any:
                # The kernel has judged the balancer. Who comes without one, or a balancer itself, it has judged, too.
                header = stream.extensions.get(ProxyHeader)
                named = header is not None and header.source is not None
                return await (judged if named else inner)(stream)

            return reads(serve)

        return layer


@dataclass(frozen=True)
class TraceSettings:
    """Log every call at the level debug."""

    def make(self, environment: Environment) -> Layer:
        return TraceLayer()


@dataclass(frozen=True)
class SourcesSettings:
    """Serve only clients of these networks; rules of the policy do the same in the kernel."""

    allow: tuple[IPv4Network | IPv6Network, ...] = setting(ListOf(NETWORK), "the networks")

    def make(self, environment: Environment) -> Layer:
        return FilterLayer(Source(*map(str, self.allow)), "sources")


@dataclass(frozen=True)
class CustomSettings:
    """A layer of your own."""

    target: str = setting(TARGET, "a layer, or a class of layers that needs no arguments")

    def make(self, environment: Environment) -> Layer:
        found = environment.load(self.target)
        layer: Layer = found() if isinstance(found, type) else found
        return layer


@dataclass(frozen=True)
class TargetsSettings:
    """Which targets may be asked for. What no setting allows is refused; what ``deny_*`` names too."""

    allow_hosts: tuple[str, ...] = setting(ListOf(HOST_PATTERN), "names (all by default)", default=())
    allow_ports: tuple[int, ...] = setting(ListOf(PORT), "ports (all by default)", default=())
    deny_hosts: tuple[str, ...] = setting(ListOf(HOST_PATTERN), "names", default=())
    deny_networks: tuple[IPv4Network | IPv6Network, ...] = setting(
        ListOf(NETWORK), "addresses that clients name (resolved ones are judged by egress)", default=()
    )
    deny_ports: tuple[int, ...] = setting(ListOf(PORT), "ports", default=())

    def make(self, environment: Environment) -> Layer:
        matcher: Matcher = ANY
        if self.allow_hosts:
            matcher = matcher & TargetHost(*self.allow_hosts)
        if self.allow_ports:
            matcher = matcher & TargetPort(*self.allow_ports)
        if self.deny_hosts:
            matcher = matcher & ~TargetHost(*self.deny_hosts)
        if self.deny_networks:
            matcher = matcher & ~TargetNetwork(*map(str, self.deny_networks))
        if self.deny_ports:
            matcher = matcher & ~TargetPort(*self.deny_ports)
        return FilterLayer(matcher, "targets")


def last_header(layers: Sequence[LayerSettings]) -> int:
    """Return the index of the layer that reads the PROXY header, -1 where there is none."""
    return max((index for index, layer in enumerate(layers) if isinstance(layer, ProxyProtocolSettings)), default=-1)


def trusted_peers(service: object) -> tuple[IPv4Network | IPv6Network, ...]:
    """Return the proxies in front that a service believes, each of which comes for many clients."""
    return tuple(getattr(service, "trusted", ()))


def check_order(layers: Sequence[LayerSettings], service: object = None) -> None:
    """Raise ValueError for an order of layers (outermost first) that cannot do what it says around a service."""
    if trusted_peers(service):
        for layer in layers:
            if isinstance(layer, (RateSettings, ConcurrencySettings)) and layer.per == "source":
                raise ValueError(
                    f'{layer_name(layer)} per "source" would count the proxies that the service trusts: '
                    f'let it count per "listener", or let them send a PROXY header instead'
                )
    at = [index for index, layer in enumerate(layers) if isinstance(layer, ProxyProtocolSettings)]
    if not at:
        return
    if len(at) > 1:
        raise ValueError("proxy-protocol stands twice: a connection begins with one header")
    for layer in layers[: at[0]]:
        if isinstance(layer, (TlsSettings, TlsTunnelSettings)):
            raise ValueError("put proxy-protocol before tls: the header comes before the TLS handshake")
        if isinstance(layer, (RateSettings, ConcurrencySettings)) and layer.per == "source":
            raise ValueError('put proxy-protocol before limits per "source": they would count the balancer')


def layer_name(layer: LayerSettings) -> str:
    """Return what a configuration calls a layer."""
    return next(name for name, type_ in LAYERS.items() if isinstance(layer, type_))


LAYERS: Final[Mapping[str, type]] = {
    "concurrency": ConcurrencySettings,
    "custom": CustomSettings,
    "proxy-protocol": ProxyProtocolSettings,
    "rate": RateSettings,
    "sources": SourcesSettings,
    "strikes": StrikesSettings,
    "throttle": ThrottleSettings,
    "timeout": TimeoutSettings,
    "tls": TlsSettings,
    "tls-tunnel": TlsTunnelSettings,
    "trace": TraceSettings,
}
"""Layers around a protocol, by name."""
