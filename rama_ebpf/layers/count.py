"""Counting bytes."""

from __future__ import annotations

from ..core.service import Output, Service
from ..core.stream import Stream

__all__ = ["ByteCountLayer", "ByteCounter"]


class ByteCounter:
    """Bytes from and to clients over all streams that went through layers which hold this counter."""

    def __init__(self) -> None:
        self._received = 0
        self._sent = 0
        self._live: set[Stream] = set()

    @property
    def received(self) -> int:
        """Bytes from clients, live streams included as far as they are known before a tunnel ends."""
        return self._received + sum(stream.bytes_received for stream in self._live)

    @property
    def sent(self) -> int:
        """Bytes to clients, likewise."""
        return self._sent + sum(stream.bytes_sent for stream in self._live)

    def enter(self, stream: Stream) -> None:
        """Count ``stream`` from now on."""
        self._live.add(stream)

    def leave(self, stream: Stream) -> None:
        """Add up what ``stream`` has moved; it has ended."""
        self._live.remove(stream)
        self._received += stream.bytes_received
        self._sent += stream.bytes_sent


class ByteCountLayer:
    """Counts the bytes of every stream in ``counter``."""

    accepts = Stream

    def __init__(self, counter: ByteCounter) -> None:
        self._counter = counter

    def __call__(self, inner: Service[Stream, Output], /) -> Service[Stream, Output]:
        async def serve(stream: Stream, /) -> Output:
            self._counter.enter(stream)
            try:
                return await inner(stream)
            finally:
                self._counter.leave(stream)

        return serve
