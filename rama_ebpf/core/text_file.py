"""Text files that people edit: read as a whole, with a bound, and whatever their editor puts in front."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

__all__ = ["BYTE_ORDER_MARK", "begins_with_mark", "read_host_file", "read_text_file"]

BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
"""What editors of other systems put in front of UTF-8."""


def read_text_file(path: str | os.PathLike[str], max_bytes: int = 64 << 20) -> str:
    """Return the text of a regular file, or of the pipe that is this process's standard input, without a byte order
    mark.

    Raises OSError, also for what is neither (a FIFO would never end) and for more than ``max_bytes``;
    UnicodeDecodeError for what is not UTF-8.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            if not _is_standard_input(found):
                raise OSError(0, "not a regular file", os.fspath(path))
            os.set_blocking(fd, True)
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise OSError(0, f"larger than {max_bytes >> 20} MiB", os.fspath(path))
    return data.decode("utf-8-sig")


def read_host_file(path: str | os.PathLike[str], max_bytes: int) -> str:
    """Return the text of a file that belongs to the host (hosts, resolv.conf), or its first ``max_bytes``: without a
    byte order mark, with replacement characters for what is not UTF-8, and nothing where there is no such file.

    It never waits: raises OSError for what is no regular file, and for one that may not be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return ""
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(0, "not a regular file", os.fspath(path))
        return file.read(max_bytes).decode("utf-8-sig", "replace")


def _is_standard_input(found: os.stat_result) -> bool:
    try:
        return os.path.samestat(found, os.fstat(0))
    except OSError:
        return False  # closed


def begins_with_mark(path: Path) -> bool:
    """Whether a file begins with a byte order mark. Raises OSError."""
    with open(path, "rb") as file:
        return file.read(len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK
