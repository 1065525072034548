"""The chunked transfer coding, guarded (RFC 9112 section 7.1): tells how many bytes of a buffer are beyond doubt.

h11 decodes; before it sees a byte, this guard has seen that the chunk framing is exact: a size of at most 15
hexadecimal digits, extensions that are well-formed and short, CRLF and nothing else at each line's end, trailer
fields that are fields and that may stand in a trailer.
"""

from __future__ import annotations

import re
from typing import Final

from .errors import AmbiguousMessage, MalformedMessage
from .headers import Headers
from .heads import check_field_section, check_trailers
from .limits import HttpLimits

__all__ = ["ChunkGuard"]

_TOKEN: Final = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_QUOTED: Final = rb'"(?:[\t \x21\x23-\x5b\x5d-\x7e\x80-\xff]|\\[\t \x21-\x7e\x80-\xff])*"'
_EXTENSION: Final = rb"[ \t]*;[ \t]*" + _TOKEN + rb"(?:[ \t]*=[ \t]*(?:" + _TOKEN + rb"|" + _QUOTED + rb"))?"
_SIZE_LINE: Final = re.compile(rb"([0-9A-Fa-f]{1,15})(?:" + _EXTENSION + rb")*")


class ChunkGuard:
    """Follows the framing of one chunked body."""

    def __init__(self, limits: HttpLimits) -> None:
        self._limits = limits
        self._state = self._size_line
        self._remaining = 0
        self.content = 0
        """Bytes of content admitted so far."""
        self.trailers = Headers()
        self.done = False

    def admit(self, data: bytearray) -> int:
        """Return how many leading bytes of ``data`` may go on to the decoder; the rest is kept and shown again with
        more behind it. Raises :class:`MalformedMessage`."""
        offset = 0
        while not self.done:
            count = self._state(data, offset)
            if count == 0:
                break
            offset += count
        return offset

    def _line(self, data: bytearray, offset: int, limit: int, status: int) -> bytes | None:
        end = data.find(b"\r\n", offset, offset + limit + 2)
        if end < 0:
            seen = data[offset : offset + limit + 2]
            if b"\n" in seen or b"\r" in seen[:-1]:
                raise AmbiguousMessage("a bare CR or LF in chunk framing")
            if len(seen) > limit:
                raise MalformedMessage("a line of chunk framing is too long", status)
            return None
        return bytes(data[offset:end])

    def _size_line(self, data: bytearray, offset: int) -> int:
        line = self._line(data, offset, self._limits.chunk_line, 400)
        if line is None:
            return 0
        match = _SIZE_LINE.fullmatch(line)
        if match is None:
            raise AmbiguousMessage("bad chunk size line")
        self._remaining = int(match[1], 16)
        self._state = self._data if self._remaining else self._trailer_section
        return len(line) + 2

    def _data(self, data: bytearray, offset: int) -> int:
        count = min(self._remaining, len(data) - offset)
        self._remaining -= count
        self.content += count
        if self._remaining == 0:
            self._state = self._data_end
        return count

    def _data_end(self, data: bytearray, offset: int) -> int:
        end = bytes(data[offset : offset + 2])
        if not b"\r\n".startswith(end):
            raise AmbiguousMessage("chunk data does not end with CRLF")
        if len(end) < 2:
            return 0
        self._state = self._size_line
        return 2

    def _trailer_section(self, data: bytearray, offset: int) -> int:
        limit = self._limits.trailers
        start = offset
        while True:
            line = self._line(data, offset, limit - (offset - start), 431)
            if line is None:
                return 0
            offset += len(line) + 2
            if not line:
                break
        fields = check_field_section(bytes(data[start : offset - 2]), self._limits)
        check_trailers(fields)
        self.trailers = Headers._of_fields(fields)
        self.done = True
        return offset - start
