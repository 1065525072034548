"""Moving bytes inside the kernel: userspace puts a tunnel's sockets into a map, and sleeps.

The program is in ``bpf/splice.c``. Each direction is in one of two states, and the order of bytes holds because only
one side moves them in each:

- **Passing**: the kernel leaves the bytes to the socket's own reader, and they are copied here. It begins so, and comes
  back to it (a spill) when the sink has not acknowledged what it was given, so that TCP's own back-pressure reaches
  the sender. Nothing is written here before the sink's send queue holds all that the kernel has redirected.
- **Armed**: when everything that was passed has been forwarded, its count is written down, and the kernel takes over
  if exactly so many bytes have passed when the next one comes. Here only the end of the stream, a reset and the
  kernel's own ring buffer are waited for.

The stream has ended when TCP's count of bytes received says that every one of them was seen, and the sink has them.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import socket
import struct
import sys
from collections import Counter, deque
from collections.abc import Mapping
from typing import Final

from ..kernel import bpf
from ..kernel.splice import BROKEN, SYNCED, Directions, DirectionSlot, EventRing
from .direction import BUFFER_SIZE, TURN, Direction, DirectionHost, DirectionOwner, buffer
from .host import RelayHost
from .options import RelayKind
from .paths import Pair, Paths, Refusal
from .report import DirectionOutcome

__all__ = ["RECEIVE_BUFFER", "Sockmap", "SockmapDirection", "join"]

_SO_COOKIE: Final = 57
_SIOCOUTQ: Final = 0x5411
_TCP_INFO_BYTES: Final = struct.Struct("=120xQQ")  # tcpi_bytes_acked, tcpi_bytes_received
RECEIVE_BUFFER: Final = 512 * 1024
"""Bytes that a receive buffer may hold while a direction spills (SO_RCVBUF; net.core.rmem_max bounds it, too).
Without it the kernel lets it grow to megabytes for a peer that sends quickly, which fill when the other stalls."""

_FIRST_RETRY: Final = 0.001
_LAST_RETRY: Final = 0.05


def join(host: RelayHost, owner: DirectionOwner, pair: Pair) -> Paths | Refusal:
    """Put a pair under the kernel's relay, where the host has one; else it is told that it is wanted."""
    if host.sockmap is None:
        return Refusal(host.want_sockmap(), final=False)
    return host.sockmap.join(host, owner, pair)


