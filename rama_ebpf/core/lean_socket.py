"""Sockets without what socket.socket does in Python at each birth and end: for those of whom there are many."""

from __future__ import annotations

import _socket  # what socket.socket is made of, all in C
import socket

__all__ = ["LeanSocket"]


class LeanSocket(socket.socket):
    """A socket that is made and closed in C. It cannot be made a file (``makefile``), and its ``family`` and ``type``
    are plain numbers, not enumerations. To be closed by ``close``; else all is as in :class:`socket.socket`."""

    __slots__ = ()

    # Python's own class counts the files that were made of a socket, and closes with the last one.
    _io_refs = 0
    _closed = False
    __init__ = _socket.socket.__init__
    close = _socket.socket.close
    detach = _socket.socket.detach
    family = _socket.socket.family  # type: ignore[assignment]
    type = _socket.socket.type  # type: ignore[assignment]
