"""Files that outlive a crash: replaced as a whole, so that the next start finds the old one or the new one; or appended
to, and then brought to the disk."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

__all__ = ["bring_to_disk", "open_regular", "replacing", "write_atomically"]

_TRIES: Final = 8


def open_regular(path: Path, flags: int) -> int:
    """Open a file of ours, which is made if ``flags`` have O_CREAT. Raises OSError if it is no regular file: whatever
    else lies there, nobody waits for it, and nothing is read from a device."""
    fd = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "no regular file", str(path))
    return fd


def bring_to_disk(path: Path, *, also_its_name: bool = True) -> None:
    """Return when what was appended to a file outlives a power failure; the directory, in which its name may be new, is
    as dear as the file. Raises OSError."""
    for what, sync in ((path, os.fdatasync), (path.parent, os.fsync))[: 1 + also_its_name]:
        fd = os.open(what, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO in its place holds nobody up
        try:
            sync(fd)
        finally:
            os.close(fd)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace a file by a whole one, on disk before it has the name. Raises OSError."""
    with replacing(path) as file:
        file.write(data)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yield a new file, which replaces ``path`` when the block ends well; it is on disk before
    it has the name. What writers of it that were killed have left is removed. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    _sweep(path)
    fd, temporary = _temporary(path)
    try:
        with open(fd, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _temporary(path: Path) -> tuple[int, str]:
    """Make a file beside ``path``, with a lock that says that its writer lives."""
    for _ in range(_TRIES):
        fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(fd).st_nlink:
                return fd, temporary
        os.close(fd)  # it was swept before it had its lock
    raise OSError(errno.EBUSY, "others remove what is written", str(path))


def _sweep(path: Path) -> None:
    for left in path.parent.glob(f".{glob.escape(path.name)}-*"):
        with contextlib.suppress(OSError):  # removed meanwhile, or still written
            fd = os.open(left, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                left.unlink()
            finally:
                os.close(fd)
