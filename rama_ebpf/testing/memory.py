"""Streams without sockets: two ends in one process, which behave as those of a TCP connection do."""

from __future__ import annotations

import asyncio
import errno
from typing import Final

from ..core.address import SocketAddress
from ..core.extensions import Extensions
from ..core.stream import Stream

__all__ = ["MemoryStream", "stream_pair"]

_CAPACITY: Final = 64 * 1024


class _Pipe:
    """Bytes on their way in one direction: at most ``capacity`` of them."""

    __slots__ = ("_waiting", "capacity", "data", "deaf", "ended", "reset")

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.data = bytearray()
        self.ended = False  # who writes will write no more
        self.deaf = False  # who reads will read no more
        self.reset = False
        self._waiting: list[asyncio.Future[None]] = []

    async def change(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        try:
            await waiter
        finally:
            self._waiting.remove(waiter)

    def changed(self) -> None:
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)

    def take(self, most: int) -> bytes:
        data = bytes(self.data[:most])
        del self.data[:most]
        self.changed()
        return data

    def put(self, data: memoryview) -> int:
        """Take what there is room for; return how many bytes that was."""
        count = min(len(data), self.capacity - len(self.data))
        self.data += data[:count]
        self.changed()
        return count


class MemoryStream(Stream):
    """One end of a :func:`stream_pair`.

    It keeps the rules of a TCP connection: a write waits while the other end does not read; what was written before an
    EOF or a reset can still be read; closing while bytes of the peer are unread resets (RFC 1122 section 4.2.2.13). One
    task may read and one may write at a time, or RuntimeError is raised.
    """

    __slots__ = ("_closed", "_in", "_local", "_out", "_peer", "_reading", "_writing")

    def __init__(
        self, incoming: _Pipe, outgoing: _Pipe, local: SocketAddress | None, peer: SocketAddress | None
    ) -> None:
        """Made by :func:`stream_pair`."""
        super().__init__(Extensions())
        self._in, self._out = incoming, outgoing
        self._local, self._peer = local, peer
        self._reading = self._writing = self._closed = False

    def _check_open(self) -> None:
        if self._closed:
            raise ConnectionAbortedError(errno.ECONNABORTED, "the stream is closed")

    async def _receive(self, max_bytes: int) -> bytes:
        if self._reading:
            raise RuntimeError("another task is reading this stream")
        self._reading = True
        try:
            while True:
                self._check_open()
                if self._in.data:
                    data = self._in.take(max_bytes)
                    self.bytes_received += len(data)
                    return data
                if self._in.reset:
                    raise ConnectionResetError(errno.ECONNRESET, "the peer has reset the stream")
                if self._in.ended:
                    return b""
                await self._in.change()
        finally:
            self._reading = False

    async def write(self, *chunks: bytes | bytearray | memoryview) -> None:
        """As :meth:`.Stream.write`; raises BrokenPipeError behind a :meth:`write_eof`."""
        if self._writing:
            raise RuntimeError("another task is writing to this stream")
        self._writing = True
        try:
            for chunk in chunks:
                data = memoryview(chunk).cast("B")
                while len(data):
                    self._check_writable()
                    if count := self._out.put(data):
                        self.bytes_sent += count
                        data = data[count:]
                    else:
                        await self._out.change()
        finally:
            self._writing = False

    def _check_writable(self) -> None:
        self._check_open()
        if self._out.reset or self._out.deaf:
            raise ConnectionResetError(errno.ECONNRESET, "the peer has closed or reset the stream")
        if self._out.ended:
            raise BrokenPipeError(errno.EPIPE, "this end was half-closed: nothing can follow")

    def write_now(self, data: bytes) -> int:
        """As :meth:`.Stream.write_now`."""
        if self._writing or self._closed or self._out.ended or self._out.deaf or self._out.reset:
            return 0
        count = self._out.put(memoryview(data))
        self.bytes_sent += count
        return count

    async def write_eof(self) -> None:
        """As :meth:`.Stream.write_eof`."""
        if not self._closed:
            self._out.ended = True
            self._out.changed()

    async def close(self) -> None:
        """As :meth:`.Stream.close`."""
        if self._in.data:
            self.abort()  # as the kernel does
        self._end()

    def abort(self) -> None:
        """As :meth:`.Stream.abort`."""
        if not self._closed:
            self._in.reset = self._out.reset = True
        self._end()

    def _end(self) -> None:
        self._closed = True
        self._out.ended = self._in.deaf = True
        self._in.changed()
        self._out.changed()

    async def reset_by_peer(self) -> None:
        """As :meth:`.Stream.reset_by_peer`."""
        while not (self._out.deaf or self._out.reset):
            await self._out.change()

    def quiet(self) -> bool:
        """As :meth:`.Stream.quiet`."""
        return not (self._closed or self._unread or self._in.data or self._in.ended or self._in.reset)

    @property
    def peer(self) -> SocketAddress | None:
        """The other end's address, as it was given."""
        return self._peer

    @property
    def local(self) -> SocketAddress | None:
        """This end's address, as it was given."""
        return self._local


def stream_pair(
    client: SocketAddress | None = None, server: SocketAddress | None = None, *, capacity: int = _CAPACITY
) -> tuple[MemoryStream, MemoryStream]:
    """Return the client's end and the server's end of a connection in memory.

    ``capacity`` bytes (at least 1) are on their way in each direction at most; then a write waits. Without addresses
    the ends have none, as those of a Unix socket. Raises ValueError for a capacity below 1.
    """
    if capacity < 1:
        raise ValueError(f"a capacity of {capacity} bytes lets nothing through: use 1 or more")
    there, back = _Pipe(capacity), _Pipe(capacity)
    return MemoryStream(back, there, client, server), MemoryStream(there, back, server, client)
