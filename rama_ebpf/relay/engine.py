"""The event path of tunnels between two sockets, on the poller that their streams have used before.

A wake-up of the event loop serves many tunnels with one epoll_wait(2), and costs no future, task or registration per
message. docs/relay.md has the figures of this design and of those beside which it was measured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ..core.per_loop import PerLoop
from ..core.poller import Poller
from ..core.socket_stream import SocketStream
from ..core.wheel import WheelTimer
from .choice import Choice
from .direction import Direction
from .options import TunnelLimits
from .pipes import PipePool
from .sockmap import Sockmap
from .tunnel import Tunnel

__all__ = ["Engine"]

_WHEEL_RESOLUTION: Final = 0.1


class Engine:
    """All tunnels of one event loop whose two ends are sockets. It holds no pipe while there is none."""

    def __init__(self, pipes: PipePool | None = None) -> None:
        self.pipes = PipePool() if pipes is None else pipes
        self.tunnels: set[Tunnel] = set()
        self.poller = Poller.current()
        self.sockmap: Sockmap | None = None
        """The kernel's relay, where there is one: see :meth:`use_sockmap`."""
        self.sockmap_refusal = "not set up"
        """Why there is none."""
        self.on_sockmap_wanted: Callable[[], None] | None = None
        """Called once, when the first tunnel would take the kernel's relay and there is none."""
        self.unwatched = 0
        """How many tunnels had to go another way because the kernel watches no more sockets."""
        self._ring_fd = -1
        self._again: list[Direction] = []
        self._wheel: WheelTimer[Tunnel] = WheelTimer(self.poller, _WHEEL_RESOLUTION)

    @staticmethod
    def current(poller: Poller | None = None) -> Engine:
        """Return the engine of the running event loop, whose poller the caller may know; the first call makes it."""
        return _current() if poller is None else _current.of(poller.loop)

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
        if self.tunnels:
            self._hear()

    def want_sockmap(self) -> str:
        """Tell who could bring the kernel's relay that it is wanted; return why there is none."""
        wanted, self.on_sockmap_wanted = self.on_sockmap_wanted, None
        if wanted is not None:
            wanted()
        return self.sockmap_refusal

    def open(
        self,
        client: SocketStream,
        upstream: SocketStream,
        choice: Choice,
        limits: TunnelLimits,
        ended: Callable[[Tunnel], None] | None = None,
    ) -> Tunnel:
        """Take both sockets out of their streams and start to move bytes. ``ended`` is called when the tunnel has
        ended, which it may do before this returns.

        Raises OSError if the kernel refuses to watch another socket; then both streams are as they were. Raises
        RuntimeError while a task waits on a stream.
        """
        client.poll(self.poller)
        upstream.poll(self.poller)
        if not self.tunnels:
            self._hear()
        tunnel = Tunnel(self, client, upstream, limits, choice, forget=self._remove, ended=ended)
        _, from_client, client_waits = client.detach_polled(tunnel.up.told)
        _, from_upstream, upstream_waits = upstream.detach_polled(tunnel.down.told)
        tunnel.ahead = len(from_client)
        self.tunnels.add(tunnel)
        when = tunnel.check_time(tunnel.started)
        if when is not None:
            self._wheel.add(tunnel, when)
        # In the middle of this the tunnel may end.
        tunnel.up.start(from_client, resume=client_waits)
        if tunnel.reason is None:
            tunnel.down.start(from_upstream, resume=upstream_waits)
        return tunnel

    def again(self, direction: Direction) -> None:
        """Let ``direction`` go on after the others had their turn: it has used up its own."""
        if not direction.waits_its_turn:
            direction.waits_its_turn = True
            if not self._again:
                self.poller.loop.call_soon(self._run_again)
            self._again.append(direction)

    def _remove(self, tunnel: Tunnel) -> None:
        """Drop a tunnel that is ending; its sockets are still open."""
        self.tunnels.discard(tunnel)
        self.poller.closing(tunnel.client.fileno())
        self.poller.closing(tunnel.upstream.fileno())
        self._wheel.remove(tunnel)
        if not self.tunnels:
            self._rest()

    def _hear(self) -> None:
        """Listen to the kernel's relay, where there is one."""
        sockmap = self.sockmap
        if sockmap is not None and self._ring_fd == -1:
            self._ring_fd = sockmap.ring.fd
            self.poller.add(self._ring_fd, lambda _events: sockmap.told())

    def _rest(self) -> None:
        """Give everything back: there is no tunnel."""
        self.pipes.clear()
        self._wheel.stop()
        if self._ring_fd != -1:
            self.poller.remove(self._ring_fd)
            self._ring_fd = -1

    def _run_again(self) -> None:
        turn, self._again = self._again, []
        for direction in turn:
            direction.waits_its_turn = False
            try:
                direction.resume()  # does nothing in one that has ended meanwhile
            except Exception:  # noqa: BLE001 - failed() logs it, and ends the tunnel
                direction.owner.failed()


_current: Final = PerLoop(Engine)
