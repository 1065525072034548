"""Moving a tunnel's bytes: one function, several ways."""

from __future__ import annotations

from ..core.lifecycle import Lifecycle, Stage
from ..core.stream import Stream
from .copy import copy
from .handler import Move, TunnelHandler
from .tunnel import CloseReason, TunnelLimits, TunnelReport

__all__ = ["CloseReason", "Move", "TunnelHandler", "TunnelLimits", "TunnelReport", "relay"]


async def relay(client: Stream, upstream: Stream, limits: TunnelLimits | None = None) -> TunnelReport:
    """Relay bytes between ``client`` and ``upstream`` until the tunnel ends, and say how it ended.

    ``limits`` defaults to the :class:`TunnelLimits` among the client's extensions, or else to its defaults. Both
    streams are closed on return. The report is also appended to the client's extensions, on cancellation too, where
    the layers outside find it. A :class:`TunnelHandler` among the client's extensions is given the streams first.
    """
    Lifecycle.of(client.extensions).reached(Stage.TUNNEL)
    bounds = limits or client.extensions.get(TunnelLimits) or TunnelLimits()

    async def move(client: Stream, upstream: Stream) -> TunnelReport:
        return await copy(client, upstream, bounds)

    handler = client.extensions.get(TunnelHandler)
    if handler is None:
        return await move(client, upstream)
    try:
        return await handler.handle(client, upstream, move)
    except BaseException:
        client.abort()
        upstream.abort()
        raise
