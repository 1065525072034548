"""Processes that are stopped at each call which changes or reads the policy: bpf(2), and files below given directories.

What is tried is not listed by hand: a run without any fault says which calls there are. Each is answered by
:meth:`Watch.run`: it goes on, fails with an errno, or its process is killed before it is made.
See ``Documentation/userspace-api/seccomp_filter.rst``, "Userspace Notification".
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import select
import signal
import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyseccomp as seccomp

__all__ = ["Call", "Fault", "Watch", "be_watched", "receive_listener"]

_FILES = {
    "open": (0, None),
    "openat": (1, None),
    "creat": (0, None),
    "write": (None, 0),
    "pwrite64": (None, 0),
    "writev": (None, 0),
    "ftruncate": (None, 0),
    "truncate": (0, None),
    "fsync": (None, 0),
    "fdatasync": (None, 0),
    "fchmod": (None, 0),
    "chmod": (0, None),
    "fchmodat": (1, None),
    "rename": (0, None),
    "renameat": (1, None),
    "renameat2": (1, None),
    "unlink": (0, None),
    "unlinkat": (1, None),
    "rmdir": (0, None),
    "mkdir": (0, None),
    "mkdirat": (1, None),
    "link": (0, None),
    "symlink": (1, None),
    "read": (None, 0),
    "pread64": (None, 0),
}
"""Calls on files: which argument is a path, or which is a descriptor."""
_READING_FILES = {"read", "pread64"}
_BPF = (
    *("MAP_CREATE", "MAP_LOOKUP", "MAP_UPDATE", "MAP_DELETE", "MAP_NEXT_KEY", "PROG_LOAD", "OBJ_PIN", "OBJ_GET"),
    *("PROG_ATTACH", "PROG_DETACH", "PROG_TEST_RUN", "PROG_NEXT_ID", "MAP_NEXT_ID", "PROG_BY_ID", "MAP_BY_ID"),
    *("OBJ_INFO", "PROG_QUERY", "RAW_TP_OPEN", "BTF_LOAD", "BTF_BY_ID", "TASK_FD_QUERY", "MAP_LOOKUP_AND_DELETE"),
    *("MAP_FREEZE", "BTF_NEXT_ID", "LOOKUP_BATCH", "LOOKUP_AND_DELETE_BATCH", "UPDATE_BATCH", "DELETE_BATCH"),
    *("LINK_CREATE", "LINK_UPDATE", "LINK_BY_ID", "LINK_NEXT_ID", "ENABLE_STATS", "ITER_CREATE", "LINK_DETACH"),
)
_BPF_CHANGES = {"MAP_UPDATE", "MAP_DELETE", "OBJ_PIN", "PROG_ATTACH", "LINK_CREATE", "UPDATE_BATCH", "DELETE_BATCH"}
_RECEIVE, _SEND = 0xC0502100, 0xC0182101  # SECCOMP_IOCTL_NOTIF_RECV, _SEND
_NOTIFICATION = struct.Struct("=QIIiIQ6Q")
_CONTINUE = 1
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class _Program(ctypes.Structure):
    """``struct sock_fprog``"""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


_libc = ctypes.CDLL(None, use_errno=True)


def _number(name: str) -> int:
    return int(seccomp.resolve_syscall(seccomp.Arch.NATIVE, name))


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a watched process. ``changes``: whether it may leave anything different behind."""

    name: str
    what: str
    changes: bool

    def __str__(self) -> str:
        return f"{self.name}({self.what})"


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens at the call of this number: an errno, or death before it is made (0)."""

    at: int
    error: int = 0

    def __str__(self) -> str:
        return f"{errno.errorcode[self.error]} at" if self.error else "killed at"


def be_watched(report: socket.socket) -> None:
    """Have this process and those that it starts watched by who reads ``report``. It has one thread, and is root's."""
    rules = seccomp.SyscallFilter(seccomp.ALLOW)
    for name in ("bpf", *_FILES):
        rules.add_rule(seccomp.NOTIFY, name)
    with open(os.memfd_create("filter"), "w+b", buffering=0) as file:
        rules.export_bpf(file)
        file.seek(0)
        code = ctypes.create_string_buffer(file.read())
    program = _Program((len(code) - 1) // 8, ctypes.addressof(code))
    # From here on nothing may be imported or read: whoever answers does not know of us yet.
    fd = _libc.syscall(_number("seccomp"), 1, 1 << 3, ctypes.byref(program))  # SET_MODE_FILTER, FLAG_NEW_LISTENER
    if fd < 0:
        raise OSError(ctypes.get_errno(), "seccomp(2) gives no listener")
    report.sendmsg([b"watched"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd))])
    os.close(fd)


