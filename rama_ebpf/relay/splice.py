"""Moving bytes by splice(2): from socket to pipe to socket, without a copy into userspace.

A pipe is taken from the pool only while bytes are in it, so an idle tunnel holds none. Where there is no pipe to be
had the direction copies instead, and the pool counts it.
"""

from __future__ import annotations

import os
import socket
from typing import Final

from .direction import BUFFER_SIZE, TURN, Direction, DirectionHost, DirectionOwner
from .host import RelayHost
from .options import RelayKind
from .paths import Pair, Paths
from .pipes import Pipe
from .report import DirectionOutcome

__all__ = ["SpliceDirection", "join"]

_SPLICE_SIZE: Final = 1 << 20  # more than a pipe takes: it is the pipe that bounds a splice
# No SPLICE_F_MORE: it corks the last segment of a message until more comes.
_SPLICE_FLAGS: Final = os.SPLICE_F_NONBLOCK | os.SPLICE_F_MOVE
_SMALL: Final = 8 * 1024
_SMALL_READS: Final = 16


def join(host: RelayHost, owner: DirectionOwner, pair: Pair) -> Paths:
    """Make directions that splice whatever comes."""
    return Paths(
        RelayKind.SPLICE,
        SpliceDirection(host, owner, pair.client, pair.upstream, adaptive=False, read_all=pair.with_unix),
        SpliceDirection(host, owner, pair.upstream, pair.client, adaptive=False, read_all=pair.with_unix),
    )


class SpliceDirection(Direction):
    """Moves bytes by splice(2), and by copying where that is better or the only way.

    With ``adaptive`` it copies until a read fills the whole buffer, for two splices cost more than two copies of a
    small message, and goes back to copying when reads have become small.
    """

    __slots__ = ("_adaptive", "_held", "_pipe", "_small", "_spliced", "_splicing")

    def __init__(
        self,
        host: DirectionHost,
        owner: DirectionOwner,
        source: socket.socket,
        sink: socket.socket,
        *,
        adaptive: bool,
        read_all: bool = False,
    ) -> None:
        super().__init__(host, owner, source, sink, read_all=read_all)
        self._adaptive = adaptive
        self._splicing = not adaptive
        self._spliced = False
        self._small = 0
        self._pipe: Pipe | None = None
        self._held = 0  # bytes in the pipe
        if not adaptive:
            self.bound()

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
            self.host.pipes.destroy(self._pipe)
            self._pipe = None

    def _move(self, read_all: bool) -> None:
        if self._splicing:
            self._splice()
        else:
            self._copy(read_all)

    def _filled(self) -> bool:
        if self._adaptive:
            if not self._bounded:
                self.bound()
            self._splicing = True
            self._splice()
        return self._adaptive

    def _flush_held(self) -> bool:
        if self._pipe is None:
            return self._flush(self._pending)
        pipe = self._pipe
        if not self._drain(pipe):
            return False
        self.host.pipes.give(pipe)
        return True

    def _splice(self) -> None:
        pipes = self.host.pipes
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
                self.lost(DirectionOutcome.SOURCE_LOST, error)
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
        self.host.again(self)

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
            self.lost(DirectionOutcome.SINK_LOST, error)
            return False
        self._pipe = None
        return True
