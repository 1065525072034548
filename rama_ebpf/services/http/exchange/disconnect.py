"""Notices that a client has reset its connection while nobody reads from it, so that work for nobody ends."""

from __future__ import annotations

import asyncio
import contextlib

from ....core.errors import LimitExceeded, PeerClosed
from ....core.stream import Stream

__all__ = ["DisconnectWatch"]


class DisconnectWatch:
    """Between :meth:`enter` and :meth:`leave`, cancels the task that called enter when the client resets; its ``except
    CancelledError`` asks :meth:`gone`. One for a connection: while requests come and go quickly it costs no timers.

    A client that ends its side (FIN) may still wait for its response (RFC 9112 section 9.6), however late that comes.
    One that has gone altogether looks the same at first; :meth:`Stream.reset_by_peer` finds out. What a client sends
    ahead stays in the stream's buffer. Meanwhile the stream is read by :meth:`read` only, which takes turns with the
    watch. ``delay`` is how many seconds nobody has read before that is worth a watching task.
    """

    def __init__(self, stream: Stream, loop: asyncio.AbstractEventLoop, *, delay: float) -> None:
        self._stream = stream
        self._reading = False
        self._delay = delay
        self._loop = loop
        self._since = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._reader: asyncio.Task[None] | None = None
        self._watched: asyncio.Task[object] | None = None
        self._gone = False

    def enter(self) -> None:
        """Begin to watch."""
        self._watched = asyncio.current_task(self._loop)
        self._gone = False
        self._restart()

    async def leave(self) -> None:
        """End watching: when this returns the stream has no reader. Idempotent."""
        self._since = 0.0
        if self._reader is not None:
            await self._stop()

    @property
    def reads(self) -> bool:
        """Whether :meth:`leave` has something to wait for."""
        return self._reader is not None

    def forget(self) -> None:
        """As :meth:`leave`, where nothing :attr:`reads`."""
        self._since = 0.0

    def gone(self) -> bool:
        """Whether it was this that cancelled the task, and nobody else did as well; to be asked once."""
        return self._gone and self._watched is not None and self._watched.uncancel() == 0

    def close(self) -> None:
        """Let the timer go."""
        self._since = 0.0
        self._watched = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def read(self, max_bytes: int) -> bytes:
        """Read from the stream, in place of the watch."""
        if self._reader is not None:
            await self._stop()
            self._restart()
        self._reading = True
        try:
            return await self._stream.read(max_bytes)
        finally:
            self._reading = False

    def _restart(self) -> None:
        self._since = self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_later(self._delay, self._look)

    def _look(self) -> None:
        self._timer = None
        if not self._since:
            return
        now = self._loop.time()
        if self._reading:
            self._since = now  # whoever reads will notice
        left = self._since + self._delay - now
        if left > 0:
            self._timer = self._loop.call_later(left, self._look)
        elif self._reader is None:
            self._reader = asyncio.create_task(self._wait())

    async def _stop(self) -> None:
        if self._reader is not None:
            reader, self._reader = self._reader, None
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def _wait(self) -> None:
        try:
            # A TLS client that ends without close_notify may wait as well: its request was complete.
            with contextlib.suppress(PeerClosed):
                while await self._stream.fill():
                    pass
            await self._stream.reset_by_peer()
        except LimitExceeded:
            return  # so much was sent ahead that there is no room to look further
        except OSError:
            pass  # reset: gone as well
        self._gone = True
        assert self._watched is not None
        self._watched.cancel()
