"""What runs in each worker of ``rama-ebpf run``: the operator's application, with what the server adds to it.

Every connection is counted for ``status`` and has one line in the access log. Where the policy is not in the kernel,
each client is judged here, by asking the server process, which holds the policy and its counters for all workers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

from ..core.address import IPAddress
from ..core.client import client_address
from ..core.errors import PolicyDenied
from ..core.service import Service, stack
from ..core.stream import Stream
from ..layers.access_log import AccessLogLayer
from ..loader import AcceptCounter
from ..policy.egress import EgressPolicy
from ..policy.rule import Action, Stage, Verdict, parse_network
from ..process import Application, WorkerContext
from ..process.channel import Channel
from ..process.context import load_application
from ..relay import TunnelLimits
from ..services.connect import Connector, SystemResolver
from ..services.proxy import mixed_proxy

__all__ = ["ServerPolicy", "ServerPolicyLayer", "application", "default_proxy"]


class ServerPolicy:
    """The server's policy, asked over the worker's channel."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    async def verdict(self, source: IPAddress, port: int) -> Verdict:
        """Judge, and count, one connection. Raises :class:`~rama_ebpf.core.errors.PeerClosed` if the server ended."""
        answer = await self._channel.request("verdict", {"source": str(source), "port": port})
        return Verdict(Action(int(str(answer["action"]))), Stage(int(str(answer["stage"]))), str(answer["rule"]))

    async def ban(self, source: IPAddress, *, ttl: float, reason: str) -> None:
        """Shut an address out, in the kernel where the gate is; in force when this returns."""
        await self._channel.request("ban", {"source": str(source), "ttl": ttl, "reason": reason})


class ServerPolicyLayer:
    """Refuses streams whose client the server's policy does not allow. Raises :class:`PolicyDenied`."""

    accepts = Stream

    def __init__(self, policy: ServerPolicy) -> None:
        self._policy = policy

    def __call__(self, inner: Service[Stream, Any]) -> Service[Stream, Any]:
        async def serve(stream: Stream) -> Any:
            client, local = client_address(stream), stream.local
            if client is not None:
                verdict = await self._policy.verdict(client.ip, 0 if local is None else local.port)
                if not verdict.allowed:
                    raise PolicyDenied(f"policy refuses {client.ip} (rule {verdict.rule})", rule=verdict.rule)
            return await inner(stream)

        return serve


def application(context: WorkerContext) -> Application:
    """Load the operator's application and put the server's layers around its services."""
    params = context.params
    inner_context = replace(context, params=cast("Mapping[str, object]", params["params"]))
    inner = load_application(str(params["target"]), cast("str | None", params["directory"]), inner_context)
    layers: list[object] = [AccessLogLayer()]
    if params["judge"]:
        layers.append(ServerPolicyLayer(ServerPolicy(context.channel)))
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
    return replace(inner, services=services, on_accept=on_accept)


def default_proxy(context: WorkerContext) -> Application:
    """The application that is served if the operator names none: see :func:`~rama_ebpf.services.proxy.mixed_proxy`."""
    params = cast("Mapping[str, Any]", context.params)
    egress = EgressPolicy(
        tuple(parse_network(cidr) for cidr in params["allow_egress"]),
        tuple(parse_network(cidr) for cidr in params["deny_egress"]),
    )
    resolver = SystemResolver()
    proxy = mixed_proxy(
        Connector(resolver, egress, timeout=params["connect_timeout"]),
        handshake_timeout=params["handshake_timeout"],
        tunnel_limits=TunnelLimits(idle=params["idle_timeout"]),
    )
    return Application(dict.fromkeys(context.listeners, proxy), close=resolver.close)
