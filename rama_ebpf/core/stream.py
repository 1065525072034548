"""Byte streams: what a transport service gets and what a connector returns.

A :class:`Stream` reads, peeks, writes, half-closes and carries :class:`~rama_ebpf.core.extensions.Extensions`.
:class:`~rama_ebpf.core.socket_stream.SocketStream` is the one over a non-blocking socket.

One task may read and one may write at a time; a second reader (or writer) raises RuntimeError at once instead of
mixing bytes.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
from typing import Final

from .address import SocketAddress
from .errors import LimitExceeded, PeerClosed
from .extensions import Extensions

__all__ = ["MAX_UNREAD", "Stream"]

MAX_UNREAD: Final = 64 * 1024
"""Upper bound in bytes of what a stream holds read ahead (peeked but not consumed)."""

_READ_SIZE: Final = 64 * 1024


class Stream(abc.ABC):
    """A bidirectional, half-closable stream of bytes with a read-ahead buffer.

    ``bytes_received`` and ``bytes_sent`` count what crossed the transport, including bytes that are still unread.
    """

    __slots__ = ("_unread", "bytes_received", "bytes_sent", "extensions")

    def __init__(self, extensions: Extensions | None = None) -> None:
        self.extensions = Extensions() if extensions is None else extensions
        self.bytes_received = 0
        self.bytes_sent = 0
        self._unread = bytearray()

    # -- what a transport implements ---------------------------------------------------------------------------

    @abc.abstractmethod
    async def _receive(self, max_bytes: int) -> bytes:
        """Return 1..max_bytes bytes from the transport as soon as there are any, or b"" at EOF."""

    async def _receive_into(self, view: memoryview) -> int:
        """Like :meth:`_receive`, into memory of the caller's. A transport may do better than this copy."""
        data = await self._receive(len(view))
        view[: len(data)] = data
        return len(data)

    @abc.abstractmethod
    async def write(self, *chunks: bytes | bytearray | memoryview) -> None:
        """Write all chunks, in order, and return when the transport has taken them (back-pressure).

        Raises ConnectionError if the peer has gone.
        """

    @abc.abstractmethod
    async def write_eof(self) -> None:
        """Half-close: tell the peer that no more bytes follow; reading goes on. A second call does nothing."""

    @abc.abstractmethod
    async def close(self) -> None:
        """Close both directions in the orderly way of the transport. Idempotent; never raises for a dead peer."""

    @abc.abstractmethod
    def abort(self) -> None:
        """Close at once; the peer learns that the stream did not end in order (TCP: RST). Idempotent."""

    @property
    @abc.abstractmethod
    def peer(self) -> SocketAddress | None:
        """The peer's address, None for a Unix socket."""

    @property
    @abc.abstractmethod
    def local(self) -> SocketAddress | None:
        """Our own address on this stream, None for a Unix socket."""

    async def close_after(self, last: bytes = b"", *, timeout: float = 1.0, max_discard: int = 64 * 1024) -> None:
        """Send ``last``, a reply that refuses the peer, and close so that it arrives. Never raises for a dead peer.

        Closing while bytes of the peer are unread would send RST, which may overtake the reply and discard it
        (RFC 1122 section 4.2.2.13). So: half-close, then read and drop for at most ``timeout`` seconds and
        ``max_discard`` bytes until the peer closes too.
        """
        try:
            # OSError includes TimeoutError: the peer has gone, or does not close but has had its reply.
            with contextlib.suppress(OSError):
                async with asyncio.timeout(timeout):
                    await self.write(last)
                    await self.write_eof()
                    while max_discard > 0 and (data := await self.read(4096)):
                        max_discard -= len(data)
        finally:
            await self.close()

    def write_now(self, data: bytes) -> int:
        """Write what the transport takes without waiting, and return how many bytes that was; 0 for one that cannot
        tell."""
        return 0

    async def reset_by_peer(self) -> None:
        """Behind the peer's EOF: return when the peer has gone altogether, and no longer just sends nothing.

        A transport that cannot tell never returns: the next write tells.
        """
        await asyncio.get_running_loop().create_future()

    def quiet(self) -> bool:
        """Whether the stream is open and has nothing to read, EOF included: a kept connection that may be used again.

        False for a transport that cannot tell without waiting.
        """
        return False

    # -- reading, the same for every transport -----------------------------------------------------------------

    @property
    def buffered(self) -> bytes:
        """The bytes that were read ahead and not consumed yet."""
        return bytes(self._unread)

    async def read(self, max_bytes: int = _READ_SIZE) -> bytes:
        """Return up to ``max_bytes`` bytes as soon as there are any, or b"" at EOF."""
        if self._unread:
            data = bytes(self._unread[:max_bytes])
            del self._unread[:max_bytes]
            return data
        return await self._receive(max_bytes)

    async def read_into(self, buffer: bytearray | memoryview) -> int:
        """Read into ``buffer``, as soon as there are any bytes; return how many came, 0 at EOF or for an empty buffer.

        Spares large readers an allocation for each read where the transport can (recv_into(2)).
        """
        view = memoryview(buffer).cast("B")
        if self._unread or not len(view):
            data = bytes(self._unread[: len(view)])
            del self._unread[: len(view)]
            view[: len(data)] = data
            return len(data)
        return await self._receive_into(view)

    async def read_exactly(self, count: int) -> bytes:
        """Return exactly ``count`` bytes. Raises :class:`PeerClosed` at an earlier EOF."""
        data = await self.peek(count)
        if len(data) < count:
            raise PeerClosed(f"stream ended after {len(data)} of {count} bytes")
        del self._unread[:count]
        return data[:count]

    async def peek(self, count: int) -> bytes:
        """Return at least ``count`` bytes without consuming them; fewer only at EOF.

        Raises :class:`LimitExceeded` if ``count`` is above :data:`MAX_UNREAD`.
        """
        while len(self._unread) < count and await self.fill(max(count, len(self._unread) + 1)):
            pass
        return bytes(self._unread)

    async def fill(self, limit: int = MAX_UNREAD) -> int:
        """Read once from the transport into the read-ahead buffer; return how many bytes came, 0 at EOF.

        This is what drives a sans-I/O parser that wants more. Raises :class:`LimitExceeded` when the buffer already
        holds ``limit`` bytes (at most :data:`MAX_UNREAD`).
        """
        limit = min(limit, MAX_UNREAD)
        room = limit - len(self._unread)
        if room <= 0:
            raise LimitExceeded(f"peer sent {len(self._unread)} bytes where at most {limit} are expected")
        data = await self._receive(room)
        self._unread += data
        return len(data)

    def consume(self, count: int) -> None:
        """Drop ``count`` bytes of :attr:`buffered`. Raises ValueError if there are fewer."""
        if count > len(self._unread):
            raise ValueError(f"cannot consume {count} bytes, only {len(self._unread)} are buffered")
        del self._unread[:count]

    def unread(self, data: bytes) -> None:
        """Put ``data`` back in front of everything not yet read."""
        self._unread[:0] = data
