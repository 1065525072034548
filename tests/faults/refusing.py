"""Starts a command whose forks somebody else answers: ``python -m tests.faults.refusing FD COMMAND…``. FD is a Unix
socket, over which the listener goes (seccomp(2), user notification)."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import socket
import struct
import sys
import threading
from types import TracebackType

import pyseccomp

__all__ = ["ForksRefused"]

_RECEIVE, _SEND = 0xC0502100, 0xC0182101
_CONTINUE = 1
_CLONE_VM = 0x100
_libc = ctypes.CDLL(None, use_errno=True)


class _Program(ctypes.Structure):
    _fields_ = (("len", ctypes.c_ushort), ("filter", ctypes.c_void_p))


class ForksRefused:
    """Answers for one command, in a thread: ``error`` is that of each fork, 0 to let it be."""

    def __init__(self) -> None:
        self.error = 0
        self.refused = 0
        self._ours, theirs = socket.socketpair()
        os.set_inheritable(theirs.fileno(), True)
        self._theirs = theirs
        self.under = (sys.executable, "-m", "tests.faults.refusing", str(theirs.fileno()))
        self.pass_fds = (theirs.fileno(),)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def __enter__(self) -> ForksRefused:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _t: TracebackType | None
    ) -> None:
        self._theirs.close()
        self._ours.close()

    def _run(self) -> None:
        _, fds, _, _ = socket.recv_fds(self._ours, 16, 1)
        if not fds:
            return
        while True:
            request = bytearray(80)
            try:
                fcntl.ioctl(fds[0], _RECEIVE, request)
                identity = int.from_bytes(request[:8], sys.byteorder)
                self.refused += bool(self.error)
                answer = struct.pack("=QqiI", identity, 0, -self.error, 0 if self.error else _CONTINUE)
                fcntl.ioctl(fds[0], _SEND, bytearray(answer))
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.EINTR):
                    return


def _main() -> None:
    report, command = socket.socket(fileno=int(sys.argv[1])), sys.argv[2:]
    rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    rules.add_rule(pyseccomp.NOTIFY, "vfork")
    # fork(3), which Python takes where there is no vfork(2); threads share their memory.
    rules.add_rule(pyseccomp.NOTIFY, "clone", pyseccomp.Arg(0, pyseccomp.MASKED_EQ, _CLONE_VM, 0))
    with open(os.memfd_create("filter"), "w+b", buffering=0) as file:
        rules.export_bpf(file)
        file.seek(0)
        code = ctypes.create_string_buffer(file.read())
    program = _Program((len(code) - 1) // 8, ctypes.addressof(code))
    number = pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, "seccomp")
    fd = _libc.syscall(number, 1, 1 << 3, ctypes.byref(program))  # SET_MODE_FILTER, FLAG_NEW_LISTENER
    if fd < 0:
        raise OSError(ctypes.get_errno(), "seccomp(2) gives no listener")
    socket.send_fds(report, [b"watched"], [fd])
    os.close(fd)
    report.close()
    os.execv(command[0], command)


if __name__ == "__main__":
    _main()
