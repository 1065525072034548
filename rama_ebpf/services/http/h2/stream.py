"""One HTTP/2 stream as a byte stream: what CONNECT and RFC 8441 make of it."""

from __future__ import annotations

from collections.abc import Callable

import h2.errors

from ....core.address import SocketAddress
from ....core.extensions import Extensions
from ....core.stream import Stream
from .channel import Channel
from .connection import H2Connection

__all__ = ["H2Stream"]


class H2Stream(Stream):
    """The bytes of a tunnel inside an HTTP/2 stream. ``over`` is called when it is closed."""

    def __init__(
        self,
        connection: H2Connection,
        channel: Channel,
        extensions: Extensions,
        *,
        over: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(extensions)
        self._connection = connection
        self._channel = channel
        self._over = over

    async def _receive(self, max_bytes: int) -> bytes:
        data = await self._channel.receive()
        self.bytes_received += len(data)
        if len(data) > max_bytes:
            # A DATA frame is at most 16 KiB: the rest waits in front.
            self.unread(data[max_bytes:])
            return data[:max_bytes]
        return data

    async def write(self, *chunks: bytes | bytearray | memoryview) -> None:
        for chunk in chunks:
            data = bytes(chunk)
            if data:
                await self._channel.send(data)
                self.bytes_sent += len(data)

    async def write_eof(self) -> None:
        self._channel.end()

    async def close(self) -> None:
        self._channel.end()
        if not self._channel.received_end:
            self._channel.reset(h2.errors.ErrorCodes.NO_ERROR)
        self._over()

    def abort(self) -> None:
        # RFC 9113 section 8.5: a TCP error is CONNECT_ERROR, and a RST_STREAM the counterpart of RST.
        self._channel.reset(h2.errors.ErrorCodes.CONNECT_ERROR)
        self._over()

    @property
    def peer(self) -> SocketAddress | None:
        return self._connection.stream.peer

    @property
    def local(self) -> SocketAddress | None:
        return self._connection.stream.local
