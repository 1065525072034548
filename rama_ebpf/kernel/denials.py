"""What the sandboxes of our processes refuse, counted by the name of the system call: seccomp's user notification.

The kernel asks before a refused call fails, and a child process of ours (:mod:`.denials_child`) says with which error,
so that who is refused never waits for us: we may be stopped, or busy. Who is refused nothing pays nothing, and who goes
on trying waits: a process's answers have a rate. If we end, the child does, and its calls fail with ENOSYS.

Not asked for are calls that libraries try and do without (ENOSYS, netlink sockets): :mod:`.seccomp`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import logging
import os
import select
import socket
import subprocess
import threading
from collections import Counter
from dataclasses import dataclass
from typing import Final

from ..core.interpreter import module_command
from .denials_child import PACKET_BYTES

__all__ = ["DenialCounts"]

log = logging.getLogger("rama_ebpf")

_PIDFD_GETFD: Final = 438  # on every architecture
_LINK: Final = "anon_inode:seccomp notify"
_SERIES: Final = 512
_OTHER: Final = "other"
_END_SECONDS: Final = 1.0
_AGAIN_SECONDS: Final = 0.1

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class _Watched:
    """One process: who it is, and the filter's descriptor, for another child if ours is killed."""

    role: str
    pid: int
    fd: int


class DenialCounts:
    """Has all processes that :meth:`follow` was told of answered for. ``roles`` are few words; with the names of calls
    they make at most 512 series, and one more. The child runs as ``user`` (uid, gid); it is started when it is needed.
    """

    def __init__(self, user: tuple[int, int] = (0, 0)) -> None:
        self._user = user
        self._counts: Counter[tuple[str, str]] = Counter()
        self._watched: dict[int, _Watched] = {}
        self._next = 0
        self._changed = threading.Condition()
        self._closing = False
        self._channel: socket.socket | None = None
        # It lives as long as we do: a child that asks to die with its parent dies with the thread that started it.
        self._thread = threading.Thread(target=self._run, name="denials", daemon=True)
        self._thread.start()

    def counts(self) -> dict[tuple[str, str], int]:
        """Return how many calls were refused, by role and the call's name."""
        with self._changed:
            if self._channel is not None:
                self._read_all(self._channel)
            return dict(self._counts)

    def follow(self, role: str, pid: int, listener: int) -> None:
        """Have a child of ours answered for, whose descriptor ``listener`` is that of its filter; it closes it then.

        Raises OSError where its descriptor cannot be had, or is something else.
        """
        fd = _take(pid, listener)
        with self._changed:
            if self._closing:
                os.close(fd)
                return
            number, self._next = self._next, self._next + 1
            self._watched[number] = _Watched(role, pid, fd)
            self._changed.notify()
            if self._channel is not None:
                with contextlib.suppress(ConnectionError):  # another child is handed all
                    self._hand(self._channel, number)

    def close(self) -> None:
        """End; what is refused from now on is not counted."""
        with self._changed:
            self._closing = True
            self._changed.notify()
            if self._channel is not None:
                with contextlib.suppress(OSError):  # the child has ended
                    self._channel.shutdown(socket.SHUT_RDWR)
        self._thread.join(2 * _END_SECONDS)

    def _run(self) -> None:
        try:
            while self._is_wanted():
                try:
                    self._have_child()
                except OSError as error:
                    log.error("what sandboxes refuse is not counted for now: %s", error)
                with self._changed:
                    if not self._closing:
                        self._changed.wait(_AGAIN_SECONDS)
        finally:  # nobody is to wait for answers that never come
            with self._changed:
                self._closing = True
                while self._watched:
                    os.close(self._watched.popitem()[1].fd)

    def _is_wanted(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._watched or self._closing)
            return not self._closing

    def _have_child(self) -> None:
        """Have a child answer until it has ended. Raises OSError if none can be started."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            with theirs:
                told = (theirs.fileno(), *self._user, os.getpid())
                child = subprocess.Popen(
                    module_command(f"{__package__}.denials_child", *map(str, told)),
                    stdin=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(),),
                    process_group=0,
                )
            try:
                self._listen(ours)
            finally:
                try:
                    child.wait(_END_SECONDS)
                except subprocess.TimeoutExpired:
                    child.kill()
                    child.wait()
        if not self._closing:
            log.error("the process that answers for refused calls (pid %d) has ended: another is started", child.pid)

    def _listen(self, channel: socket.socket) -> None:
        """Hand a child all that there are, and read what it counts, until it ends, or we do."""
        poller = select.poll()
        poller.register(channel, select.POLLIN)
        with self._changed:
            if self._closing:
                return
            self._channel = channel
            for number in self._watched:
                self._hand(channel, number)
        try:
            while True:
                poller.poll()
                with self._changed:
                    if not self._read_all(channel) or self._closing:
                        return
        finally:
            with self._changed:
                self._channel = None

    def _hand(self, channel: socket.socket, number: int) -> None:
        data = json.dumps({"number": number}).encode()
        socket.send_fds(channel, [data], [self._watched[number].fd], socket.MSG_DONTWAIT)

    def _read_all(self, channel: socket.socket) -> bool:
        """Take what the child has told; return whether it still can."""
        try:
            while data := channel.recv(PACKET_BYTES, socket.MSG_DONTWAIT):
                self._read(json.loads(data))
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def _read(self, message: dict[str, object]) -> None:
        number = int(str(message["number"]))
        watched = self._watched.get(number)
        if watched is None:
            return
        if "call" in message:
            self._count(watched, str(message["call"]), int(str(message["count"])))
            return
        if message["why"]:
            text = "denials of %s (pid %d) are not counted any more: %s"
            log.error(text, watched.role, watched.pid, message["why"])
        os.close(self._watched.pop(number).fd)

    def _count(self, watched: _Watched, name: str, count: int) -> None:
        key = watched.role, name
        if key not in self._counts and len(self._counts) >= _SERIES:
            key = _OTHER, _OTHER
        first = not self._counts[key]
        self._counts[key] += count
        if first:
            text = "the sandbox of the %s (pid %d) has refused %s(2); others of it are counted, not logged"
            log.warning(text, watched.role, watched.pid, name)


def _take(pid: int, number: int) -> int:
    pidfd = os.pidfd_open(pid)
    try:
        fd = int(_libc.syscall(_PIDFD_GETFD, pidfd, number, 0))
        if fd < 0:
            code = ctypes.get_errno()
            raise OSError(code, f"the listener of process {pid}: {os.strerror(code)}")
    finally:
        os.close(pidfd)
    if os.readlink(f"/proc/self/fd/{fd}") != _LINK:
        os.close(fd)
        raise OSError(errno.EINVAL, f"what process {pid} offers is no listener of seccomp")
    return fd
