"""The upgrade that relays: the client's stream is joined to an upstream's and the bytes are none of our business."""

from __future__ import annotations

from ...core.stream import Stream
from ...relay import TunnelLimits, relay

__all__ = ["Tunnel"]


class Tunnel:
    """An :class:`~.model.Upgrade` to a tunnel with ``upstream``; ``limits`` as for :func:`rama_ebpf.relay.relay`."""

    def __init__(self, upstream: Stream, limits: TunnelLimits | None = None) -> None:
        self._upstream: Stream | None = upstream
        self._limits = limits

    async def run(self, client: Stream) -> None:
        """Relay until the tunnel ends; both streams are closed then."""
        upstream, self._upstream = self._upstream, None
        assert upstream is not None
        await relay(client, upstream, self._limits)

    def abandon(self) -> None:
        if self._upstream is not None:
            self._upstream.abort()
            self._upstream = None