class Sockmap:
    """One worker's share of the relay in the kernel: number ``share`` of ``shares``, which nobody else may use.

    What an earlier holder of the share has left is removed. ``fds`` are those of
    :class:`~rama_ebpf.kernel.splice.SpliceMaps`. ``credit`` is how many bytes of one direction may
    be in the kernel or on the wire, unacknowledged by the sink's peer, before the sender is held. ``refused`` counts by
    reason the tunnels that had to go another way.
    """

    def __init__(self, fds: Mapping[str, int], share: int = 0, shares: int = 1, *, credit: int = 1 << 20) -> None:
        self._slots, self._relayed = fds["slots"], fds["relayed"]
        self._directions = Directions(fds["directions"])
        self._share = share
        self.credit = credit
        self.ring = EventRing(fds[f"ring{share}"])
        tunnels = self._directions.count // 2 // shares
        # First in, first out: a slot rests as long as it can.
        self._free = deque(2 * tunnel for tunnel in range(share * tunnels, (share + 1) * tunnels))
        self._live: dict[int, SockmapDirection] = {}
        self.refused: Counter[str] = Counter()
        self._sweep()

    def __len__(self) -> int:
        """How many directions are in use."""
        return len(self._live)

    def join(self, host: DirectionHost, owner: DirectionOwner, pair: Pair) -> Paths | Refusal:
        """Put both sockets of ``pair`` under the kernel's relay; nothing may be under way.

        If the kernel takes only the client's socket, that one has to stay: then the paths copy, and say so.
        """
        if not self._free:
            return self._refuse("all slots are in use")
        slot = self._free.popleft()
        sockets = (pair.client, pair.upstream)
        for sock in sockets:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER)
        entered = 0
        try:
            for index, sock in enumerate(sockets):
                cookie = sock.getsockopt(socket.SOL_SOCKET, _SO_COOKIE, 8)
                self._directions[slot + index].start(int.from_bytes(cookie, sys.byteorder), self._share, self.credit)
                bpf.map_update(self._slots, cookie, (slot + index).to_bytes(4, sys.byteorder))
            for index, sock in enumerate(sockets):
                bpf.map_update(
                    self._relayed, (slot + index).to_bytes(4, sys.byteorder), sock.fileno().to_bytes(8, sys.byteorder)
                )
                entered += 1
        except OSError as error:
            refusal = self._refuse(
                f"the kernel does not take the socket ({errno.errorcode.get(error.errno or 0, '?')})"
            )
            if not entered:
                self._forget(slot)
                return refusal
            # The client's socket is in, and taking it out would lose what has come meanwhile: it stays and passes.
            # splice(2) reads nothing from a socket that is in a sockmap, so the other direction copies as well.
            return Paths(
                RelayKind.COPY,
                self._direction(host, owner, slot, pair, arms=False),
                Direction(host, owner, pair.upstream, pair.client, pair.delivered[1], read_all=pair.with_unix),
                fallback=f"no sockmap: {refusal.why}",
                release=lambda: self._leave(slot),
            )
        return Paths(
            RelayKind.SOCKMAP,
            self._direction(host, owner, slot, pair),
            self._direction(host, owner, slot + 1, pair),
            release=lambda: self._leave(slot),
        )

    def _direction(
        self, host: DirectionHost, owner: DirectionOwner, index: int, pair: Pair, *, arms: bool = True
    ) -> SockmapDirection:
        """Make the direction of one slot; those with an odd number lead to the client."""
        source, sink, delivered = pair.client, pair.upstream, pair.delivered[0]
        if index % 2:
            source, sink, delivered = sink, source, pair.delivered[1]
        direction = SockmapDirection(host, owner, source, sink, self._directions[index], delivered, arms=arms)
        self._live[index] = direction
        return direction

    def _leave(self, slot: int) -> None:
        """Free the slots of a tunnel whose sockets are closed, and have left the map by that."""
        self._live.pop(slot, None)
        self._live.pop(slot + 1, None)
        self._forget(slot)

    def told(self) -> None:
        """Hear what the kernel has to say."""
        for index in self.ring:
            direction = self._live.get(index)
            if direction is not None:
                direction.hear()

    def _refuse(self, reason: str) -> Refusal:
        self.refused[reason] += 1
        return Refusal(reason)

    def _forget(self, slot: int) -> None:
        for index in (slot, slot + 1):
            direction = self._directions[index]
            if direction.cookie:
                bpf.map_delete(self._slots, direction.cookie.to_bytes(8, sys.byteorder))
                direction.clear()
        self._free.append(slot)

    def _sweep(self) -> None:
        """Remove what an earlier holder of this share has left: its sockets went with it, its cookies did not."""
        for _ in range(len(self._free)):
            self._forget(self._free.popleft())


