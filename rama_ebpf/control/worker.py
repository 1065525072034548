"""What runs in each worker of ``rama-ebpf run``: the operator's application, with what the server adds to it.

Every connection is counted for ``status`` and, where that is wanted, in the metrics, and has a line in the access log.
Where the policy is not in the kernel,
each client is judged here, by asking the server process, which holds the policy and its counters for all workers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from ipaddress import ip_address
from typing import Any, TypeVar, cast

import msgspec

from ..core.binding import Binding
from ..core.request_log import RequestRecord
from ..core.service import Service, stack
from ..core.shares import Held
from ..core.stream import Stream
from ..layers.access_log import AccessLogLayer, AccessRecord, log_record
from ..layers.auth import PasswordFile
from ..layers.check_queue import CheckQueue
from ..layers.metrics import MetricsLayer
from ..layers.policy import PolicyLayer
from ..loader import AcceptCounter
from ..policy.egress import EgressPolicy, HostEgress, OwnHost
from ..policy.rule import parse_network
from ..process import Application, WorkerContext
from ..process.context import load_application
from ..relay import TunnelLimits
from ..services.proxy import mixed_proxy
from ..services.refusal import SourceShareLayer
from ..services.socks5 import UdpAssociator
from .refusals import RefusalReporter, new_id
from .worker_relay import serve_relay

__all__ = ["application", "default_proxy"]


T = TypeVar("T", AccessRecord, RequestRecord)


def _both(one: Callable[[T], None], other: Callable[[T], None]) -> Callable[[T], None]:
    def call(record: T) -> None:
        one(record)
        other(record)

    return call


class _OwnAddresses(msgspec.Struct):
    networks: list[str]


def _egress(said: Mapping[str, Any]) -> EgressPolicy:
    networks = {name: map(parse_network, said[name]) for name in ("allow", "deny", "networks")}
    listeners = frozenset((ip_address(ip), port) for ip, port in said["listeners"])
    bindings = tuple(Binding(parse_network(network), first, last) for network, first, last in said["bindings"])
    return EgressPolicy(
        tuple(networks["allow"]),
        tuple(networks["deny"]),
        said["own_addresses"],
        said["own_listeners"],
        OwnHost(frozenset(networks["networks"]), listeners, bindings),
    )


def application(context: WorkerContext) -> Application:
    """Load the operator's application and put the server's layers around its services."""
    params = context.params
    egress = HostEgress(_egress(cast("Mapping[str, Any]", params["egress"])))
    context.channel.on("own_addresses", lambda body: egress.follow(map(parse_network, body.networks)), _OwnAddresses)
    inner_context = replace(
        context,
        params=cast("Mapping[str, object]", params["params"]),
        egress=egress,
    )
    inner = load_application(str(params["target"]), cast("str | None", params["directory"]), inner_context)
    layers: list[object] = []
    if params["metrics"]:
        layers.append(MetricsLayer())
    refusals = RefusalReporter(context.channel)
    layers.append(
        AccessLogLayer(
            _both(log_record, refusals.connection) if params["access_log"] else refusals.connection,
            request_sink=_both(log_record, refusals.request) if params["access_log"] else refusals.request,
            first_sink=refusals.first_bytes,
            failures_only=not params["access_log"],
            new_id=new_id,
        )
    )
    if params["judge"]:
        layers.append(PolicyLayer(context.policy))
    counters = {
        name: AcceptCounter(context.fds["accepted"], slot + context.worker)
        for name, slot in cast("Mapping[str, int]", params["accept_slots"]).items()
    }

    def on_accept(name: str) -> None:
        if name in counters:
            counters[name].increment()
        if inner.on_accept is not None:
            inner.on_accept(name)

    services = {name: stack(*layers, service) for name, service in inner.services.items()}
    let_go: list[Callable[[], None]] = []

    def start() -> None:
        let_go.append(serve_relay(context.channel, context.fds, services, ask=bool(params["sockmap"])))
        inner.start()

    def drain() -> None:
        for call in let_go:
            call()
        inner.drain()

    return replace(inner, services=services, on_accept=on_accept, start=start, drain=drain)


def default_proxy(context: WorkerContext) -> Service[Stream, Any]:
    """The service if the operator names none: see :func:`~rama_ebpf.services.proxy.mixed_proxy`."""
    params = cast("Mapping[str, Any]", context.params)
    auth = None
    if params["users"] is not None:
        queue = CheckQueue(share=context.share(Held.CHECKS), observe=context.observe_check)
        auth = PasswordFile(params["users"], queue=queue, proven=context.shared.proven())
    return stack(
        SourceShareLayer(context.share(Held.CONNECTIONS, params["connections_per_source"])),
        mixed_proxy(
            context.connector(timeout=params["connect_timeout"]),
            auth=auth,
            udp=UdpAssociator(context.resolver, context.egress, share=context.share(Held.ASSOCIATIONS)),
            handshake_timeout=params["handshake_timeout"],
            tunnel_limits=TunnelLimits(idle=params["idle_timeout"]),
            handshakes=context.share(Held.HANDSHAKES),
        ),
    )
