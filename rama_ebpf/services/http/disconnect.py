"""Notices that a client has reset its connection while nobody reads from it, so that work for nobody ends."""

from __future__ import annotations

import asyncio
from types import TracebackType

from ...core.errors import LimitExceeded, PeerClosed
from ...core.stream import Stream

__all__ = ["DisconnectWatch"]


class DisconnectWatch:
    """``async with watch:`` cancels its body, and raises :class:`PeerClosed`, when the client resets.

    A client that ends its side (FIN) may still wait for its response (RFC 9112 section 9.6), however late that comes.
    One that has gone altogether looks the same at first; :meth:`Stream.reset_by_peer` finds out. What a client sends
    ahead stays in the stream's buffer. Within the body the stream is
    read by :meth:`read` only, which takes turns with the watch. ``delay`` is how many seconds nobody has read before
    that is worth a watching task.
    """

    def __init__(self, stream: Stream, *, delay: float) -> None:
        self._stream = stream
        self._reading = False
        self._delay = delay
        self._timer: asyncio.TimerHandle | None = None
        self._reader: asyncio.Task[None] | None = None
        self._watched: asyncio.Task[object] | None = None
        self._gone = False

    async def __aenter__(self) -> None:
        self._watched = asyncio.current_task()
        self._gone = False
        self._arm()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.stop()
        if self._gone and isinstance(error, asyncio.CancelledError):
            assert self._watched is not None
            if self._watched.uncancel() == 0:
                raise PeerClosed("the client closed before its response was complete") from error

    async def stop(self) -> None:
        """Stop watching: when this returns the stream has no reader. Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._reader is not None:
            reader, self._reader = self._reader, None
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    def _arm(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._delay, self._begin)

    def _begin(self) -> None:
        self._timer = None
        if self._reading:
            self._arm()  # whoever reads will notice
        else:
            self._reader = asyncio.create_task(self._wait())

    async def read(self, max_bytes: int) -> bytes:
        """Read from the stream, in place of the watch."""
        if self._reader is not None:
            await self.stop()
            self._arm()
        self._reading = True
        try:
            return await self._stream.read(max_bytes)
        finally:
            self._reading = False

    async def _wait(self) -> None:
        try:
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
