"""Moving bytes by splice(2): from socket to pipe to socket, without a copy into userspace.

A pipe is taken from a pool only while bytes are in it, so an idle tunnel holds none. Where there is no pipe to be
had the direction copies instead, and the pool counts it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from typing import TYPE_CHECKING, Final

from .direction import BUFFER_SIZE, TURN, Direction
from .tunnel import DirectionEnd

if TYPE_CHECKING:
    from .flow import Tunnel

__all__ = ["Pipe", "PipePool", "SpliceDirection"]

Pipe = tuple[int, int]
"""Read end, write end."""

_SPLICE_SIZE: Final = 1 << 20  # more than a pipe takes: it is the pipe that bounds a splice
# No SPLICE_F_MORE: it corks the last segment of a message until more comes.
_SPLICE_FLAGS: Final = os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE
_PIPE_SIZE: Final = 256 * 1024
"""Bytes: four times the kernel's own choice saves a sixth of the CPU and moves a fifth more; more gains little."""
_LARGE: Final = 64
"""So many pipes are made that large: a user has 64 MiB for all (pipe(7), pipe-user-pages-soft)."""
_SMALL: Final = 8 * 1024
_SMALL_READS: Final = 16


class PipePool:
    """Empty pipes for reuse: at most ``limit`` are out at once, and ``keep`` are held while nobody needs them.

    ``refused`` counts how often there was none to be had.
    """

    def __init__(self, *, limit: int = 1024, keep: int = 16) -> None:
        self.refused = 0
        self._limit: Final = limit
        self._keep: Final = keep
        self._free: list[Pipe] = []
        self._out = 0

    def take(self) -> Pipe | None:
        """Return an empty pipe, or None if the limit is reached or the system gives no more."""
        if self._free:
            self._out += 1
            return self._free.pop()
        if self._out < self._limit:
            try:
                pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError:
                self.refused += 1  # EMFILE, ENFILE: the caller copies instead
                return None
            if self._out < _LARGE:
                with contextlib.suppress(OSError):  # EPERM: this user has no pages left for it, and it is as it is
                    fcntl.fcntl(pipe[1], fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
            self._out += 1
            return pipe
        self.refused += 1
        return None

    def give(self, pipe: Pipe) -> None:
        """Take an empty pipe back."""
        self._out -= 1
        if len(self._free) < self._keep:
            self._free.append(pipe)
        else:
            _close(pipe)

    def destroy(self, pipe: Pipe) -> None:
        """Take a pipe back that may still hold bytes; they are lost."""
        self._out -= 1
        _close(pipe)

    def clear(self) -> None:
        """Close the pipes that nobody uses."""
        while self._free:
            _close(self._free.pop())

    def __del__(self) -> None:
        self.clear()


def _close(pipe: Pipe) -> None:
    os.close(pipe[0])
    os.close(pipe[1])


class SpliceDirection(Direction):
    """Moves bytes by splice(2), and by copying where that is better or the only way.

    With ``adaptive`` it copies until a read fills the whole buffer, for two splices cost more than two copies of a
    small message, and goes back to copying when reads have become small.
    """

    __slots__ = ("_adaptive", "_held", "_pipe", "_small", "_spliced", "_splicing")

    def __init__(self, tunnel: Tunnel, source: socket.socket, sink: socket.socket, *, adaptive: bool) -> None:
        super().__init__(tunnel, source, sink)
        self._adaptive = adaptive
        self._splicing = not adaptive
        self._spliced = False
        self._small = 0
        self._pipe: Pipe | None = None
        self._held = 0  # bytes in the pipe

    @property
    def spliced(self) -> bool:
        return self._spliced

    @property
    def settled(self) -> bool:
        return super().settled and not self._splicing

    def urgent(self) -> None:
        super().urgent()
        # splice(2) never gets past an urgent mark (tcp_read_sock stops before it), recv(2) does.
        self._splicing = self._adaptive = False

    def close(self) -> None:
        super().close()
        if self._pipe is not None:
            self.tunnel.engine.pipes.destroy(self._pipe)
            self._pipe = None

    def _move(self, read_all: bool) -> None:
        if self._splicing:
            self._splice()
        else:
            self._copy(read_all)

    def _filled(self) -> bool:
        if self._adaptive:
            self._splicing = True
            self._splice()
        return self._adaptive

    def _flush_held(self) -> bool:
        if self._pipe is None:
            return self._flush(self._pending)
        pipe = self._pipe
        if not self._drain(pipe):
            return False
        self.tunnel.engine.pipes.give(pipe)
        return True

    def _splice(self) -> None:
        pipes = self.tunnel.engine.pipes
        pipe = pipes.take()
        if pipe is None:
            self._copy_turn()
            return
        source = self.source.fileno()
        budget = TURN
        while budget > 0:
            try:
                count = os.splice(source, pipe[1], _SPLICE_SIZE, flags=_SPLICE_FLAGS)
            except BlockingIOError:
                pipes.give(pipe)
                return
            except OSError as error:
                pipes.give(pipe)
                self.lost(DirectionEnd.SOURCE_LOST, error)
                return
            if not count:
                pipes.give(pipe)
                self._end_of_source()
                return
            self._held = count
            self._spliced = True
            if not self._drain(pipe):
                return
            budget -= max(count, BUFFER_SIZE)
            if self._adaptive:
                self._small = self._small + 1 if count < _SMALL else 0
                if self._small == _SMALL_READS:
                    self._small = 0
                    self._splicing = False
                    break
        pipes.give(pipe)
        self.tunnel.engine.again(self)

    def _copy_turn(self) -> None:
        """Copy for one turn because there is no pipe."""
        adaptive, self._adaptive = self._adaptive, False
        self._copy(True)
        self._adaptive = adaptive

    def _drain(self, pipe: Pipe) -> bool:
        """Write what is in the pipe; true if all of it was taken, else the pipe is kept."""
        sink = self.sink.fileno()
        try:
            while self._held:
                sent = os.splice(pipe[0], sink, self._held, flags=_SPLICE_FLAGS)
                self._held -= sent
                self.delivered += sent
        except BlockingIOError:
            self._pipe = pipe
            self._block()
            return False
        except OSError as error:
            self._pipe = pipe
            self.lost(DirectionEnd.SINK_LOST, error)
            return False
        self._pipe = None
        return True
