"""A guard on the frames of an HTTP/2 connection: counts what costs the peer nothing and us something. Sans-I/O.

The h2 library checks each frame; this looks at how many there are, before h2 holds or answers them:

- CONTINUATION without end (CVE-2024-27316), by number and by bytes of one header block;
- frames that carry nothing: PING, SETTINGS, PRIORITY, empty DATA, unknown types (CVE-2019-9512 to -9518);
- WINDOW_UPDATE in drops, by the number of DATA frames that we sent;
- streams opened and reset at once (CVE-2023-44487), and ours that the peer's errors make us reset (CVE-2025-8671).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ....core.bucket import TokenBucket
from ....core.errors import LimitExceeded

__all__ = ["FloodDetected", "FrameGuard"]

_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_HEADER: Final = 9
_DATA, _HEADERS, _PRIORITY, _RST_STREAM, _SETTINGS, _PUSH_PROMISE, _PING, _GOAWAY, _WINDOW_UPDATE, _CONTINUATION = (
    range(10)
)
_END_STREAM: Final = 0x1
_END_HEADERS: Final = 0x4
_MAX_CONTINUATIONS: Final = 16
_MAX_GOAWAY: Final = 16 * 1024

_CHEAP_RATE: Final = 100.0
_CHEAP_BURST: Final = 2000.0
_RESET_RATE: Final = 20.0
_RESET_BURST: Final = 200.0
_FREE_WINDOW_UPDATES: Final = 2000
_WINDOW_UPDATES_PER_DATA: Final = 4


class FloodDetected(LimitExceeded):
    """The peer sends frames whose only effect is work. The connection ends with ENHANCE_YOUR_CALM."""

    kind = "h2_flood"


class FrameGuard:
    """Sees every byte that is received, before h2 does.

    ``server`` tells whether the client's preface comes first, ``header_bytes`` bounds one encoded header block,
    ``clock`` is monotonic seconds. GOAWAY is kept from h2, which takes it for the end of everything: streams up to
    the last one that it names go on (RFC 9113 section 6.8).
    """

    def __init__(self, *, server: bool, header_bytes: int, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._header_bytes = header_bytes
        self._preface = len(_PREFACE) if server else 0
        self._head = bytearray()
        self._payload = 0
        self._kept: bytearray | None = None
        self._block = 0
        self._continuations = 0
        self._window_updates = 0
        self._cheap = TokenBucket(_CHEAP_RATE, _CHEAP_BURST)
        self._resets = TokenBucket(_RESET_RATE, _RESET_BURST)
        self.in_header_block = False
        """A header block has begun and not ended."""
        self.data_sent = 0
        """DATA frames that we sent; the sender counts them here."""
        self.last_stream: int | None = None
        """The last stream that the peer will process, once it has sent GOAWAY."""

    @property
    def unfinished(self) -> bool:
        """The preface, a frame, or a header block has begun and not ended."""
        return self._preface > 0 or self.in_header_block or self._payload > 0 or len(self._head) > 0

    def receive(self, data: bytes) -> bytes:
        """Look at received bytes and return what is for h2; an unfinished frame header waits for its rest. Raises
        :class:`FloodDetected`."""
        admitted: list[bytes] = []
        offset = 0
        if self._preface:
            offset = min(self._preface, len(data))
            self._preface -= offset
            admitted.append(data[:offset])
        while offset < len(data):
            if self._payload:
                step = min(self._payload, len(data) - offset)
                self._payload -= step
                self._take(data[offset : offset + step], admitted)
                offset += step
                continue
            step = min(_HEADER - len(self._head), len(data) - offset)
            self._head += data[offset : offset + step]
            offset += step
            if len(self._head) == _HEADER:
                self._frame(admitted)
                self._head.clear()
        return b"".join(admitted)

    def _take(self, payload: bytes, admitted: list[bytes]) -> None:
        if self._kept is None:
            admitted.append(payload)
            return
        self._kept += payload
        if not self._payload:
            last = int.from_bytes(self._kept[:4], "big") & 0x7FFFFFFF
            self.last_stream = last if self.last_stream is None else min(last, self.last_stream)
            self._kept = None

    def _frame(self, admitted: list[bytes]) -> None:
        length, kind, flags = int.from_bytes(self._head[:3], "big"), self._head[3], self._head[4]
        self._payload = length
        self._count(length, kind, flags)
        proper = 8 <= length <= _MAX_GOAWAY and not any(self._head[5:]) and not self.in_header_block
        if kind == _GOAWAY and proper:
            self._kept = bytearray()
        else:
            admitted.append(bytes(self._head))

    def _count(self, length: int, kind: int, flags: int) -> None:
        if kind in (_HEADERS, _CONTINUATION, _PUSH_PROMISE):
            if kind != _CONTINUATION:
                self._block = self._continuations = 0
            else:
                self._continuations += 1
            self._block += length
            self.in_header_block = not flags & _END_HEADERS
            if self._continuations > _MAX_CONTINUATIONS or self._block > self._header_bytes:
                raise FloodDetected("a header block without end")
        elif kind == _WINDOW_UPDATE:
            self._window_updates += 1
            if self._window_updates > _FREE_WINDOW_UPDATES + _WINDOW_UPDATES_PER_DATA * self.data_sent:
                raise FloodDetected("more WINDOW_UPDATE frames than our data can have caused")
        elif self._carries_nothing(length, kind, flags) and self._cheap.take(self._clock()):
            raise FloodDetected("a flood of frames that carry nothing")

    @staticmethod
    def _carries_nothing(length: int, kind: int, flags: int) -> bool:
        if kind == _DATA:
            return length == 0 and not flags & _END_STREAM
        return kind != _RST_STREAM  # these are counted as streams that ended by one

    def reset(self) -> None:
        """Count a stream that ended by a reset. Raises :class:`FloodDetected`."""
        if self._resets.take(self._clock()):
            raise FloodDetected("streams are opened and reset in rapid succession")
