"""Sealing a listening socket: whatever comes for it is dropped, silently, until the seal is taken off.

A socket filter that keeps nothing (SO_ATTACH_FILTER, ``Documentation/networking/filter.rst``) sees a segment before TCP
makes anything of it, belongs to the socket, and so holds whichever cgroup and namespace that is in, for every process
that has it.
"""

from __future__ import annotations

import contextlib
import ctypes
import socket
import struct
from typing import Final

__all__ = ["seal", "unseal"]

_SO_ATTACH_FILTER, _SO_DETACH_FILTER = 26, 27
_RETURN: Final = 0x06  # BPF_RET | BPF_K: how many bytes to keep
_INSTRUCTION: Final = struct.Struct("=HBBI")  # struct sock_filter
_PROGRAM: Final = struct.Struct("@HP")  # struct sock_fprog

_keep_nothing = ctypes.create_string_buffer(_INSTRUCTION.pack(_RETURN, 0, 0, 0), _INSTRUCTION.size)


def seal(sock: socket.socket) -> None:
    """Drop what comes for a listening socket from now on. Its connections are not touched. Raises OSError."""
    program = _PROGRAM.pack(1, ctypes.addressof(_keep_nothing))
    sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)


def unseal(sock: socket.socket) -> None:
    """Take the seal off, if there is one. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        sock.setsockopt(socket.SOL_SOCKET, _SO_DETACH_FILTER, 0)
