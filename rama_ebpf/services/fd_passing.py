"""Handing sockets to another process over a Unix socket (SCM_RIGHTS), and taking over those of a service manager."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Callable, Mapping, Sequence
from typing import Final, TypeVar

from ..core.errors import PeerClosed

__all__ = ["MAX_SOCKETS", "receive_sockets", "send_sockets", "sockets_of_service_manager"]

MAX_SOCKETS: Final = 253
"""SCM_MAX_FD of the kernel: how many descriptors one message can carry."""

T = TypeVar("T")

_FIRST_INHERITED: Final = 3  # SD_LISTEN_FDS_START, sd_listen_fds(3)


async def send_sockets(channel: socket.socket, sockets: Sequence[socket.socket], note: bytes = b"\0") -> None:
    """Send 1 to :data:`MAX_SOCKETS` sockets with ``note`` (at least one byte) over a non-blocking Unix socket.

    The caller keeps its own descriptors and closes them. Raises OSError.
    """
    fds = [sock.fileno() for sock in sockets]
    await _when_ready(channel, lambda: socket.send_fds(channel, [note], fds), writing=True)


async def receive_sockets(channel: socket.socket, *, max_note: int = 4096) -> tuple[list[socket.socket], bytes]:
    """Return the sockets of one message and its note. Raises :class:`PeerClosed` when the other side has closed."""
    # Not socket.recv_fds(): that of Python 3.11 drops its flags, and the descriptors would be inherited by children.
    room = socket.CMSG_SPACE(MAX_SOCKETS * struct.calcsize("i"))
    note, control, flags, _ = await _when_ready(
        channel, lambda: channel.recvmsg(max_note, room, socket.MSG_CMSG_CLOEXEC), writing=False
    )
    fds = [
        fd
        for level, kind, data in control
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
        for (fd,) in struct.iter_unpack("i", data)
    ]
    sockets = [socket.socket(fileno=fd) for fd in fds]
    if flags & socket.MSG_CTRUNC:
        for sock in sockets:
            sock.close()
        raise OSError("descriptors were lost: the limit of open files is too low (RLIMIT_NOFILE)")
    if not note:
        raise PeerClosed("the process that hands over sockets has closed its end")
    for sock in sockets:
        sock.setblocking(False)
    return sockets, note


async def _when_ready(channel: socket.socket, call: Callable[[], T], *, writing: bool) -> T:
    loop = asyncio.get_running_loop()
    add, remove = (loop.add_writer, loop.remove_writer) if writing else (loop.add_reader, loop.remove_reader)
    while True:
        try:
            return call()
        except InterruptedError:
            continue
        except BlockingIOError:
            ready = loop.create_future()
            add(channel.fileno(), _wake, ready)
            try:
                await ready
            finally:
                remove(channel.fileno())


def _wake(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)


def sockets_of_service_manager(environ: Mapping[str, str] = os.environ) -> list[socket.socket]:
    """Return the listening sockets that systemd (or who speaks its protocol) has opened for this process.

    Reads LISTEN_PID and LISTEN_FDS (sd_listen_fds(3)); an empty list if they are not for us.
    """
    if environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    sockets = []
    for fd in range(_FIRST_INHERITED, _FIRST_INHERITED + int(environ.get("LISTEN_FDS", "0"))):
        os.set_inheritable(fd, False)
        sock = socket.socket(fileno=fd)
        sock.setblocking(False)
        sockets.append(sock)
    return sockets
