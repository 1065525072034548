"""One direction of a tunnel between two sockets: read, write, and remember what the sink has not taken yet.

Everything here is called when epoll reports a change (edge-triggered), so each step goes on until the kernel says
EAGAIN. There is no task, no future and no allocation per message, and nothing is held for an idle direction: one
buffer serves all of them.
"""

from __future__ import annotations

import os
import select
import socket
from typing import Final, Protocol

from ..core.poller import READABLE, SPECIAL, Poller
from .pipes import PipePool
from .report import DirectionOutcome

__all__ = ["BUFFER_SIZE", "TURN", "Direction", "DirectionHost", "DirectionOwner", "buffer"]

BUFFER_SIZE: Final = 64 * 1024
"""Bytes that one read may copy: what a direction holds at most for a sink that does not read."""

TURN: Final = 16 * BUFFER_SIZE
"""Bytes that one direction moves before the others have their turn; a small read counts as a whole buffer."""

_READS: Final = range(TURN // BUFFER_SIZE)

_UNSENT: Final = 256 * 1024
"""Bytes that a send queue may hold beyond what the peer's window and the network take: enough to keep both busy, and
not the megabytes to which the kernel lets it grow for a peer that has stopped reading."""

buffer: Final = memoryview(bytearray(BUFFER_SIZE))
"""Shared by all directions: nothing stays in it beyond one step of one of them."""


class DirectionHost(Protocol):
    """What all directions of an event loop share."""

    @property
    def pipes(self) -> PipePool: ...

    @property
    def poller(self) -> Poller: ...

    def again(self, direction: Direction) -> None:
        """Let ``direction`` resume after the others had their turn: it has used up its own."""


class DirectionOwner(Protocol):
    """Who is told what becomes of a direction: its tunnel."""

    def direction_ended(self) -> None:
        """A direction has delivered its EOF."""

    def lost(self, direction: Direction, error: OSError) -> None:
        """A read or write of ``direction`` failed, as its ``outcome`` says."""

    def violated(self) -> None:
        """It cannot be proved that every byte was right."""

    def failed(self) -> None:
        """Called while an exception that nobody expected is handled."""

    def watch(self) -> None:
        """:attr:`Direction.polled` has changed."""

    def promote(self) -> None:
        """A direction has shown that the tunnel is worth another relay."""


class Direction:
    """Moves the bytes that come from ``source`` to ``sink``, in order, each once, by copying.

    It is told of the events of its source (:meth:`told`), which are also those of the sink of its ``other`` direction.

    ``delivered`` counts bytes that were written here. ``blocked`` is true while the sink is full:
    then nothing is read, and the source's own window closes. With ``read_all`` a short read does not mean that
    nothing is left, as on a Unix socket, where it may be a message boundary.
    """

    __slots__ = (
        "_bounded",
        "_pending",
        "_read_all",
        "_recv_into",
        "_send",
        "blocked",
        "delivered",
        "host",
        "other",
        "outcome",
        "owner",
        "sink",
        "source",
        "waits_its_turn",
    )

    other: Direction
    """The direction from ``sink`` to ``source``."""

    def __init__(
        self,
        host: DirectionHost,
        owner: DirectionOwner,
        source: socket.socket,
        sink: socket.socket,
        delivered: int = 0,
        *,
        read_all: bool = False,
    ) -> None:
        self.host = host
        self.owner = owner
        self.source = source
        self.sink = sink
        self.delivered = delivered
        self.blocked = False
        self.outcome: DirectionOutcome | None = None
        self.waits_its_turn = False
        self._recv_into, self._send = source.recv_into, sink.send  # looked up once, and not for each message
        self._pending = b""
        self._read_all = read_all
        self._bounded = False

    def told(self, events: int) -> None:
        """Act on a change of the source (:data:`~rama_ebpf.core.poller.Watcher`)."""
        try:
            if events & SPECIAL:
                self._special(events)
                return
            if self.other.blocked:
                self.other.writable()
            if events & READABLE:
                self.readable()
        except Exception:  # noqa: BLE001 - failed() logs it, and ends the tunnel
            self.owner.failed()

    def _special(self, events: int) -> None:
        """The peer has ended its stream, reset it, or sent urgent data."""
        other = self.other
        if events & select.EPOLLERR:
            # A reset counts at once, also while this direction waits for the other side.
            code = self.source.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                error = OSError(code, os.strerror(code))
                if self.outcome is None:
                    self.lost(DirectionOutcome.SOURCE_LOST, error)
                else:
                    other.lost(DirectionOutcome.SINK_LOST, error)
                return
        if events & select.EPOLLPRI:
            self.urgent()
        if other.blocked:
            other.writable()
        self.resume()

    @property
    def moved(self) -> int:
        """Bytes that have reached the sink's send queue, whoever moved them."""
        return self.delivered

    @property
    def spills(self) -> int:
        """How often the kernel's relay has handed the direction back."""
        return 0

    @property
    def settled(self) -> bool:
        """Whether nothing is held or under way, so that another relay can go on from here."""
        return self.outcome is None and not (self.blocked or self.waits_its_turn)

    @property
    def polled(self) -> bool:
        """Whether userspace moves the bytes, so that it must hear of each; else only the end and resets count."""
        return True

    @property
    def spliced(self) -> bool:
        """Whether bytes have moved by splice(2)."""
        return False

    def start(self, unread: bytes, *, resume: bool) -> None:
        """Forward what was read ahead of the hand-over. With ``resume`` there may be more to read already, else the
        poller tells of it."""
        if unread and not self._flush(unread):
            return
        if resume:
            self.resume()

    def readable(self) -> None:
        """The source has bytes, or has ended."""
        if not (self.blocked or self.waits_its_turn) and self.outcome is None:
            self._move(self._read_all)

    def writable(self) -> None:
        """The sink has room: write what is held, and read on."""
        if self.blocked and self._flush_held():
            self.blocked = False
            # An edge may have passed unused while the sink was full: read until EAGAIN.
            self._move(True)

    def resume(self) -> None:
        """Read until EAGAIN or EOF."""
        if not (self.blocked or self.waits_its_turn) and self.outcome is None:
            self._move(True)

    def urgent(self) -> None:
        """The source has sent urgent data, which is in line (RFC 6093): a read ends before and after such a byte."""
        self._read_all = True

    def close(self) -> None:
        """Drop what is held. The sockets belong to the tunnel."""
        if self.outcome is None:
            self.outcome = DirectionOutcome.CUT
        self._pending = b""

    def _move(self, read_all: bool) -> None:
        self._copy(read_all)

    def _copy(self, read_all: bool) -> None:
        recv_into, send, chunk = self._recv_into, self._send, buffer
        for _ in _READS:
            try:
                count = recv_into(chunk)
            except BlockingIOError:
                return
            except OSError as error:
                self.lost(DirectionOutcome.SOURCE_LOST, error)
                return
            if not count:
                self._end_of_source()
                return
            try:
                sent = send(chunk[:count])
            except BlockingIOError:
                sent = 0
            except OSError as error:
                self.lost(DirectionOutcome.SINK_LOST, error)
                return
            self.delivered += sent
            if not self._bounded and self.delivered >= BUFFER_SIZE:
                self.bound()
            if sent < count and not self._flush(chunk[sent:count]):
                return
            if count < BUFFER_SIZE:
                if not read_all:
                    return
            elif self._filled():
                return
        self.host.again(self)

    def bound(self) -> None:
        """Bound what the sink's send queue holds. Short tunnels never need it, so it waits for the first 64 KiB."""
        self._bounded = True
        if self.sink.family != socket.AF_UNIX:
            self.sink.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT)

    def _filled(self) -> bool:
        """A read has filled the buffer; true if another way goes on from here."""
        return False

    def _block(self) -> None:
        """The sink is full: go on when the poller tells of room."""
        self.blocked = True
        if not self._bounded:
            self.bound()
        self.host.poller.want_writes(self.sink.fileno())

    def _flush_held(self) -> bool:
        return self._flush(self._pending)

    def _flush(self, data: bytes | memoryview) -> bool:
        """Write ``data``; true if all of it was taken, else a copy of the rest is kept."""
        view = memoryview(data)
        try:
            while view:
                sent = self.sink.send(view)
                self.delivered += sent
                view = view[sent:]
        except BlockingIOError:
            self._pending = bytes(view)
            self._block()
            return False
        except OSError as error:
            self.lost(DirectionOutcome.SINK_LOST, error)
            return False
        self._pending = b""
        return True

    def _end_of_source(self) -> None:
        """Everything that was read is with the sink: tell it that no more follows. Where the sink has ended its side
        as well, closing it will."""
        if self.other.outcome is not DirectionOutcome.EOF:
            try:
                self.sink.shutdown(socket.SHUT_WR)
            except OSError as error:
                self.lost(DirectionOutcome.SINK_LOST, error)
                return
        self.outcome = DirectionOutcome.EOF
        self.owner.direction_ended()

    def lost(self, outcome: DirectionOutcome, error: OSError) -> None:
        """Reading or writing has failed: the tunnel ends."""
        self.outcome = outcome
        self.owner.lost(self, error)
