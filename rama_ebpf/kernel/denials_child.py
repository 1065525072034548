"""The child process that answers the calls which sandboxes refuse: a server that is stopped, or busy, holds none up.

Started as ``python -m rama_ebpf.kernel.denials_child CHANNEL UID GID PARENT`` by :class:`.denials.DenialCounts`, from
which it gets the descriptors of filters over CHANNEL, and which it tells what it counts. It reads nothing but the
kernel's notifications. Reference: ``Documentation/userspace-api/seccomp_filter.rst``, "Userspace Notification".
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

from ..core.bucket import TokenBucket
from .confine import NO_NETWORK, confine
from .privileges import UserIds, die_with_parent, drop_privileges, give_up_capabilities
from .seccomp import FAMILIES, call_name

__all__ = ["PACKET_BYTES"]

PACKET_BYTES: Final = 4096
_RECEIVE, _SEND = 0xC0502100, 0xC0182101  # SECCOMP_IOCTL_NOTIF_RECV, _SEND
_NOTIFICATION: Final = struct.Struct("=QIIiIQ6Q")  # struct seccomp_notif
_RESPONSE: Final = struct.Struct("=QqiI")  # struct seccomp_notif_resp
_RATE: Final = 100.0
_BURST: Final = 200.0
_MOST: Final = 4096
"""Filters that are answered for at once; for more there are no descriptors."""


@dataclass(slots=True)
class _Watched:
    """One process, by the number that the server gave it, and how many answers it may have."""

    number: int
    bucket: TokenBucket = field(default_factory=lambda: TokenBucket(_RATE, _BURST))
    resting_until: float = 0.0


class _Answers:
    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self._watched: dict[int, _Watched] = {}
        self._counted: Counter[tuple[int, str]] = Counter()
        """What the server has not been told yet: it may be stopped."""
        self._said: list[dict[str, object]] = []

    def run(self) -> None:
        """Answer until the server has ended."""
        while True:
            for fd, events in self._poll():
                if fd == self._channel.fileno():
                    if events & ~select.POLLOUT and not self._listen():
                        return
                elif events & select.POLLIN:
                    self._answer(fd)
                else:  # the last process under the filter has ended
                    self._forget(fd, "")
            self._tell()

    def _poll(self) -> list[tuple[int, int]]:
        now, poller, wait = time.monotonic(), select.poll(), None
        pending = bool(self._counted or self._said)
        poller.register(self._channel, select.POLLIN | (select.POLLOUT if pending else 0))
        for fd, watched in self._watched.items():
            if watched.resting_until <= now:
                poller.register(fd, select.POLLIN)
            else:
                left = watched.resting_until - now
                wait = left if wait is None else min(wait, left)
        return poller.poll(None if wait is None else 1000 * wait)

    def _listen(self) -> bool:
        try:
            data, fds, _, _ = socket.recv_fds(self._channel, PACKET_BYTES, 1, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        if not data:
            return False
        for fd in fds:
            os.set_inheritable(fd, False)
            self._watched[fd] = _Watched(json.loads(data)["number"])
        return True

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
            # Counted before it is answered: who has the answer may ask for the count.
            self._counted[watched.number, name] += 1
            self._tell()
            fcntl.ioctl(fd, _SEND, bytearray(_RESPONSE.pack(identity, 0, -_error(name, arguments), 0)))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EINTR):  # else it was killed meanwhile
                self._forget(fd, str(error))

    def _forget(self, fd: int, why: str) -> None:
        self._said.append({"number": self._watched.pop(fd).number, "why": why})
        os.close(fd)

    def _tell(self) -> None:
        """Tell what the server takes just now; it never waits."""
        with contextlib.suppress(BlockingIOError, ConnectionError):  # its end is seen by the channel's
            for (number, name), count in list(self._counted.items()):
                self._send({"number": number, "call": name, "count": count})
                del self._counted[number, name]
            while self._said:
                self._send(self._said[0])
                del self._said[0]

    def _send(self, message: dict[str, object]) -> None:
        self._channel.send(json.dumps(message).encode(), socket.MSG_DONTWAIT)


def _error(name: str, arguments: list[int]) -> int:
    """The error that a refused call ends with."""
    return errno.EAFNOSUPPORT if name == "socket" and arguments[0] not in FAMILIES else errno.EPERM


def main() -> None:
    channel = socket.socket(fileno=int(sys.argv[1]))
    uid, gid, parent = map(int, sys.argv[2:5])
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTSTP, signal.SIGTTOU):
        signal.signal(number, signal.SIG_IGN)
    channel.set_inheritable(False)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(_MOST, hard), min(_MOST, hard)))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if uid and not os.geteuid():
        drop_privileges(UserIds(uid, gid))
    else:
        give_up_capabilities()
    die_with_parent()
    if os.getppid() != parent:
        return  # it ended before we asked to be told
    confine(closed=NO_NETWORK, ioctls=(_RECEIVE, _SEND))
    _Answers(channel).run()


if __name__ == "__main__":
    main()
