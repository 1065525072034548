"""Key logs: files with which whoever reads them decrypts every connection, so nobody but their owner may."""

from __future__ import annotations

import errno
import os
import ssl
import stat
from pathlib import Path

__all__ = ["write_secrets_to"]


def write_secrets_to(context: ssl.SSLContext, path: Path) -> None:
    """Have a context append each connection's secrets to a file, which is made, or becomes, its owner's alone (0600).

    Raises OSError, also for a link and for what is no regular file.
    """
    # OpenSSL opens it again by its name, and would follow a link, or wait at a FIFO.
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        if mode & 0o077:
            os.fchmod(fd, 0o600)
    finally:
        os.close(fd)
    context.keylog_filename = str(path)
