"""What a worker gives the application that it loads, and what it gets back."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..core.errors import RamaError
from ..core.service import Service
from ..core.shares import Held, SourceShare
from ..core.stream import Stream
from ..policy.egress import EgressPolicy
from ..services.connect import Connector, Egress
from ..services.resolver import DnsResolver
from ..services.socket_options import SocketOptions
from .channel import Channel
from .plan import Json
from .policy import ServerPolicy
from .shared import SharedTable

__all__ = ["Application", "TargetError", "WorkerContext", "load_application"]


class TargetError(RamaError):
    """The application cannot be loaded: the text names what was looked for and where."""

    kind = "target"


@dataclass(frozen=True)
class WorkerContext:
    """Where an application runs.

    ``worker`` counts from 0 to ``workers`` - 1 and is the same for a replacement. ``listeners`` are the names and the
    indexes of the sockets on which this worker accepts. ``fds`` are the plan's descriptors, numbered as in this
    process. The application is made before privileges are dropped, so that it may read keys, and before the event
    loop runs.

    ``observe_lookups`` is for a resolver of the application's own: where metrics are kept, it counts there. So does
    ``observe_refusal``, for a :class:`~rama_ebpf.core.shares.SourceShare`, and ``observe_check``, for a
    :class:`~rama_ebpf.layers.check_queue.CheckQueue`, and ``observe_way``, for a
    :class:`~rama_ebpf.services.route.RouteConnector`.

    ``policy`` judges and bans sources, ``egress`` says where targets may be, and :meth:`connector` dials them.
    ``secret`` is 32 random bytes that all workers of this server share, replacements too, and nobody else: for
    session tickets and the like. Limits that are given ``shared`` hold for all workers together.
    """

    worker: int
    workers: int
    params: Json
    listeners: Mapping[str, tuple[int, ...]]
    fds: Mapping[str, int]
    channel: Channel
    secret: bytes
    shared: SharedTable
    egress: Egress = field(default_factory=EgressPolicy)
    resolver: DnsResolver = field(default_factory=DnsResolver)
    observe_lookups: Callable[[str, float], None] | None = None
    observe_refusal: Callable[[str], None] | None = None
    observe_check: Callable[[str], None] | None = None
    observe_way: Callable[[str, str], None] | None = None

    def share(self, held: Held, limit: int | None = None) -> SourceShare:
        """Return a new count of what each source holds, ``limit`` at most (None: as is usual, 0: any number), for all
        workers."""
        shared = None if held is Held.CHECKS else self.shared
        return SourceShare(held, limit, shared=shared, observe=self.observe_refusal)

    @property
    def policy(self) -> ServerPolicy:
        """The server's policy for sources."""
        return ServerPolicy(self.channel)

    def connector(
        self,
        *,
        timeout: float = 10.0,
        source_v4: str | None = None,
        source_v6: str | None = None,
        options: SocketOptions | None = None,
    ) -> Connector:
        """A connector under the server's egress policy; arguments as :class:`~rama_ebpf.services.connect.Connector`
        has them."""
        return Connector(
            self.resolver,
            self.egress,
            timeout=timeout,
            source_v4=source_v4,
            source_v6=source_v6,
            options=SocketOptions() if options is None else options,
        )


@dataclass
class Application:
    """Services by the name of their listener, and what goes with them.

    ``on_accept`` is called with the name of the listener for each accepted connection. ``start`` and ``close`` are
    called in the running event loop, before the first connection and after the last; ``drain`` in between, when the
    worker accepts no more and what is live is to end.
    """

    services: Mapping[str, Service[Stream, Any]]
    on_accept: Callable[[str], None] | None = None
    start: Callable[[], None] = field(default=lambda: None)
    close: Callable[[], None] = field(default=lambda: None)
    drain: Callable[[], None] = field(default=lambda: None)


def load_application(target: str, directory: str | None, context: WorkerContext) -> Application:
    """Import ``module:attribute`` and make the application of it. Raises :class:`TargetError`, or what the
    application itself raises."""
    if directory is not None and directory not in sys.path:
        sys.path.insert(0, directory)
    module_name, _, attribute = target.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name == error.name or module_name.startswith(error.name + ".")):
            raise  # the module is there, but one that it imports is not: that text says more
        raise TargetError(f"no module {module_name!r} in {', '.join(filter(None, sys.path))}") from error
    found: Any = module
    for name in attribute.split("."):
        if not hasattr(found, name):
            raise TargetError(f"module {module_name!r} ({module.__file__}) has no {attribute!r}")
        found = getattr(found, name)
    made = found if _is_service(found) else _call(found, target, context)
    if isinstance(made, Application):
        return made
    if not _is_service(made):
        raise TargetError(f"{target} is no service (an async callable) and makes none, but {made!r}")
    return Application(dict.fromkeys(context.listeners, made))


def _is_service(value: Any) -> bool:
    return inspect.iscoroutinefunction(value) or (
        not isinstance(value, type) and inspect.iscoroutinefunction(getattr(value, "__call__", None))  # noqa: B004
    )


def _call(factory: Any, target: str, context: WorkerContext) -> Any:
    if not callable(factory):
        raise TargetError(f"{target} is {factory!r}: it must be a service or a function that makes one")
    return factory(context) if inspect.signature(factory).parameters else factory()
