"""One socket of a tunnel, as the poller tells of it: which direction has to do what."""

from __future__ import annotations

import os
import select
import socket

from ..core.poller import READABLE, SPECIAL
from .direction import Direction
from .report import DirectionOutcome

__all__ = ["TunnelSocket"]


class TunnelSocket:
    """A socket from which ``reading`` takes its bytes and to which ``writing`` gives its own."""

    __slots__ = ("reading", "writing")

    reading: Direction
    writing: Direction

    def told(self, events: int) -> None:
        """Act on a change of the socket (:data:`~rama_ebpf.core.poller.Watcher`)."""
        try:
            if events & SPECIAL:
                self._special(events)
                return
            if self.writing.blocked:
                self.writing.writable()
            if events & READABLE:
                self.reading.readable()
        except Exception:  # noqa: BLE001 - failed() logs it, and ends the tunnel
            self.reading.owner.failed()

    def _special(self, events: int) -> None:
        """The peer has ended its stream, reset it, or sent urgent data."""
        reading, writing = self.reading, self.writing
        if events & select.EPOLLERR:
            # A reset counts at once, also while this direction waits for the other side.
            code = reading.source.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                error = OSError(code, os.strerror(code))
                if reading.outcome is None:
                    reading.lost(DirectionOutcome.SOURCE_LOST, error)
                else:
                    writing.lost(DirectionOutcome.SINK_LOST, error)
                return
        if events & select.EPOLLPRI:
            reading.urgent()
        if writing.blocked:
            writing.writable()
        reading.resume()
