"""The smallest service that makes a tunnel of a stream, for tests of layers around tunnels."""

from __future__ import annotations

from rama_ebpf.core import Authority, Stream
from rama_ebpf.policy.egress import EgressPolicy
from rama_ebpf.relay import TunnelReport, relay
from rama_ebpf.services.connect import Connector, SystemResolver


class TunnelTo:
    """Relays every stream to one port of this host."""

    accepts = Stream

    def __init__(self, port: int) -> None:
        self._target = Authority.of("127.0.0.1", port)
        self._connect = Connector(SystemResolver(threads=1), EgressPolicy.of(["127.0.0.1/32"]))

    async def __call__(self, stream: Stream, /) -> TunnelReport:
        stream.extensions.add(self._target)
        return await relay(stream, await self._connect(self._target))
