"""Moving a tunnel's bytes: one function, several ways."""

from __future__ import annotations

import logging
from dataclasses import replace

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
from .wire import Wire, WireTunnel

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


async def relay(
    client: Stream, upstream: Stream, limits: TunnelLimits | None = None, *, reply: bytes = b""
) -> TunnelReport:
    """Relay bytes between ``client`` and ``upstream`` until the tunnel ends, and say how it ended.

    ``reply`` is what the client is told first. Who has one gives it here and does not write it: the wire relay takes
    tunnels over before their clients speak.

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
    if handler is None and options.kind is RelayKind.WIRE:
        return await _by_wire(client, upstream, bounds, options, reply)
    if reply:
        try:
            await client.write(reply)
        except BaseException:
            client.abort()
            upstream.abort()
            raise
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


async def _by_wire(
    client: Stream, upstream: Stream, limits: TunnelLimits, options: RelayOptions, reply: bytes
) -> TunnelReport:
    taken = await Wire.current().take(client, upstream, reply, limits)
    if isinstance(taken, WireTunnel):
        return await _completion(client, upstream, taken)
    return await _move(client, upstream, limits, replace(options, kind=RelayKind.AUTO), f"no wire: {taken}")


async def _move(
    client: Stream, upstream: Stream, limits: TunnelLimits, options: RelayOptions, instead: str = ""
) -> TunnelReport:
    """``instead`` says why the tunnel goes another way than it should."""
    why = instead or "not a plain socket"
    if isinstance(client, SocketStream) and isinstance(upstream, SocketStream):
        choice, engine = choose(client, upstream, options), Engine.current()
        if instead:
            choice = replace(choice, why=instead)
        try:
            tunnel = engine.open(client, upstream, choice, limits)
        except OSError as error:
            engine.unwatched += 1
            why = f"the kernel watches no more sockets: {error.strerror}"
        else:
            return await _completion(client, upstream, tunnel)
    return await copy(client, upstream, limits, why=why)


async def _completion(client: Stream, upstream: Stream, tunnel: Tunnel | WireTunnel) -> TunnelReport:
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
