"""A tunnel between two sockets: its directions, its end, and what is known of it meanwhile."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from ..core.address import SocketAddress
from ..core.auth import User
from ..core.client import client_address
from ..core.socket_stream import SocketStream, reset_on_close
from . import assembly
from .choice import Choice
from .direction import Direction
from .host import RelayHost
from .options import RelayKind, TunnelLimits
from .paths import Pair, Paths, Refusal
from .registry import FlowSnapshot
from .report import CloseReason, DirectionOutcome, TunnelReport

__all__ = ["Tunnel"]

log = logging.getLogger(__name__)

_IDLE_CHECKS: Final = 4
"""How often the counters are looked at within one idle time-out: no clock is read per message."""


class Tunnel:
    """Two sockets whose bytes ``host`` moves, by the directions of ``choice``, and the better ones when it has
    earned them. ``forget`` is called once, when it ends and the sockets are still open, ``ended`` when
    they are closed.
    """

    __slots__ = (
        "_active_at",
        "_choice",
        "_client",
        "_ended",
        "_forget",
        "_host",
        "_promotes",
        "_release",
        "_seen",
        "_target",
        "_time",
        "_waiter",
        "ahead",
        "client",
        "down",
        "error",
        "kind",
        "limits",
        "reason",
        "slot",
        "started",
        "up",
        "upstream",
        "why",
        "with_unix",
    )

    def __init__(
        self,
        host: RelayHost,
        client: SocketStream,
        upstream: SocketStream,
        limits: TunnelLimits,
        choice: Choice,
        *,
        forget: Callable[[Tunnel], None],
        ended: Callable[[Tunnel], None] | None = None,
    ) -> None:
        self._host = host
        self._choice = choice
        self._promotes = True
        self._forget = forget
        self._ended = ended
        self._waiter: asyncio.Future[None] | None = None
        self.limits = limits
        self._client, self._target = client, upstream.peer
        self.client = client.socket
        self.upstream = upstream.socket
        self.with_unix = client.is_unix or upstream.is_unix
        self._time = host.poller.loop.time
        self.started = self._time()
        self.reason: CloseReason | None = None
        self.error: OSError | None = None
        self.ahead = 0
        """Bytes that the client's stream had read, and counted, before."""
        self.slot: int | None = None
        self._active_at = self.started
        self._seen = 0
        self._use(assembly.begin(host, choice, self, Pair(self.client, self.upstream, self.with_unix)), choice.why)

    @property
    def source(self) -> SocketAddress | None:
        """The client's address."""
        return client_address(self._client) or self._client.peer

    @property
    def target(self) -> SocketAddress | None:
        """The other end's."""
        return self._target

    @property
    def user(self) -> str:
        """Who has proven to be one, else ""."""
        user = self._client.extensions.get(User)
        return "" if user is None else user.name

    def _use(self, paths: Paths, why: str) -> None:
        """Let these directions move the bytes from now on."""
        self.kind, self.why = paths.kind, paths.fallback or why
        self._release = paths.release
        self.up: Direction = paths.up
        self.down: Direction = paths.down
        paths.up.other, paths.down.other = paths.down, paths.up

    async def end(self) -> None:
        """Return when the tunnel has ended. For one task at a time."""
        if self.reason is None:
            self._waiter = self._host.poller.loop.create_future()
            await self._waiter

    def promote(self) -> None:
        """Let a better relay go on from here, if nothing is under way and it can; else all stays as it is."""
        if self.reason is not None or not self._promotes or not (self.up.settled and self.down.settled):
            return
        delivered = (self.up.delivered, self.down.delivered)
        made = assembly.promote(
            self._host, self._choice, self, Pair(self.client, self.upstream, self.with_unix, delivered)
        )
        if isinstance(made, Refusal):
            self.why = made.why
            self._promotes = not made.final
            return
        self._promotes = False
        self._use(made, self.why)
        self._host.poller.replace(self.client.fileno(), made.up.told)
        self._host.poller.replace(self.upstream.fileno(), made.down.told)
        self.up.resume()
        if self.reason is None:
            self.down.resume()

    def relay_and_why(self) -> tuple[str, str]:
        """Return which way the bytes move, or have moved, and why that one."""
        spliced = self.up.spliced or self.down.spliced
        if self.kind is RelayKind.AUTO:
            return "splice" if spliced else "copy", self.why
        if self.kind is RelayKind.SPLICE and not spliced and self._host.pipes.refused:
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
            self._time() - self.started,
            self.user,
        )

    def report(self) -> TunnelReport:
        """Say how the tunnel went; for one that has ended."""
        assert self.reason is not None
        assert self.up.outcome is not None
        assert self.down.outcome is not None
        relay, why = self.relay_and_why()
        return TunnelReport(
            self.reason,
            self.up.moved,
            self.down.moved,
            self._time() - self.started,
            relay,
            why,
            self.up.outcome,
            self.down.outcome,
            self.up.spills + self.down.spills,
        )

    def watch(self) -> None:
        """Poll each socket for what userspace has to do: a direction that the kernel moves needs only its end."""
        up, down = self.up.polled, self.down.polled
        self._host.poller.watch(self.client.fileno(), reads=up, writes=down)
        self._host.poller.watch(self.upstream.fileno(), reads=down, writes=up)

    def cut(self) -> None:
        self.finish(CloseReason.CUT)

    def violated(self) -> None:
        """It cannot be proved that every byte was right."""
        self.finish(CloseReason.INTEGRITY)

    def failed(self) -> None:
        """Say in the log which exception ends the tunnel; called while it is handled."""
        log.exception("relay of %s to %s failed", self.source, self.target)
        self.finish(CloseReason.ERROR)

    def direction_ended(self) -> None:
        """A direction has delivered its EOF; the other may still flow."""
        if self.up.outcome is DirectionOutcome.EOF and self.down.outcome is DirectionOutcome.EOF:
            self.finish(CloseReason.EOF)

    def lost(self, direction: Direction, error: OSError) -> None:
        """A read or write of ``direction`` failed: that socket's peer is gone, and the other is told by RST."""
        culprit = direction.source if direction.outcome is DirectionOutcome.SOURCE_LOST else direction.sink
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
        self._forget(self)
        client, upstream = self.client, self.upstream
        if reason is CloseReason.EOF:  # a socket that comes out of a stream is reset otherwise
            reset_on_close(client, False)
            reset_on_close(upstream, False)
        client.close()
        upstream.close()
        if self._release is not None:
            self._release()
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        if self._ended is not None:
            self._ended(self)
