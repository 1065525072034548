"""The laboratory that users have (:mod:`rama_ebpf.testing`), and what only our own tests need of it."""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import rama_ebpf.testing
from rama_ebpf.testing import Capture, Host, Segment
from rama_ebpf.testing.network import PREFIX
from rama_ebpf.testing.patience import PATIENCE

__all__ = [
    "PATIENCE",
    "PREFIX",
    "TEMPORARY",
    "Capture",
    "Host",
    "Lab",
    "Segment",
    "set_ethtool",
    "temporary_directory",
    "wait_for",
]

T = TypeVar("T")

TEMPORARY = "rama-ebpf-run-"
"""What the names of directories in /tmp begin with that are not pytest's."""


def wait_for(condition: Callable[[], T], *, timeout: float = 10.0, what: str = "condition") -> T:
    """Poll until ``condition`` returns something true, and return it. Raises AssertionError after ``timeout``."""
    deadline = time.monotonic() + timeout * PATIENCE
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"{what} did not come true within {timeout} s")
        time.sleep(0.02)


@contextmanager
def temporary_directory() -> Iterator[Path]:
    """A directory that unprivileged workers can reach, which pytest's cannot. It is locked as long as its maker lives:
    its id would say nothing to a process of another PID namespace."""
    with tempfile.TemporaryDirectory(prefix=TEMPORARY) as made:
        held = os.open(made, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(held, fcntl.LOCK_SH)
            os.chmod(made, 0o755)
            yield Path(made)
        finally:
            os.close(held)


class Lab(rama_ebpf.testing.Lab):
    """With wires that are set up as ethtool(8) does."""

    def host(self, name: str, *, takes_xdp: bool = False) -> Host:
        """``takes_xdp``: its wire takes what XDP sends, as a real one does; a veth only with NAPI at the other end."""
        host = super().host(name)
        if takes_xdp:
            self.ethtool(host, 0x2C, 1)  # ETHTOOL_SGRO
        return host

    def ethtool(self, host: Host, command: int, value: int) -> None:
        """Set something at the switch's end of a host's wire: ``struct ethtool_value`` of ``linux/ethtool.h``."""
        port = "p" + host.ipv4.rpartition(".")[2]
        Host("switch", self._switch).call(lambda: set_ethtool(port, command, value))


def set_ethtool(interface: str, command: int, value: int) -> None:
    """Set something of an interface of this thread's namespace."""
    data = ctypes.create_string_buffer(struct.pack("=II", command, value))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, 0x8946, struct.pack("16sQ16x", interface.encode(), ctypes.addressof(data)))  # SIOCETHTOOL


@contextmanager
def lab_of(*names: str) -> Iterator[Sequence[Host]]:
    """A lab with hosts of these names."""
    with Lab() as lab:
        yield [lab.host(name) for name in names]
