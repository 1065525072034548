"""Moving a tunnel's bytes: one function, several ways."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from ..core.extensions import Extensions
from ..core.lifecycle import Lifecycle, Stage
from ..core.poller import Poller
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
    "Tunnel",
    "TunnelHandler",
    "TunnelLimits",
    "TunnelRegistry",
    "TunnelReport",
    "begin_relay",
    "relay",
    "relays_at_once",
    "tunnels",
]

log = logging.getLogger(__name__)

_USUAL_OPTIONS: Final = RelayOptions()
_USUAL_LIMITS: Final = TunnelLimits()


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
    bounds = limits or client.extensions.get(TunnelLimits) or _USUAL_LIMITS
    options = client.extensions.get(RelayOptions) or _USUAL_OPTIONS
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


def relays_at_once(extensions: Extensions) -> bool:
    """Whether a tunnel of a client with these extensions can be had of :func:`begin_relay`, and does not take
    :func:`relay`: nothing is put between its ends, and its sockets stay where they are."""
    options = extensions.get(RelayOptions)
    return (options is None or options.kind is not RelayKind.WIRE) and extensions.get(TunnelHandler) is None


def begin_relay(
    client: SocketStream,
    upstream: SocketStream,
    ended: Callable[[], None],
    poller: Poller | None = None,
    limits: TunnelLimits | None = None,
) -> Tunnel:
    """As :func:`relay`, in callbacks (:mod:`rama_ebpf.core.at_once`), where :func:`relays_at_once`: return the tunnel,
    which moves bytes from now on, and call ``ended`` when it has ended, which may be before this returns. ``poller`` is
    that of the running loop, where the caller knows it.

    Raises OSError if the kernel watches no more sockets; then both streams are as they were.
    """
    extensions = client.extensions
    lifecycle = extensions.get(Lifecycle)
    if lifecycle is not None:
        lifecycle.reached(Stage.TUNNEL)

    def over(tunnel: Tunnel) -> None:
        _account(client, tunnel)
        ended()

    choice = choose(client, upstream, extensions.get(RelayOptions) or _USUAL_OPTIONS)
    engine = Engine.current(poller)
    bounds = limits or extensions.get(TunnelLimits) or _USUAL_LIMITS
    tunnel = engine.open(client, upstream, choice, bounds, over)
    if tunnel.reason is None:
        tunnels.add(tunnel)
    return tunnel


def _account(client: Stream, tunnel: Tunnel | WireTunnel) -> TunnelReport:
    """Leave the report of a tunnel that has ended where layers find it, and count it."""
    report = tunnel.report()
    client.bytes_received += max(0, report.to_upstream - (tunnel.ahead if isinstance(tunnel, Tunnel) else 0))
    client.bytes_sent += report.to_client
    client.extensions.add(report)
    tunnels.remove(tunnel, report)
    if log.isEnabledFor(logging.DEBUG):
        log.debug("%s -> %s: %s", tunnel.source, tunnel.target, report)
    return report


async def _completion(client: Stream, upstream: Stream, tunnel: Tunnel | WireTunnel) -> TunnelReport:
    tunnels.add(tunnel)
    try:
        await tunnel.end()
    finally:
        tunnel.cut()  # does nothing unless the caller was cancelled
        report = _account(client, tunnel)
        upstream.bytes_received += report.to_client
        upstream.bytes_sent += report.to_upstream
    return report
