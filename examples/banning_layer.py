"""A layer of one's own that bans in the kernel: whoever asks for a port that only scanners ask for is out at once::

rama-ebpf run banning_layer:proxy
"""

from __future__ import annotations

import logging

from rama_ebpf.core import Authority, Service, Stream, client_address, stack
from rama_ebpf.core.matchers import Matcher, TargetPort
from rama_ebpf.layers.strikes import Banner
from rama_ebpf.process import WorkerContext
from rama_ebpf.relay import TunnelReport
from rama_ebpf.services.socks5 import Socks5Server

log = logging.getLogger("tripwire")


class TripwireLayer:
    """Bans the client of a stream whose target ``wire`` matches, for ``ban`` seconds, when the stream has ended."""

    accepts = Stream

    def __init__(self, banner: Banner, wire: Matcher, *, ban: float) -> None:
        self._banner = banner
        self._wire = wire
        self._ban = ban

    def __call__(self, inner: Service[Stream, TunnelReport]) -> Service[Stream, TunnelReport]:
        async def serve(stream: Stream) -> TunnelReport:
            try:
                return await inner(stream)
            finally:
                client = client_address(stream)
                if client is not None and self._wire(stream):
                    target = stream.extensions.require(Authority)
                    log.warning("%s asked for %s", client, target)
                    await self._banner.ban(client.ip, ttl=self._ban, reason=f"asked for port {target.port}")

        return serve


def proxy(context: WorkerContext) -> Service[Stream, TunnelReport]:
    """Telnet, SMB and remote desktop are no business of this proxy's clients."""
    return stack(TripwireLayer(context.policy, TargetPort(23, 445, 3389), ban=3600), Socks5Server(context.connector()))
