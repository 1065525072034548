"""One HTTP/2 stream, with flow control end to end."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from ....core.errors import PeerClosed
from ..exchange.pace import Pace
from ..message.headers import Headers
from .fields import Fields

if TYPE_CHECKING:
    from .connection import H2Connection

__all__ = ["Channel", "StreamWasReset"]

_FRAME: Final = 16 * 1024


class StreamWasReset(PeerClosed):
    """The peer reset one stream. ``code`` is its error code (RFC 9113 section 7)."""

    def __init__(self, code: int) -> None:
        super().__init__(f"the peer reset the stream with code {code}")
        self.code = code


class Channel:
    """One HTTP/2 stream: what was received and not taken yet, and room to send."""

    def __init__(self, connection: H2Connection, stream_id: int) -> None:
        self.id = stream_id
        self.trailers: Headers | None = None
        self.sent_headers = False
        self.sent_end = False
        self.received_end = False
        self.error: Exception | None = None
        self.bytes_received = 0
        self.bytes_sent = 0
        """Bytes of DATA so far."""
        self._connection = connection
        self._received: deque[tuple[bytes, int]] = deque()
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self._watcher: Callable[[], None] = lambda: None

    def watch(self, watcher: Callable[[], None]) -> None:
        """Call ``watcher`` when the peer's side, or the stream, has ended."""
        self._watcher = watcher

    # -- told by the reader ------------------------------------------------------------------------------------

    def on_data(self, data: bytes, flow: int) -> None:
        self._received.append((data, flow))
        self.bytes_received += len(data)
        self._changed.set()

    def on_end(self) -> None:
        if self.error is None:  # else what ended was refused, such as trailers
            self.received_end = True
        self._changed.set()
        self._watcher()

    def on_room(self) -> None:
        self._room.set()

    def on_error(self, error: Exception) -> None:
        if self.error is None:
            self.error = error
        self._changed.set()
        self._room.set()
        self._watcher()

    # -- receiving ---------------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """Whether :meth:`receive` would return bytes without waiting."""
        return bool(self._received)

    @property
    def exhausted(self) -> bool:
        """Whether the peer's side has ended and all of it was taken."""
        return self.received_end and not self._received

    async def receive(self, pace: Pace | None = None) -> bytes:
        """Return received bytes, or b"" at the end. Raises what ended the stream before that."""
        while not self._received:
            if self.received_end:
                return b""  # though the peer may have reset its side's rest since: RFC 9113 section 8.1
            if self.error is not None:
                raise self.error
            self._changed.clear()
            if pace is None:
                await self._changed.wait()
            else:
                await pace.wait(self._wait_changed)
        data, flow = self._received.popleft()
        self._connection.acknowledge(self.id, flow)
        return data

    async def _wait_changed(self) -> None:
        await self._changed.wait()

    def drop_received(self) -> None:
        """Give back the room that untaken bytes hold."""
        while self._received:
            self._connection.acknowledge(self.id, self._received.popleft()[1])

    # -- sending -----------------------------------------------------------------------------------------------

    def send_headers(self, fields: Fields, *, end: bool = False, interim: bool = False) -> None:
        """Queue a header block; ``interim`` is that of a 1xx response."""
        self._check()
        self._connection.h2.send_headers(self.id, fields, end_stream=end)
        self.sent_headers = not interim
        self.sent_end = end
        self._connection.flush()

    async def send(self, data: bytes) -> None:
        """Send bytes as the peer's windows allow. Raises TimeoutError if they do not for long."""
        view = memoryview(data)
        while view:
            self._check()
            room = min(self._connection.h2.local_flow_control_window(self.id), _FRAME)
            if room <= 0:
                self._room.clear()
                async with asyncio.timeout(self._connection.timeouts.write):
                    await self._room.wait()
                continue
            self._connection.h2.send_data(self.id, bytes(view[:room]))
            self._connection.guard.data_sent += 1
            self.bytes_sent += min(room, len(view))
            view = view[room:]
            self._connection.flush()
            await self._connection.drained()

    def end(self, trailers: Fields | None = None) -> None:
        """Queue the end of our side, with trailers if there are any. Does nothing if it has ended."""
        if self.sent_end or self.error is not None:
            return
        self.sent_end = True
        if trailers:
            self._connection.h2.send_headers(self.id, trailers, end_stream=True)
        else:
            self._connection.h2.end_stream(self.id)
        self._connection.flush()

    def reset(self, code: int) -> None:
        """End both sides at once, unless both have ended. Idempotent."""
        if self.error is None and not (self.sent_end and self.received_end):
            self.on_error(ConnectionAbortedError("the stream was reset by this side"))
            self._connection.reset_stream(self.id, code)

    def _check(self) -> None:
        if self.error is not None:
            raise self.error
