"""Relay by copying: between two sockets by :class:`~.direction.Direction`, and on the
:class:`~rama_ebpf.core.stream.Stream` API for every other kind of stream.

There, back-pressure is the stream's own: nothing is read from one side until the other has taken what was read before,
so a tunnel holds at most one chunk per direction. EOF on one side half-closes the other and the rest still flows.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Final

from ..core.auth import User
from ..core.client import client_address
from ..core.stream import Stream
from .direction import Direction, DirectionOwner
from .host import RelayHost
from .options import RelayKind, TunnelLimits
from .paths import Pair, Paths
from .registry import FlowSnapshot, tunnels
from .report import CloseReason, DirectionOutcome, TunnelReport

__all__ = ["copy", "join"]

log = logging.getLogger(__name__)

_CHUNK: Final = 64 * 1024


def join(host: RelayHost, owner: DirectionOwner, pair: Pair) -> Paths:
    """Make directions between two sockets that copy."""
    return Paths(
        RelayKind.COPY,
        Direction(host, owner, pair.client, pair.upstream, pair.delivered[0], read_all=pair.with_unix),
        Direction(host, owner, pair.upstream, pair.client, pair.delivered[1], read_all=pair.with_unix),
    )


class _Pump:
    def __init__(self) -> None:
        self.delivered = 0
        self.last = time.monotonic()
        self.outcome: DirectionOutcome | None = None

    async def run(self, source: Stream, sink: Stream) -> None:
        reading = True
        try:
            while True:
                reading = True
                data = await source.read(_CHUNK)
                reading = False
                self.last = time.monotonic()
                if not data:
                    await sink.write_eof()
                    self.outcome = DirectionOutcome.EOF
                    return
                await sink.write(data)
                self.delivered += len(data)
                self.last = time.monotonic()
        except OSError:
            self.outcome = DirectionOutcome.SOURCE_LOST if reading else DirectionOutcome.SINK_LOST
            raise


class _Flow:
    def __init__(self, client: Stream, upstream: Stream, why: str) -> None:
        self.source, self.target, self.why = client_address(client) or client.peer, upstream.peer, why
        user = client.extensions.get(User)
        self.user = "" if user is None else user.name
        self.started = time.monotonic()
        self.up, self.down = _Pump(), _Pump()
        self.cut_requested: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def snapshot(self) -> FlowSnapshot:
        age = time.monotonic() - self.started
        moved = self.up.delivered, self.down.delivered
        return FlowSnapshot(self.source, self.target, "copy", self.why, *moved, 0, age, self.user)

    def report(self, reason: CloseReason) -> TunnelReport:
        return TunnelReport(
            reason,
            self.up.delivered,
            self.down.delivered,
            time.monotonic() - self.started,
            "copy",
            self.why,
            self.up.outcome or DirectionOutcome.CUT,
            self.down.outcome or DirectionOutcome.CUT,
        )

    def cut(self) -> None:
        if not self.cut_requested.done():
            self.cut_requested.set_result(None)


async def copy(client: Stream, upstream: Stream, limits: TunnelLimits, *, why: str) -> TunnelReport:
    """Relay until both directions have ended, a side resets, or a time-out of ``limits`` passes.

    Closes both streams as :func:`rama_ebpf.relay.relay` says, whose part this is for streams that are no sockets.
    """
    flow = _Flow(client, upstream, why)
    tunnels.add(flow)
    pumps = {
        asyncio.create_task(flow.up.run(client, upstream)),
        asyncio.create_task(flow.down.run(upstream, client)),
    }
    reason = CloseReason.CUT
    try:
        reason = await _supervise(flow, pumps, limits)
    except Exception:
        reason = CloseReason.ERROR
        raise
    finally:
        for pump in pumps:
            pump.cancel()
        try:
            await asyncio.gather(*pumps, return_exceptions=True)
            if reason is CloseReason.EOF:
                await client.close()
                await upstream.close()
        finally:
            # A cancellation may arrive during the clean-up itself, and must not leave a stream open. After close()
            # this does nothing.
            client.abort()
            upstream.abort()
            report = flow.report(reason)
            client.extensions.add(report)
            tunnels.remove(flow, report)
            log.debug("%s -> %s: %s", flow.source, flow.target, report)
    return report


async def _supervise(flow: _Flow, pumps: set[asyncio.Task[None]], limits: TunnelLimits) -> CloseReason:
    pending: set[asyncio.Future[None]] = {*pumps, flow.cut_requested}
    while len(pending) > 1:
        deadlines = []
        if limits.idle is not None:
            deadlines.append((max(flow.up.last, flow.down.last) + limits.idle, CloseReason.IDLE_TIMEOUT))
        if limits.total is not None:
            deadlines.append((flow.started + limits.total, CloseReason.TOTAL_TIMEOUT))
        first = min(deadlines, default=None, key=lambda deadline: deadline[0])
        now = time.monotonic()
        if first is not None and first[0] <= now:
            return first[1]
        timeout = None if first is None else first[0] - now
        done, pending = await asyncio.wait(pending, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if flow.cut_requested in done:
            return CloseReason.CUT
        for pump in done:
            error = pump.exception()
            if error is not None:
                return _blame(flow, error)
    return CloseReason.EOF


def _blame(flow: _Flow, error: BaseException) -> CloseReason:
    if not isinstance(error, OSError):
        raise error
    # A read error is the reading side's reset, a write error the other side's.
    client_lost = flow.up.outcome is DirectionOutcome.SOURCE_LOST or flow.down.outcome is DirectionOutcome.SINK_LOST
    return CloseReason.CLIENT_RESET if client_lost else CloseReason.UPSTREAM_RESET
