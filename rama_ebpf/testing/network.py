"""A laboratory of network namespaces: real hosts on real (virtual) wires, made and removed by the test.

Needs root, ip(8) of iproute2, and nsenter(1). Addresses are from 198.18.0.0/15 (RFC 2544) and 2001:db8::/32 only. Names
carry this process's id, so that runs beside each other do not meet.
"""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from socket import socket as Socket
from typing import Final, TypeVar

from ..kernel.netns import call_inside
from .capture import Capture
from .patience import PATIENCE

__all__ = ["PREFIX", "Host", "Lab"]

T = TypeVar("T")

PREFIX: Final = "ramalab"
"""What the names of namespaces begin with; this process's id follows."""
_numbers = itertools.count()


def _ip(*args: str) -> None:
    subprocess.run(["ip", *args], check=True, capture_output=True, text=True)


@dataclass
class Host:
    """One network namespace with an address of each family."""

    name: str
    netns: str
    ipv4: str = ""
    ipv6: str = ""
    _stack: ExitStack = field(default_factory=ExitStack)

    def ip(self, *args: str) -> None:
        """Run ip(8) inside."""
        _ip("-n", self.netns, *args)

    def add_address(self, address: str, interface: str) -> None:
        """Add an address with its prefix length."""
        extra = ["nodad"] if ":" in address else []
        self.ip("address", "add", address, "dev", interface, *extra)

    def command(self, *args: str) -> list[str]:
        """Return the command line that runs ``args`` inside. (``ip netns exec`` would hide bpffs and cgroups.)"""
        return ["nsenter", f"--net=/run/netns/{self.netns}", *args]

    def run(self, *args: str, timeout: float = 30.0, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command inside to its end."""
        return subprocess.run(
            self.command(*args), check=check, capture_output=True, text=True, timeout=timeout * PATIENCE
        )

    def popen(self, *args: str, **options: object) -> subprocess.Popen[str]:
        """Start a command inside; it is killed when the lab ends."""
        process = subprocess.Popen(self.command(*args), text=True, **options)  # type: ignore[call-overload]
        self._stack.callback(_end, process)
        return process  # type: ignore[no-any-return]

    def call(self, function: Callable[[], T]) -> T:
        """Run a function in a thread that lives inside; sockets that it makes stay inside."""
        return call_inside(self.netns, function)

    def socket(self, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM, proto: int = 0) -> Socket:
        """Make a socket inside, with a time-out of 10 s (times :data:`PATIENCE`)."""
        sock = self.call(lambda: socket.socket(family, kind, proto))
        sock.settimeout(10.0 * PATIENCE)
        return sock

    def connect(self, address: str, port: int, *, source: str | None = None, timeout: float = 10.0) -> Socket:
        """Connect from inside. Raises what connect(2) says."""
        sock = self.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        try:
            sock.settimeout(timeout * PATIENCE)
            if source is not None:
                sock.bind((source, 0))
            sock.connect((address, port))
        except BaseException:
            sock.close()
            raise
        return sock

    def capture(self, interface: str) -> Capture:
        """Capture the TCP segments that cross an interface from now on; close it when done."""
        sock = self.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        sock.bind((interface, 0))
        sock.settimeout(0.05)
        return Capture(sock)


def _end(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            stream.close()


class Lab:
    """Hosts on one Ethernet segment (a bridge in a namespace of its own). A context manager."""

    def __init__(self) -> None:
        self._id = f"{PREFIX}-{os.getpid()}-{next(_numbers)}"
        self._stack = ExitStack()
        self._count = 0

    def __enter__(self) -> Lab:
        with ExitStack() as undo:
            self._switch = f"{self._id}-switch"
            _ip("netns", "add", self._switch)
            undo.callback(_ip, "netns", "delete", self._switch)
            _ip("-n", self._switch, "link", "add", "br0", "type", "bridge")
            _ip("-n", self._switch, "link", "set", "br0", "up")
            self._stack = undo.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def host(self, name: str) -> Host:
        """Add a host: eth0 with 198.18.0.N/16 and 2001:db8::N/64, N counting from 1; loopback is up."""
        self._count += 1
        number = self._count
        host = Host(name, f"{self._id}-{name}", f"198.18.0.{number}", f"2001:db8::{number:x}")
        _ip("netns", "add", host.netns)
        self._stack.callback(_ip, "netns", "delete", host.netns)
        self._stack.callback(host._stack.close)
        port = f"p{number}"
        _ip("link", "add", port, "netns", self._switch, "type", "veth", "peer", "name", "eth0", "netns", host.netns)
        _ip("-n", self._switch, "link", "set", port, "master", "br0", "up")
        host.ip("link", "set", "lo", "up")
        host.ip("link", "set", "eth0", "up")
        host.add_address(f"{host.ipv4}/16", "eth0")
        host.add_address(f"{host.ipv6}/64", "eth0")
        return host
