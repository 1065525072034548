"""Moving a tunnel's bytes: one function, several ways."""

from __future__ import annotations

import logging

from ..core.lifecycle import Lifecycle, Stage
from ..core.socket_stream import SocketStream
from ..core.stream import Stream
from .choice import choose
from .copy import copy
from .engine import Engine
from .handler import Move, TunnelHandler
from .options import RelayKind, RelayOptions, TunnelLimits
from .registry import FlowSnapshot, TunnelRegistry, tunnels
from .report import CloseReason, DirectionOutcome, TunnelReport
from .tunnel import Tunnel

__all__ = [
    "CloseReason",
    "DirectionOutcome",
    "FlowSnapshot",
    "Move",
    "RelayKind",
    "RelayOptions",
    "TunnelHandler",
    "TunnelLimits",
    "TunnelRegistry",
    "TunnelReport",
    "relay",
    "tunnels",
]

log = logging.getLogger(__name__)


async def relay(client: Stream, upstream: Stream, limits: TunnelLimits | None = None) -> TunnelReport:
    """Relay bytes between ``client`` and ``upstream`` until the tunnel ends, and say how it ended.

    ``limits`` defaults to the :class:`TunnelLimits` among the client's extensions, or else to its defaults; which way
    the bytes move follows the :class:`RelayOptions` there. Both streams are closed on return: in order after
    :attr:`CloseReason.EOF`, else aborted (TCP: RST), so that a truncated stream never looks complete. If the caller
    is cancelled both are aborted and the cancellation goes on. The report is also appended to the client's
    extensions, on cancellation too, where the layers outside find it. A :class:`TunnelHandler` among the client's
    extensions is given the streams first.
    """
    Lifecycle.of(client.extensions).reached(Stage.TUNNEL)
    bounds = limits or client.extensions.get(TunnelLimits) or TunnelLimits()
    options = client.extensions.get(RelayOptions) or RelayOptions()
    handler = client.extensions.get(TunnelHandler)
    if handler is None:
        return await _move(client, upstream, bounds, options)

    async def move(client: Stream, upstream: Stream) -> TunnelReport:
        return await _move(client, upstream, bounds, options)

    try:
        return await handler.handle(client, upstream, move)
    except BaseException:
        client.abort()
        upstream.abort()
        raise


async def _move(client: Stream, upstream: Stream, limits: TunnelLimits, options: RelayOptions) -> TunnelReport:
    why = "not a plain socket"
    if isinstance(client, SocketStream) and isinstance(upstream, SocketStream):
        engine = Engine.current()
        try:
            tunnel = engine.open(client, upstream, choose(client, upstream, options), limits)
        except OSError as error:
            engine.unwatched += 1
            why = f"the kernel watches no more sockets: {error.strerror}"
        else:
            return await _completion(client, upstream, tunnel)
    return await copy(client, upstream, limits, why=why)


async def _completion(client: SocketStream, upstream: SocketStream, tunnel: Tunnel) -> TunnelReport:
    tunnels.add(tunnel)
    try:
        await tunnel.end()
    finally:
        tunnel.cut()  # does nothing unless the caller was cancelled
        report = tunnel.report()
        client.bytes_received += report.to_upstream
        client.bytes_sent += report.to_client
        upstream.bytes_received += report.to_client
        upstream.bytes_sent += report.to_upstream
        client.extensions.add(report)
        tunnels.remove(tunnel, report)
        log.debug("%s -> %s: %s", tunnel.source, tunnel.target, report)
    return report
