"""The chunked transfer coding, read strictly (RFC 9112 section 7.1): bytes in, content and trailers out.

The framing must be exact: a size of at most 15 hexadecimal digits, extensions that are well-formed and short, CRLF
and nothing else at each line's end, trailer fields that are fields and that may stand in a trailer. ``lenient`` takes
blanks around a size, with which old servers keep room for it: what a chunk holds is no less certain for them."""

from __future__ import annotations

import enum
import re
from typing import Final

from ..message.errors import AmbiguousMessage, MalformedMessage
from ..message.fields import check_trailers
from ..message.headers import Headers
from ..message.limits import HttpLimits
from .heads import check_field_section

__all__ = ["ChunkDecoder"]

_TOKEN: Final = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_QUOTED: Final = rb'"(?:[\t \x21\x23-\x5b\x5d-\x7e\x80-\xff]|\\[\t \x21-\x7e\x80-\xff])*"'
_VALUE: Final = rb"(?:[ \t]*=[ \t]*(?:" + _TOKEN + rb"|" + _QUOTED + rb"))?"
_SIZE: Final = rb"([0-9A-Fa-f]{1,15})"
# RFC 9112 lets blanks stand before each semicolon; h11 and others take none before the first one.
_SIZE_LINE: Final = re.compile(
    _SIZE + rb"(?:;[ \t]*" + _TOKEN + _VALUE + rb"(?:[ \t]*;[ \t]*" + _TOKEN + _VALUE + rb")*)?"
)
_PADDED_SIZE_LINE: Final = re.compile(rb"[ \t]*" + _SIZE + rb"(?:[ \t]*;[ \t]*" + _TOKEN + _VALUE + rb")*[ \t]*")


class _Due(enum.Enum):
    SIZE = "a size line"
    DATA = "content"
    DATA_END = "the line's end behind content"
    TRAILERS = "the trailer section"
    NOTHING = "the body is over"


class ChunkDecoder:
    """Decodes one chunked body. ``trailers`` are complete once it is ``done``."""

    __slots__ = ("_due", "_lenient", "_limits", "_remaining", "trailers")

    def __init__(self, limits: HttpLimits, *, lenient: bool = False) -> None:
        self._limits = limits
        self._lenient = lenient
        self._due = _Due.SIZE
        self._remaining = 0
        self.trailers = Headers()

    @property
    def done(self) -> bool:
        """Whether the end of the body was read."""
        return self._due is _Due.NOTHING

    def decode(self, data: bytearray, most: int) -> bytes:
        """Take what belongs to the body from the front of ``data`` and return its content: many small chunks as one
        piece, of ``most`` bytes or a little more. b"" says that more is needed, or that it is :attr:`done`. Raises
        :class:`MalformedMessage`."""
        parts: list[bytes] = []
        size = offset = 0
        try:
            while size < most:
                match self._due:
                    case _Due.DATA:
                        part = bytes(data[offset : offset + self._remaining])
                        if not part:
                            break
                        parts.append(part)
                        size += len(part)
                        self._remaining -= len(part)
                        count = len(part)
                        if not self._remaining:
                            self._due = _Due.DATA_END
                    case _Due.SIZE:
                        count = self._size_line(data, offset)
                    case _Due.DATA_END:
                        count = self._data_end(data, offset)
                    case _Due.TRAILERS:
                        count = self._trailer_section(data, offset)
                    case _Due.NOTHING:
                        break
                if not count:
                    break
                offset += count
        finally:
            del data[:offset]
        return parts[0] if len(parts) == 1 else b"".join(parts)

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
        match = (_PADDED_SIZE_LINE if self._lenient else _SIZE_LINE).fullmatch(line)
        if match is None:
            raise AmbiguousMessage("bad chunk size line")
        self._remaining = int(match[1], 16)
        self._due = _Due.DATA if self._remaining else _Due.TRAILERS
        return len(line) + 2

    def _data_end(self, data: bytearray, offset: int) -> int:
        end = bytes(data[offset : offset + 2])
        if not b"\r\n".startswith(end):
            raise AmbiguousMessage("chunk data does not end with CRLF")
        if len(end) < 2:
            return 0
        self._due = _Due.SIZE
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
        self._due = _Due.NOTHING
        return offset - start
