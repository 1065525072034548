"""Making services of a configuration, in a worker or to see whether it can be done."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Network, IPv6Network
from typing import Any

from ..core.address import Authority, IPAddress
from ..core.counts import Counts
from ..core.errors import RamaError
from ..core.service import Service, stack
from ..core.shares import Held, SourceLimits, SourceShare
from ..core.stream import Stream
from ..layers.policy import SourceVerdict
from ..layers.strikes import StrikeLimit
from ..services.connect import Egress, Resolver
from ..services.refusal import SourceShareLayer
from .layers import Shared, SourceKeeper, last_header, trusted_peers
from .model import Config, StackConfig
from .reverse import ReverseSettings
from .routes import RouteBook, make_routes

__all__ = ["BuildEnvironment", "build_stack", "check_stack"]


@dataclass(frozen=True)
class BuildEnvironment:
    """What the parts of stacks share. ``directory`` is where modules are looked for first; ``observe_refusal`` is told
    what a source had too much of, which proxies (``exempt``) may have any number of, ``observe_check`` how checks of
    passwords end."""

    policy: SourceKeeper
    secret: bytes
    shared: Shared | None
    resolver: Resolver
    egress: Egress
    directory: str
    call: Callable[[Any], Any]
    limits: SourceLimits = field(default_factory=SourceLimits)
    observe_refusal: Callable[[str], None] | None = None
    observe_check: Callable[[str], None] | None = None
    connector: Service[Authority, Stream] | None = None
    routes: RouteBook | None = None
    route_key: bytes = bytes(32)
    """What the choices of groups are hashed with; the same after a restart."""
    observe_way: Callable[[str, str], None] | None = None
    """Is told the way and the outcome of attempts."""
    exempt: tuple[IPv4Network | IPv6Network, ...] = ()
    counts: Counts | None = None
    """What sources hold, over all workers; each worker makes it before anything else that is shared."""
    stack: str = ""
    starts: list[Callable[[], None]] = field(default_factory=list)
    closes: list[Callable[[], None]] = field(default_factory=list)

    def on_start(self, start: Callable[[], None], /) -> None:
        """Call ``start`` in the event loop before the first connection."""
        self.starts.append(start)

    def on_close(self, close: Callable[[], None], /) -> None:
        """Call ``close`` after the last."""
        self.closes.append(close)

    def share(self, held: Held, /) -> SourceShare:
        """Return the count of what sources hold of this in this stack, for all workers, of other configurations too."""
        counts = None if held is Held.CHECKS else self.counts
        return SourceShare(
            held,
            self.limits.of(held),
            counts=counts,
            label=self.stack,
            observe=self.observe_refusal,
            exempt=self.exempt,
        )

    def load(self, target: str) -> Any:
        """Import ``module:attribute``. Raises ValueError naming what is missing."""
        if self.directory not in sys.path:
            sys.path.insert(0, self.directory)
        module_name, _, attribute = target.partition(":")
        try:
            found: Any = importlib.import_module(module_name)
            for name in attribute.split("."):
                found = getattr(found, name)
        except (ImportError, AttributeError) as error:
            raise ValueError(f"cannot load {target}: {error}") from error
        return found


def build_stack(config: StackConfig, environment: BuildEnvironment) -> Service[Stream, Any]:
    """Compose one stack. Raises :class:`~rama_ebpf.core.errors.StackError`, ValueError, OSError or RamaError."""
    environment = replace(environment, exempt=trusted_peers(config.service))
    connector = config.connect.make(environment, routed=not isinstance(config.service, ReverseSettings))
    service = config.service.make(environment, connector)
    layers = [layer.make(replace(environment, connector=connector)) for layer in config.layers]
    if environment.limits.connections:
        limit = SourceShareLayer(environment.share(Held.CONNECTIONS))
        # Inside the layer that learns who the client is: a balancer brings everybody's connections.
        layers.insert(1 + last_header(config.layers), limit)
    return stack(*layers, service)


class _NoClients:
    async def verdict(self, ip: IPAddress, port: int, /) -> SourceVerdict:
        raise AssertionError("a stack that is only checked serves nobody")

    async def strike(
        self, ip: IPAddress, limit: StrikeLimit, /, *, reason: str, spared: IPAddress | None = None
    ) -> None:
        raise AssertionError("a stack that is only checked serves nobody")


def check_stack(config: Config, stack_config: StackConfig, directory: str) -> None:
    """Compose a stack and throw it away. Raises like :func:`build_stack`."""
    resolver = config.resolver.make()

    def only_look(factory: Any) -> Any:
        if not callable(factory):
            raise RamaError(f"{factory!r} is neither a service nor a function that makes one")

        async def stand_in(stream: Stream) -> None:
            raise AssertionError("a stack that is only checked serves nobody")

        return stand_in

    environment = BuildEnvironment(
        _NoClients(),
        bytes(32),
        None,
        resolver,
        config.egress.policy(),
        directory,
        only_look,
        routes=make_routes(config.routes, config.ways),
    )
    try:
        build_stack(stack_config, environment)
    finally:
        resolver.close()
