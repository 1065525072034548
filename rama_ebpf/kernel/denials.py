"""What the sandboxes of our processes refuse, counted by the name of the system call: seccomp's user notification.

The kernel asks us before a refused call fails, and we say with which error. Who is refused nothing pays nothing, and
who goes on trying waits for us: a process's answers have a rate. If we end, its calls fail with ENOSYS. Reference:
``Documentation/userspace-api/seccomp_filter.rst``, "Userspace Notification".

Not asked for are calls that libraries try and do without (ENOSYS, netlink sockets): :mod:`.seccomp`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import logging
import os
import select
import struct
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from ..core.bucket import TokenBucket
from .seccomp import FAMILIES, call_name

__all__ = ["DenialCounts"]

log = logging.getLogger("rama_ebpf")

_RECEIVE, _SEND = 0xC0502100, 0xC0182101  # SECCOMP_IOCTL_NOTIF_RECV, _SEND
_NOTIFICATION: Final = struct.Struct("=QIIiIQ6Q")  # struct seccomp_notif
_RESPONSE: Final = struct.Struct("=QqiI")  # struct seccomp_notif_resp
_PIDFD_GETFD: Final = 438  # on every architecture
_LINK: Final = "anon_inode:seccomp notify"
_RATE: Final = 100.0
_BURST: Final = 200.0
_SERIES: Final = 512
_OTHER: Final = "other"

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(slots=True)
class _Watched:
    """One process: who it is, and how many answers it may have."""

    role: str
    pid: int
    bucket: TokenBucket = field(default_factory=lambda: TokenBucket(_RATE, _BURST))
    resting_until: float = 0.0


class DenialCounts:
    """Answers for all processes that :meth:`follow` was told of, in a thread of its own. ``roles`` are few words; with
    the names of calls they make at most 512 series, and one more."""

    def __init__(self) -> None:
        self._counts: Counter[tuple[str, str]] = Counter()
        self._watched: dict[int, _Watched] = {}
        self._lock = threading.Lock()
        self._wakes, self._wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="denials", daemon=True)
        self._thread.start()

    def counts(self) -> dict[tuple[str, str], int]:
        """Return how many calls were refused, by role and the call's name."""
        with self._lock:
            return dict(self._counts)

    def follow(self, role: str, pid: int, listener: int) -> None:
        """Answer for a child of ours, whose descriptor ``listener`` is that of its filter; it closes it afterwards.

        Raises OSError where its descriptor cannot be had, or is something else.
        """
        fd = _take(pid, listener)
        with self._lock:
            if self._closing:
                os.close(fd)
                return
            self._watched[fd] = _Watched(role, pid)
        self._rouse()

    def close(self) -> None:
        """End; what is refused from now on is not counted."""
        with self._lock:
            self._closing = True
        self._rouse()
        self._thread.join(1)

    def _rouse(self) -> None:
        with contextlib.suppress(BlockingIOError):  # it has been roused already
            os.write(self._wake, b"x")

    def _run(self) -> None:
        try:
            while not self._closing:
                for fd, events in self._poll():
                    if fd == self._wakes:
                        os.read(fd, 4096)
                    elif events & select.POLLIN:
                        self._answer(fd)
                    else:  # the last process under the filter has ended
                        self._forget(fd)
        finally:  # nobody is to wait for answers that never come
            with self._lock:
                self._closing = True
                while self._watched:
                    os.close(self._watched.popitem()[0])
            os.close(self._wakes)

    def _poll(self) -> list[tuple[int, int]]:
        now, poller, wait = time.monotonic(), select.poll(), None
        poller.register(self._wakes, select.POLLIN)
        with self._lock:
            for fd, watched in self._watched.items():
                if watched.resting_until <= now:
                    poller.register(fd, select.POLLIN)
                else:
                    left = watched.resting_until - now
                    wait = left if wait is None else min(wait, left)
        return poller.poll(None if wait is None else 1000 * wait)

    def _forget(self, fd: int) -> None:
        with self._lock:
            del self._watched[fd]
        os.close(fd)

    def _answer(self, fd: int) -> None:
        watched, now = self._watched[fd], time.monotonic()
        if wait := watched.bucket.take(now):
            watched.resting_until = now + wait
            return
        request = bytearray(_NOTIFICATION.size)
        try:
            fcntl.ioctl(fd, _RECEIVE, request)
            identity, _, _, number, _, _, *arguments = _NOTIFICATION.unpack(request)
            name = call_name(number)
            fcntl.ioctl(fd, _SEND, bytearray(_RESPONSE.pack(identity, 0, -_error(name, arguments), 0)))
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EINTR):
                return  # it was killed meanwhile
            log.error("denials of %s (pid %d) are not counted any more: %s", watched.role, watched.pid, error)
            self._forget(fd)
            return
        self._count(watched, name)

    def _count(self, watched: _Watched, name: str) -> None:
        key = watched.role, name
        with self._lock:
            if key not in self._counts and len(self._counts) >= _SERIES:
                key = _OTHER, _OTHER
            self._counts[key] += 1
            first = self._counts[key] == 1
        if first:
            text = "the sandbox of the %s (pid %d) has refused %s(2); others of it are counted, not logged"
            log.warning(text, watched.role, watched.pid, name)


def _error(name: str, arguments: list[int]) -> int:
    """The error that a refused call ends with."""
    return errno.EAFNOSUPPORT if name == "socket" and arguments[0] not in FAMILIES else errno.EPERM


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
