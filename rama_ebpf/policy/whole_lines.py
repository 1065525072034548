"""A file of lines, read in pieces of whole lines, whoever appends to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import BinaryIO, Final

__all__ = ["WholeLines"]

_CHUNK: Final = 1024 * 1024
_MAX_LINE: Final = 64 * 1024
_BOM: Final = b"\xef\xbb\xbf"


class WholeLines:
    """Reads on from where ``file`` stands, ``chunk`` bytes at a time; a byte order mark is left out. A line of more
    than 64 KiB is never held: ``lost`` is called for it instead."""

    def __init__(self, file: BinaryIO, lost: Callable[[], None], chunk: int = _CHUNK) -> None:
        self._file = file
        self._lost = lost
        self._chunk = chunk
        self._first = True
        self._skipping = False
        self.rest = b""
        """What was read of a line whose end is not there yet."""

    def read(self) -> bytes:
        """Return the next whole lines, b"" where there are no more for now. Raises OSError."""
        while data := self._file.read(self._chunk):
            if self._first:
                data, self._first = data.removeprefix(_BOM), False
            if self._skipping:
                _, end, data = data.partition(b"\n")
                self._skipping = not end
                if self._skipping:
                    continue
            data = self.rest + data
            cut = data.rfind(b"\n") + 1
            self.rest = data[cut:]
            if len(self.rest) > _MAX_LINE:
                self._lost()
                self.rest, self._skipping = b"", True
            if cut:
                return data[:cut]
        return b""
