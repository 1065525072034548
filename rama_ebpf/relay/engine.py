"""The event path of tunnels between two sockets: one epoll instance of its own, beside the event loop's.

Each socket is registered once, edge-triggered, for the life of its tunnel; the epoll descriptor itself is a reader of
the event loop. A wake-up of the loop so serves many tunnels with one epoll_wait(2), and costs no future, task or
registration per message. docs/relay.md has the figures of this design and of those beside which it was measured.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
import socket
import weakref
from collections.abc import Callable
from typing import Final

from ..core.address import SocketAddress
from ..core.client import client_address
from ..core.stream import SocketStream, reset_on_close
from .direction import Direction
from .registry import FlowSnapshot
from .sockmap import Sockmap, SockmapDirection
from .splice import PipePool, SpliceDirection
from .tunnel import CloseReason, DirectionEnd, RelayKind, TunnelLimits, TunnelReport
from .wheel import TimerWheel

__all__ = ["Engine", "Tunnel"]

log = logging.getLogger(__name__)

# The kernel wakes who polls for urgent data with every byte that comes, so the two go together.
_IN: Final = select.EPOLLIN | select.EPOLLPRI
_OUT: Final = select.EPOLLOUT
_ALWAYS: Final = select.EPOLLRDHUP | select.EPOLLET
_SPECIAL: Final = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR | select.EPOLLPRI
_EVENTS_PER_WAKE: Final = 256
_WHEEL_RESOLUTION: Final = 0.1
_IDLE_CHECKS: Final = 4
"""How often the counters are looked at within one idle time-out: no clock is read per message."""
_UNSENT: Final = 256 * 1024
"""Bytes that a send queue may hold beyond what the peer's window and the network take: enough to keep both busy, and
not the megabytes to which the kernel lets it grow for a peer that has stopped reading."""


class Tunnel:
    """Two sockets whose bytes the engine moves; ``done`` is set when it has ended and both are closed."""

    __slots__ = (
        "_active_at",
        "_loop",
        "_seen",
        "client",
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
        "why",
    )

    def __init__(
        self,
        engine: Engine,
        client: SocketStream,
        upstream: SocketStream,
        kind: RelayKind,
        why: str,
        limits: TunnelLimits,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.engine = engine
        self.kind = kind
        self.limits = limits
        self.source: SocketAddress | None = client_address(client) or client.peer
        self.target: SocketAddress | None = upstream.peer
        self.client = client.socket
        self.upstream = upstream.socket
        self.started = self._loop.time()
        self.done: asyncio.Future[CloseReason] = self._loop.create_future()
        self.reason: CloseReason | None = None
        self.error: OSError | None = None
        self.up: Direction
        self.down: Direction
        self.kernel_slot: int | None = None
        self.why = why
        self._choose()
        self._active_at = self.started
        self._seen = 0
        self.slot: int | None = None

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
        else:
            adaptive = self.kind is RelayKind.AUTO
            self.up = SpliceDirection(self, self.client, self.upstream, adaptive=adaptive)
            self.down = SpliceDirection(self, self.upstream, self.client, adaptive=adaptive)

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
        self.engine.watch(self.client, (_IN if up else 0) | (_OUT if down else 0))
        self.engine.watch(self.upstream, (_IN if down else 0) | (_OUT if up else 0))

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


class Engine:
    """All tunnels of one event loop whose two ends are sockets. It holds no descriptor while there is none."""

    def __init__(self, pipes: PipePool | None = None) -> None:
        self.pipes = PipePool() if pipes is None else pipes
        self.tunnels: set[Tunnel] = set()
        self.sockmap: Sockmap | None = None
        """The kernel's relay, where there is one: see :meth:`use_sockmap`."""
        self.sockmap_refusal = "not set up"
        """Why there is none."""
        self.on_sockmap_wanted: Callable[[], None] | None = None
        """Called once, when the first tunnel would take the kernel's relay and there is none."""
        self._epoll: select.epoll | None = None
        self._by_fd: dict[int, tuple[Direction, Direction]] = {}
        self._again: list[Direction] = []
        self._wheel: TimerWheel[Tunnel] = TimerWheel(_WHEEL_RESOLUTION)
        self._timer: asyncio.TimerHandle | None = None

    @staticmethod
    def current() -> Engine:
        """Return the engine of the running event loop; the first call makes it."""
        loop = asyncio.get_running_loop()
        engine = _engines.get(loop)
        if engine is None:
            engine = _engines[loop] = Engine()
        return engine

    def use_sockmap(self, sockmap: Sockmap) -> None:
        """Let new tunnels have the kernel's relay."""
        assert self.sockmap is None, "the tunnels of the old one would be lost"
        self.sockmap = sockmap
        if self._epoll is not None:
            self._epoll.register(sockmap.ring.fd, select.EPOLLIN)

    def want_sockmap(self) -> str:
        """Tell who could bring the kernel's relay that it is wanted; return why there is none."""
        wanted, self.on_sockmap_wanted = self.on_sockmap_wanted, None
        if wanted is not None:
            wanted()
        return self.sockmap_refusal

    def open(
        self, client: SocketStream, upstream: SocketStream, kind: RelayKind, why: str, limits: TunnelLimits
    ) -> Tunnel:
        """Take both sockets out of their streams and start to move bytes.

        Raises OSError if the kernel refuses to watch another socket; then both streams are as they were. Raises
        RuntimeError while a task waits on a stream.
        """
        epoll, watched = self._wake(), []
        try:
            for stream in (client, upstream):
                epoll.register(stream.socket.fileno(), _ALWAYS | _IN | _OUT)
                watched.append(stream.socket.fileno())
            tunnel = Tunnel(self, client, upstream, kind, why, limits)
            from_client, from_upstream = client.detach()[1], upstream.detach()[1]
        except BaseException:
            for fd in watched:
                epoll.unregister(fd)
            self._rest()
            raise
        self.tunnels.add(tunnel)
        self._by_fd[watched[0]] = (tunnel.up, tunnel.down)
        self._by_fd[watched[1]] = (tunnel.down, tunnel.up)
        self._schedule(tunnel, tunnel.check_time(tunnel.started))
        for sock in (tunnel.client, tunnel.upstream):
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT)
        tunnel.up.start(from_client)
        if tunnel.reason is None:
            tunnel.down.start(from_upstream)
        return tunnel

    def watch(self, sock: socket.socket, events: int) -> None:
        """Poll ``sock`` for ``events`` besides its end and resets."""
        assert self._epoll is not None
        self._epoll.modify(sock.fileno(), _ALWAYS | events)

    def again(self, direction: Direction) -> None:
        """Let ``direction`` go on after the others had their turn: it has used up its own."""
        if not direction.waits_its_turn:
            direction.waits_its_turn = True
            if not self._again:
                asyncio.get_running_loop().call_soon(self._run_again)
            self._again.append(direction)

    def forget(self, tunnel: Tunnel) -> None:
        """Drop a tunnel that is ending; its sockets are still open."""
        epoll = self._wake()
        self.tunnels.discard(tunnel)
        for sock in (tunnel.client, tunnel.upstream):
            epoll.unregister(sock.fileno())
            del self._by_fd[sock.fileno()]
        if tunnel.slot is not None:
            self._wheel.remove(tunnel, tunnel.slot)
        self._rest()

    def _wake(self) -> select.epoll:
        if self._epoll is None:
            self._epoll = select.epoll()
            asyncio.get_running_loop().add_reader(self._epoll.fileno(), self._run)
            if self.sockmap is not None:
                self._epoll.register(self.sockmap.ring.fd, select.EPOLLIN)
        return self._epoll

    def _rest(self) -> None:
        """Give everything back if there is no tunnel."""
        if self.tunnels:
            return
        self.pipes.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._epoll is not None:
            asyncio.get_running_loop().remove_reader(self._epoll.fileno())
            self._epoll.close()
            self._epoll = None

    def _run(self) -> None:
        if self._epoll is None:
            return
        by_fd = self._by_fd
        for fd, events in self._epoll.poll(0, _EVENTS_PER_WAKE):
            pair = by_fd.get(fd)
            if pair is None:
                if self.sockmap is not None and fd == self.sockmap.ring.fd:
                    self.sockmap.told()
                continue  # or an earlier event of this batch has ended the tunnel
            reading, writing = pair
            try:
                if events & _SPECIAL:
                    self._special(events, reading, writing)
                    continue
                if writing.blocked:
                    writing.writable()
                if events & select.EPOLLIN:
                    reading.readable()
            except Exception:
                # A bug must not take the events of the other tunnels with it: an edge comes only once.
                log.exception("relay of %s to %s failed", reading.tunnel.source, reading.tunnel.target)
                reading.tunnel.finish(CloseReason.ERROR)

    def _special(self, events: int, reading: Direction, writing: Direction) -> None:
        """The peer has ended its stream, reset it, or sent urgent data."""
        if events & select.EPOLLERR:
            # A reset counts at once, also while this direction waits for the other side.
            code = reading.source.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                error = OSError(code, os.strerror(code))
                if reading.end is None:
                    reading.lost(DirectionEnd.SOURCE_LOST, error)
                else:
                    writing.lost(DirectionEnd.SINK_LOST, error)
                return
        if events & select.EPOLLPRI:
            reading.urgent()
        if writing.blocked:
            writing.writable()
        reading.resume()

    def _run_again(self) -> None:
        turn, self._again = self._again, []
        for direction in turn:
            direction.waits_its_turn = False
            if direction.tunnel.reason is None:
                try:
                    direction.resume()
                except Exception:
                    log.exception("relay of %s to %s failed", direction.tunnel.source, direction.tunnel.target)
                    direction.tunnel.finish(CloseReason.ERROR)

    def _schedule(self, tunnel: Tunnel, when: float | None) -> None:
        if when is None:
            tunnel.slot = None
            return
        tunnel.slot = self._wheel.add(tunnel, when)
        if self._timer is None or when < self._timer.when():
            self._arm()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        due = self._wheel.next_due()
        if due is not None:
            self._timer = asyncio.get_running_loop().call_at(due, self._tick)

    def _tick(self) -> None:
        self._timer = None
        now = asyncio.get_running_loop().time()
        for tunnel in self._wheel.take_due(now):
            tunnel.slot = None
            self._schedule(tunnel, tunnel.check_time(now))
        if self._timer is None:
            self._arm()


_engines: Final[weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Engine]] = weakref.WeakKeyDictionary()
