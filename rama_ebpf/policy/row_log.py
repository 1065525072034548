"""A log on disk of what happened one by one: a JSON object a line, appended; now and then written anew as a whole.

A crash tears the last line at most, which costs that row only. A disk that refuses leaves the log as it was.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from .atomic import bring_to_disk, open_regular, write_atomically

__all__ = ["RowLog"]

_SMALL_BYTES: Final = 16 * 1024 * 1024
_LONGEST_LINE: Final = 64 * 1024
_LARGEST: Final = 1 << 30


class RowLog:
    """The log in a file, mode 0600. Calls are made under the policy's lock. All raise OSError where the file system
    refuses."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rewritten = 0  # bytes
        self._is_new = False

    def append(self, row: Mapping[str, object]) -> int:
        """Add a row; return what :meth:`cut` takes it back by. If it raises, the log is as it was."""
        return self.extend([row])

    def extend(self, rows: Iterable[Mapping[str, object]]) -> int:
        """Add rows, all or none, as :meth:`append` does one."""
        return self.extend_lines(b"".join(json.dumps(row).encode() + b"\n" for row in rows))

    def extend_lines(self, added: bytes) -> int:
        """Add whole lines of JSON, all or none, as :meth:`append` adds one."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            fd = open_regular(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
            try:
                size = os.fstat(fd).st_size
                self._is_new |= not size
                torn = size and os.pread(fd, 1, size - 1) != b"\n"
                lines = b"\n" + added if torn else added
                try:
                    if os.write(fd, lines) != len(lines):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                except OSError as error:
                    try:
                        os.ftruncate(fd, size)
                    except OSError as again:
                        raise error from again
                    raise
            finally:
                os.close(fd)
        except OSError as error:
            raise OSError(error.errno, f"cannot write {self.path}: {error.strerror}") from error
        return size

    def cut(self, size: int) -> None:
        """Take back all that was appended since the log had this size."""
        os.truncate(self.path, size)

    def rows(self) -> Iterator[dict[str, object] | None]:
        """Yield each row, None for a line that is none; nothing if there is no log."""
        try:
            fd = open_regular(self.path, os.O_RDONLY)
        except FileNotFoundError:
            return
        with open(fd, "rb") as file:
            if os.fstat(fd).st_size > _LARGEST:
                raise OSError(errno.EFBIG, f"{self.path} is larger than {_LARGEST >> 20} MiB")
            while line := file.readline(_LONGEST_LINE):
                whole = line.endswith(b"\n")
                while line and not line.endswith(b"\n"):
                    line = file.readline(_LONGEST_LINE)  # too long, or torn
                yield _parsed(line) if whole else None

    def overgrown(self) -> bool:
        """Whether so much was appended that it should be written anew: 16 MiB, and as much as there was before."""
        try:
            return self.path.stat().st_size > max(_SMALL_BYTES, 2 * self._rewritten)
        except OSError:
            return False

    def rewrite(self, rows: Iterable[Mapping[str, object]]) -> None:
        """Replace the log by these rows, at once; where there are none, and never were, no file is made."""
        data = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
        if not data and not self.path.exists():
            return
        self._rewritten = len(data)
        write_atomically(self.path, data)

    def sync(self) -> None:
        """Have what was appended outlive a power failure."""
        try:
            bring_to_disk(self.path, also_its_name=self._is_new)
        except FileNotFoundError:
            return  # nothing was ever noted
        self._is_new = False


def _parsed(line: bytes) -> dict[str, object] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None