class Watch:
    """Answers the calls of a process that is watched, and of those that it starts."""

    def __init__(self, listener: int, pid: int, roots: Sequence[str]) -> None:
        """Calls count that process ``pid`` makes: bpf(2), and those on files whose path has one of ``roots`` in it."""
        self.calls: list[Call] = []
        self.happened = False
        self._fault: Fault | None = None
        self._listener = listener
        self._pid = pid
        self._roots = tuple(roots)
        self._names = {_number(name): name for name in _FILES}
        self._bpf = _number("bpf")
        self._threads: dict[int, bool] = {}
        self._request = ctypes.create_string_buffer(_NOTIFICATION.size)

    def close(self) -> None:
        os.close(self._listener)

    def arm(self, fault: Fault | None) -> None:
        """Count calls from 0 again, and have ``fault`` happen."""
        self._fault, self.calls, self.happened = fault, [], False

    def run(self, ended: Callable[[], bool] = lambda: True, *, wakes: int | None = None) -> None:
        """Answer until ``ended()``, which is asked when descriptor ``wakes`` can be read; or to the last process's
        end."""
        poller = select.poll()
        poller.register(self._listener, select.POLLIN)
        if wakes is not None:
            poller.register(wakes, select.POLLIN)
        while True:
            for fd, events in poller.poll(1000):
                if fd == wakes:
                    if ended():
                        return
                elif events & select.POLLIN:
                    self._answer()
                else:
                    poller.unregister(self._listener)
                    if wakes is None:
                        return

    def _answer(self) -> None:
        ctypes.memset(self._request, 0, len(self._request))
        try:
            fcntl.ioctl(self._listener, _RECEIVE, self._request)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EINTR):
                return  # it was killed meanwhile
            raise
        identity, thread, _, number, _, _, *arguments = _NOTIFICATION.unpack(self._request.raw)
        call, fault = self._read(thread, number, arguments), self._fault
        hit = call is not None and fault is not None and fault.at == len(self.calls)
        if call is not None:
            self.calls.append(call)
        if not hit or fault is None:
            self._respond(identity, 0, _CONTINUE)
            return
        self.happened = True
        if fault.error:
            self._respond(identity, -fault.error, 0)
        else:
            os.kill(self._pid, signal.SIGKILL)

    def _respond(self, identity: int, error: int, flags: int) -> None:
        with contextlib.suppress(FileNotFoundError):  # it was killed meanwhile
            fcntl.ioctl(self._listener, _SEND, bytearray(struct.pack("=QqiI", identity, 0, error, flags)))

    def _is_ours(self, thread: int) -> bool:
        if thread not in self._threads:
            self._threads[thread] = Path(f"/proc/{self._pid}/task/{thread}").exists()
        return self._threads[thread]

    def _read(self, thread: int, number: int, arguments: Sequence[int]) -> Call | None:
        """Return the call if it counts."""
        if not self._is_ours(thread):
            return None
        if number == self._bpf:
            command = _BPF[arguments[0]] if arguments[0] < len(_BPF) else str(arguments[0])
            return Call("bpf", command, command in _BPF_CHANGES)
        name = self._names[number]
        path_at, fd_at = _FILES[name]
        path = self._string(thread, arguments[path_at]) if path_at is not None else ""
        if fd_at is not None:
            with contextlib.suppress(OSError):
                path = os.readlink(f"/proc/{self._pid}/fd/{arguments[fd_at]}")
        if not any(root in path for root in self._roots):
            return None
        changes = name not in _READING_FILES
        if name == "openat":
            changes = bool(arguments[2] & _WRITES)
        elif name in ("fsync", "fdatasync"):
            changes = False
        return Call(name, path, changes)

    @staticmethod
    def _string(thread: int, address: int) -> str:
        with open(f"/proc/{thread}/mem", "rb", buffering=0) as memory:
            memory.seek(address)
            try:
                text = memory.read(512)
            except OSError:
                memory.seek(address)
                text = memory.read(4096 - address % 4096)
        return text.partition(b"\0")[0].decode(errors="replace")


def receive_listener(report: socket.socket) -> tuple[bytes, int]:
    """Read a message and the descriptor that came with it, -1 if none did."""
    message, fds, _, _ = socket.recv_fds(report, 65536, 1)
    return message, fds[0] if fds else -1
