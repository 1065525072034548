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

from ..core.stream import SocketStream
from .choice import Choice
from .direction import Direction
from .flow import Tunnel
from .sockmap import Sockmap
from .splice import PipePool
from .tunnel import CloseReason, DirectionEnd, TunnelLimits
from .wheel import TimerWheel

__all__ = ["Engine"]

log = logging.getLogger(__name__)

# The kernel wakes who polls for urgent data with every byte that comes, so the two go together.
_IN: Final = select.EPOLLIN | select.EPOLLPRI
_OUT: Final = select.EPOLLOUT
_READABLE: Final = select.EPOLLIN
_ALWAYS: Final = select.EPOLLRDHUP | select.EPOLLET
_SPECIAL: Final = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR | select.EPOLLPRI
_EVENTS_PER_WAKE: Final = 256
_WHEEL_RESOLUTION: Final = 0.1
_UNSENT: Final = 256 * 1024
"""Bytes that a send queue may hold beyond what the peer's window and the network take: enough to keep both busy, and
not the megabytes to which the kernel lets it grow for a peer that has stopped reading."""


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
        self.unwatched = 0
        """How many tunnels had to go another way because the kernel watches no more sockets."""
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

    def refused(self) -> dict[str, int]:
        """How often something could not be had and tunnels went another way, by what it was."""
        counts = {"no pipe to be had": self.pipes.refused, "the kernel watches no more sockets": self.unwatched}
        if self.sockmap is not None:
            counts |= self.sockmap.refused
        return {reason: count for reason, count in counts.items() if count}

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

    def open(self, client: SocketStream, upstream: SocketStream, choice: Choice, limits: TunnelLimits) -> Tunnel:
        """Take both sockets out of their streams and start to move bytes.

        Raises OSError if the kernel refuses to watch another socket; then both streams are as they were. Raises
        RuntimeError while a task waits on a stream.
        """
        epoll, watched = self._wake(), []
        try:
            for stream in (client, upstream):
                epoll.register(stream.socket.fileno(), _ALWAYS | _IN | _OUT)
                watched.append(stream.socket.fileno())
            tunnel = Tunnel(self, client, upstream, choice, limits)
            from_client, from_upstream = client.detach()[1], upstream.detach()[1]
        except BaseException:
            for fd in watched:
                epoll.unregister(fd)
            self._rest()
            raise
        self.tunnels.add(tunnel)
        self.rewire(tunnel)
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

    def rewire(self, tunnel: Tunnel) -> None:
        """Let the events of a tunnel's sockets go to the directions that it has now."""
        self._by_fd[tunnel.client.fileno()] = (tunnel.up, tunnel.down)
        self._by_fd[tunnel.upstream.fileno()] = (tunnel.down, tunnel.up)

    def watch(self, sock: socket.socket, *, reads: bool, writes: bool) -> None:
        """Poll ``sock`` for bytes and for room as told, besides its end and resets."""
        assert self._epoll is not None
        self._epoll.modify(sock.fileno(), _ALWAYS | (_IN if reads else 0) | (_OUT if writes else 0))

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
                if events & _READABLE:
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
