"""A tunnel between two sockets: its directions, its end, and what is known of it meanwhile."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from ..core.address import SocketAddress
from ..core.client import client_address
from ..core.socket_stream import SocketStream, reset_on_close
from .choice import Choice
from .direction import Direction
from .end import TunnelEnd
from .registry import FlowSnapshot
from .rising import RisingDirection
from .sockmap import SockmapDirection
from .splice import SpliceDirection
from .tunnel import CloseReason, DirectionEnd, RelayKind, TunnelLimits, TunnelReport

if TYPE_CHECKING:
    from .engine import Engine

__all__ = ["Tunnel"]

_IDLE_CHECKS: Final = 4
"""How often the counters are looked at within one idle time-out: no clock is read per message."""


class Tunnel:
    """Two sockets whose bytes the engine moves; ``done`` is set when it has ended and both are closed.

    ``with_unix`` if one of them is a Unix socket.
    """

    __slots__ = (
        "_active_at",
        "_choice",
        "_loop",
        "_seen",
        "client",
        "client_end",
        "done",
        "down",
        "engine",
        "error",
        "kernel_slot",
        "kind",
        "limits",
        "reason",
        "slot",
        "source",
        "started",
        "target",
        "up",
        "upstream",
        "upstream_end",
        "why",
        "with_unix",
    )

    def __init__(
        self,
        engine: Engine,
        client: SocketStream,
        upstream: SocketStream,
        choice: Choice,
        limits: TunnelLimits,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.engine = engine
        self.kind = choice.kind
        self.limits = limits
        self.source: SocketAddress | None = client_address(client) or client.peer
        self.target: SocketAddress | None = upstream.peer
        self.client = client.socket
        self.upstream = upstream.socket
        self.with_unix = client.is_unix or upstream.is_unix
        self.started = self._loop.time()
        self.done: asyncio.Future[CloseReason] = self._loop.create_future()
        self.reason: CloseReason | None = None
        self.error: OSError | None = None
        self.up: Direction
        self.down: Direction
        self.kernel_slot: int | None = None
        self.why = choice.why
        self._choice = choice
        self._choose()
        self.client_end, self.upstream_end = TunnelEnd(), TunnelEnd()
        self._wire()
        self._active_at = self.started
        self._seen = 0
        self.slot: int | None = None

    def _wire(self) -> None:
        """Let the events of the sockets go to the directions that the tunnel has now."""
        self.client_end.reading = self.upstream_end.writing = self.up
        self.client_end.writing = self.upstream_end.reading = self.down

    def _choose(self) -> None:
        """Make the directions; where the kernel's relay is wanted and cannot be had, those of userspace."""
        if self.kind is RelayKind.SOCKMAP:
            sockmap = self.engine.sockmap
            refusal = self.engine.want_sockmap() if sockmap is None else sockmap.join(self)
            if not refusal:
                return
            self.kind, self.why = RelayKind.AUTO, f"no sockmap: {refusal}"
            if self.kernel_slot is not None:
                self.kind = RelayKind.COPY  # splice(2) reads nothing from a socket that is in a sockmap
                return
        if self.kind is RelayKind.COPY:
            self.up = Direction(self, self.client, self.upstream)
            self.down = Direction(self, self.upstream, self.client)
        elif self._choice.rises:
            self.up = RisingDirection(self, self.client, self.upstream)
            self.down = RisingDirection(self, self.upstream, self.client)
        else:
            adaptive = self.kind is RelayKind.AUTO
            self.up = SpliceDirection(self, self.client, self.upstream, adaptive=adaptive)
            self.down = SpliceDirection(self, self.upstream, self.client, adaptive=adaptive)

    def rise(self) -> None:
        """Let the kernel go on from here, if nothing is under way and it can; else all stays as it is."""
        if self.reason is not None or not (self._choice.rises and self.up.settled and self.down.settled):
            return
        sockmap = self.engine.sockmap
        if sockmap is None:
            self.why = f"no sockmap: {self.engine.want_sockmap()}"
            return
        refusal = sockmap.join(self, (self.up.delivered, self.down.delivered))
        if refusal:
            self.why = f"no sockmap: {refusal}"
            self._choice = Choice(RelayKind.AUTO, self.why)  # once is enough
            if self.kernel_slot is None:
                return
        self.kind, self.why = (RelayKind.COPY, self.why) if refusal else (RelayKind.SOCKMAP, self._choice.why)
        self._wire()
        self.up.resume()
        if self.reason is None:
            self.down.resume()

    def relay_and_why(self) -> tuple[str, str]:
        """Return which way the bytes move, or have moved, and why that one."""
        spliced = self.up.spliced or self.down.spliced
        if self.kind is RelayKind.AUTO:
            return "splice" if spliced else "copy", self.why
        if self.kind is RelayKind.SPLICE and not spliced and self.engine.pipes.refused:
            return "copy", "no pipe to be had"
        return self.kind.value, self.why

    def snapshot(self) -> FlowSnapshot:
        relay, why = self.relay_and_why()
        return FlowSnapshot(
            self.source,
            self.target,
            relay,
            why,
            self.up.moved,
            self.down.moved,
            self.up.spills + self.down.spills,
            self._loop.time() - self.started,
        )

    def report(self) -> TunnelReport:
        """Say how the tunnel went; for one that has ended."""
        assert self.reason is not None
        assert self.up.end is not None
        assert self.down.end is not None
        relay, why = self.relay_and_why()
        return TunnelReport(
            self.reason,
            self.up.moved,
            self.down.moved,
            self._loop.time() - self.started,
            relay,
            why,
            self.up.end,
            self.down.end,
            self.up.spills + self.down.spills,
        )

    def watch(self) -> None:
        """Poll each socket for what userspace has to do: a direction that the kernel moves needs only its end."""
        up = not isinstance(self.up, SockmapDirection) or self.up.passing
        down = not isinstance(self.down, SockmapDirection) or self.down.passing
        self.engine.poller.watch(self.client.fileno(), reads=up, writes=down)
        self.engine.poller.watch(self.upstream.fileno(), reads=down, writes=up)

    def cut(self) -> None:
        self.finish(CloseReason.CUT)

    def direction_ended(self) -> None:
        """A direction has delivered its EOF; the other may still flow."""
        if self.up.end is DirectionEnd.EOF and self.down.end is DirectionEnd.EOF:
            self.finish(CloseReason.EOF)

    def lost(self, direction: Direction, error: OSError) -> None:
        """A read or write of ``direction`` failed: that socket's peer is gone, and the other is told by RST."""
        culprit = direction.source if direction.end is DirectionEnd.SOURCE_LOST else direction.sink
        self.error = error
        self.finish(CloseReason.CLIENT_RESET if culprit is self.client else CloseReason.UPSTREAM_RESET)

    def check_time(self, now: float) -> float | None:
        """End the tunnel if a time-out has passed; else return when to look again, None for never."""
        limits, when = self.limits, None
        if limits.total is not None:
            when = self.started + limits.total
            if now >= when:
                self.finish(CloseReason.TOTAL_TIMEOUT)
                return None
        if limits.idle is not None:
            moved = self.up.moved + self.down.moved
            if moved != self._seen:
                # When in the last interval the bytes moved is not known: assume just now.
                self._seen, self._active_at = moved, now
            elif now >= self._active_at + limits.idle:
                self.finish(CloseReason.IDLE_TIMEOUT)
                return None
            look = min(now + limits.idle / _IDLE_CHECKS, self._active_at + limits.idle)
            when = look if when is None else min(when, look)
        return when

    def finish(self, reason: CloseReason) -> None:
        """Close both sockets: in order after EOF, else with RST, so that nothing cut short looks complete."""
        if self.reason is not None:
            return
        self.reason = reason
        self.up.close()
        self.down.close()
        self.engine.forget(self)
        for sock in (self.client, self.upstream):
            if reason is CloseReason.EOF:
                reset_on_close(sock, False)  # a socket that comes out of a stream is reset otherwise
            sock.close()
        if self.kernel_slot is not None and self.engine.sockmap is not None:
            self.engine.sockmap.leave(self.kernel_slot)
        if not self.done.done():
            self.done.set_result(reason)
