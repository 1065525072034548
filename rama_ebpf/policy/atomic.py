"""Files that outlive a crash: replaced as a whole, so that the next start finds the old one or the new one; or appended
to, and then brought to the disk."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

__all__ = ["bring_to_disk", "replacing", "write_atomically"]


def bring_to_disk(path: Path, *, also_its_name: bool = True) -> None:
    """Return when what was appended to a file outlives a power failure; the directory, in which its name may be new, is
    as dear as the file. Raises OSError."""
    for what, sync in ((path, os.fdatasync), (path.parent, os.fsync))[: 1 + also_its_name]:
        fd = os.open(what, os.O_RDONLY | os.O_CLOEXEC)
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
    it has the name. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with open(fd, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