class SockmapDirection(Direction):
    """A direction that the kernel moves, and that is copied here when the kernel does not."""

    __slots__ = ("_arms", "_clear_at", "_consumed", "_delay", "_kernel", "_moved", "_passing", "_retry", "_written")

    def __init__(
        self,
        host: DirectionHost,
        owner: DirectionOwner,
        source: socket.socket,
        sink: socket.socket,
        kernel: DirectionSlot,
        delivered: int,
        *,
        arms: bool = True,
    ) -> None:
        super().__init__(host, owner, source, sink, delivered)
        self.bound()
        self._passing = True
        self._kernel = kernel
        self._arms = arms
        self._consumed = 0
        self._written = _taken(sink) - delivered  # where our own bytes begin in the sink's send queue
        self._clear_at = 0
        self._delay = _FIRST_RETRY
        self._retry: asyncio.TimerHandle | None = None
        self._moved: tuple[int, int] | None = None

    @property
    def moved(self) -> int:
        return self.delivered + (self._kernel.redirected if self._moved is None else self._moved[0])

    @property
    def polled(self) -> bool:
        return self._passing

    @property
    def spills(self) -> int:
        return self._kernel.spills if self._moved is None else self._moved[1]

    def hear(self) -> None:
        """The kernel passes bytes and nobody watches, or it has stopped the direction."""
        if self._broken() or self.outcome is not None or self._passing:
            return
        self._take_back()

    def close(self) -> None:
        super().close()
        if self._retry is not None:
            self._retry.cancel()
            self._retry = None
        self._moved = self._kernel.redirected, self._kernel.spills

    def _move(self, read_all: bool) -> None:
        if self._retry is not None:
            return
        recv_into = self.source.recv_into
        for _ in range(TURN // BUFFER_SIZE):
            try:
                count = recv_into(buffer)
            except BlockingIOError:
                self._arm()
                return
            except OSError as error:
                self.lost(DirectionOutcome.SOURCE_LOST, error)
                return
            if not count:
                self._end_of_source()
                return
            self._consumed += count
            if not self._sink_is_clear():
                self._pending, self.blocked = bytes(buffer[:count]), True
                return
            if not self._flush(buffer[:count]):
                return
        self.host.again(self)

    def _flush_held(self) -> bool:
        return self._sink_is_clear() and super()._flush_held()

    def _arm(self) -> None:
        """All that was passed has been forwarded: let the kernel take over at the next byte."""
        if not (self._arms and self._passing) or self._broken():
            return
        kernel = self._kernel
        self._passing = False
        kernel.watch(False)
        kernel.resume_at(self._consumed)
        self.owner.watch()
        # The kernel counts a passed byte and then looks whether somebody watches. We do it the other way round, with
        # a system call in between, so that one of us sees the other.
        if kernel.passed != self._consumed:
            self._take_back()

    def _take_back(self) -> None:
        self._passing = True
        self._kernel.watch(True)
        self.owner.watch()  # and so an event comes if there is something to read

    def _sink_is_clear(self) -> bool:
        """Whether the sink's send queue holds all that the kernel was to move; if not, look again later."""
        if self._kernel.redirected == self._clear_at:
            return True
        # In this order: the kernel counts bytes before it moves them, so that it never has moved more than it says.
        taken = _taken(self.sink)
        redirected = self._kernel.redirected
        missing = self._written + self.delivered + redirected - taken
        if missing < 0:
            self.owner.violated()  # it has more than we were given
            return False
        if missing:
            self._later()
            return False
        self._clear_at = redirected
        self._delay = _FIRST_RETRY
        return True

    def _later(self) -> None:
        if self._retry is None:
            self._retry = asyncio.get_running_loop().call_later(self._delay, self._look_again)
            self._delay = min(2 * self._delay, _LAST_RETRY)

    def _look_again(self) -> None:
        self._retry = None
        if self.blocked:
            self.writable()
        else:
            self.resume()

    def _end_of_source(self) -> None:
        kernel = self._kernel
        if self._broken():
            return
        if kernel.passed != self._consumed:
            self._later()  # the kernel still has some in a queue of its own
            return
        if not self._sink_is_clear():
            return
        if kernel.state & SYNCED:
            seen = kernel.before + kernel.redirected + kernel.passed
            if seen + 1 != _received(self.source):  # TCP counts the FIN
                self.owner.violated()
                return
        super()._end_of_source()

    def _broken(self) -> bool:
        if not self._kernel.state & BROKEN:
            return False
        self.owner.violated()
        return True


def _info(sock: socket.socket) -> tuple[int, int]:
    acked, received = _TCP_INFO_BYTES.unpack(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES.size))
    return acked, received


def _received(sock: socket.socket) -> int:
    """Bytes that TCP has received in order, and 1 for the FIN."""
    return _info(sock)[1]


def _taken(sock: socket.socket) -> int:
    """Bytes that the send queue has taken since the connection began, but for a constant."""
    while True:
        acked = _info(sock)[0]
        queued = int.from_bytes(fcntl.ioctl(sock, _SIOCOUTQ, bytes(4)), sys.byteorder)
        if _info(sock)[0] == acked:
            return acked + queued
