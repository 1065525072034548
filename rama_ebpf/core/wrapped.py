"""A stream around a stream, for layers that watch or slow what passes.

It is not a :class:`~rama_ebpf.core.socket_stream.SocketStream`, so the relay moves its bytes by copying, through it.
"""

from __future__ import annotations

from .address import SocketAddress
from .stream import Stream

__all__ = ["WrappedStream"]


class WrappedStream(Stream):
    """Passes everything on to ``inner`` and shares its extensions. Override :meth:`_receive` or :meth:`write`."""

    def __init__(self, inner: Stream) -> None:
        super().__init__(inner.extensions)
        self.inner = inner

    async def _receive(self, max_bytes: int) -> bytes:
        data = await self.inner.read(max_bytes)  # what the inner stream has read ahead comes first
        self.bytes_received += len(data)
        return data

    async def write(self, *chunks: bytes | bytearray | memoryview) -> None:
        before = self.inner.bytes_sent
        try:
            await self.inner.write(*chunks)
        finally:
            self.bytes_sent += self.inner.bytes_sent - before

    async def write_eof(self) -> None:
        await self.inner.write_eof()

    async def close(self) -> None:
        await self.inner.close()

    def abort(self) -> None:
        self.inner.abort()

    async def reset_by_peer(self) -> None:
        await self.inner.reset_by_peer()

    def quiet(self) -> bool:
        return not self._unread and self.inner.quiet()

    @property
    def peer(self) -> SocketAddress | None:
        return self.inner.peer

    @property
    def local(self) -> SocketAddress | None:
        return self.inner.local
