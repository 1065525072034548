"""A network namespace for the length of a test: empty but for the loopback device, gone when the last socket is."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import time
from collections.abc import Iterator

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _wait_until_local(address: str) -> None:
    """The kernel makes the local route of a new IPv6 address in a work queue, also when ``nodad`` spares the probes."""
    deadline = time.monotonic() + 10
    while not subprocess.check_output(["ip", "route", "get", address], text=True).startswith("local "):
        assert time.monotonic() < deadline, f"no local route to {address}"
        time.sleep(0.005)


@contextlib.contextmanager
def network_namespace(*commands: str) -> Iterator[None]:
    """Move this thread into a new namespace, run ``ip`` with each of ``commands`` there, and move back at the end.

    The namespace has no name: the kernel removes it, whatever happens to this process.
    """
    with open("/proc/thread-self/ns/net") as home:
        _check(_libc.unshare(_CLONE_NEWNET))
        try:
            for command in ("link set lo up", *commands):
                subprocess.run(["ip", *command.split()], check=True)
            added = [command.split("address add ")[1] for command in commands if "address add" in command]
            for address in ("::1", *added):
                _wait_until_local(address.split("/")[0])
            yield
        finally:
            _check(_libc.setns(home.fileno(), _CLONE_NEWNET))
